"""Where tables go."""

from __future__ import annotations

from rich.console import Console

WIDTH = 160
"""Columns where standard output is no terminal: a table in a file or a pipe is not to be wrapped at 80."""


def standard_output() -> Console:
    """A console on standard output, as wide as its terminal. What is in brackets is text: names of clients and models are other people's words."""
    console = Console(markup=False)
    return console if console.is_terminal else Console(width=WIDTH, markup=False)


def plain(text: str) -> str:
    """Other people's words without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
