"""Photographs with captions in the forms that people keep them in; a module reads each."""
