"""Engines killed again and again, in every way, while somebody asks them for tokens."""
