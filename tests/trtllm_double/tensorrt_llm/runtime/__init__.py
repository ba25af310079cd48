"""Upstream's own runtime."""
