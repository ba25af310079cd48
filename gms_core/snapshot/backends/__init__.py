"""What stands behind the names of transfer backends, each in a module of its own, imported when it is wanted."""
