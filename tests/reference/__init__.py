"""Slow, obvious versions that the fast code is held to. Nothing here asks the library what reads what."""
