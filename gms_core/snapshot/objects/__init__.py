"""Snapshots in object stores: what takes the place of renames and of locks there, and the one module that knows the library."""
