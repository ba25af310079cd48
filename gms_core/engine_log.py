"""The log of the engine whose process this is: lines that its operator should read go there, with its handlers and its level."""

from __future__ import annotations

import logging

_name = "gms"


def log_as(name: str) -> None:
    """Choose the logger, once for the process: one below the engine's own."""
    global _name
    _name = name


def log() -> logging.Logger:
    """The logger."""
    return logging.getLogger(_name)
