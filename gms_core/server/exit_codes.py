"""What a device server's process tells its supervisor by its end."""

HANDED_OVER = 75
"""Another server has taken its device over: it is not to be started again."""
