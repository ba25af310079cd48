"""Bytes for people."""

from __future__ import annotations

GIB, MIB = 2**30, 2**20


def amount(size: int) -> str:
    """A number of bytes in words."""
    return f"{size / GIB:.2f} GiB" if size >= GIB // 10 else f"{size / MIB:.2f} MiB"
