"""Hostile input for the codec and for a live server."""
