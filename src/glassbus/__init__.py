"""Glassbus: a message bus you can see through."""
