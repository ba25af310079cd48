"""Where tables go."""

from __future__ import annotations

from rich.console import Console

WIDTH = 160
"""Columns where standard output is no terminal: a table in a file or a pipe is not to be wrapped at 80."""


def standard_output() -> Console:
    """A console on standard output, as wide as its terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)
