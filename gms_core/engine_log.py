"""The log of the engine whose process this is: lines that its operator should read go there, with its handlers and its level."""

from __future__ import annotations

import logging

GIB, MIB = 2**30, 2**20

_name = "gms"


def log_as(name: str) -> None:
    """Choose the logger, once for the process: one below the engine's own."""
    global _name
    _name = name


def log() -> logging.Logger:
    """The logger."""
    return logging.getLogger(_name)


def amount(size: int) -> str:
    """Bytes for people."""
    return f"{size / GIB:.2f} GiB" if size >= GIB // 10 else f"{size / MIB:.2f} MiB"
