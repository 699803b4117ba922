"""Computer-made people: who they are, how they look, and their pictures."""
