"""The embedded default: portraits, a tiny base model and a tiny scorer, and the commands that make them."""
