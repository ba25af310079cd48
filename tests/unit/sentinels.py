"""What somebody reads who watches the sentinels of a save or a restore."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import get_args

import msgspec

from gms_core.snapshot.control import Sentinel, State


def read_sentinels(directory: Path, name: str) -> dict[State, Sentinel]:
    """The sentinels of a name that are there."""
    found: dict[State, Sentinel] = {}
    for state in get_args(State):
        with contextlib.suppress(FileNotFoundError):
            found[state] = msgspec.json.decode((directory / name / state).read_bytes(), type=Sentinel)
    return found
