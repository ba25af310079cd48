"""What all messages share, and the words that stand in several of them."""

from __future__ import annotations

from typing import Literal

import msgspec

Mode = Literal["auto", "rw", "ro"]

Role = Literal["init", "standby", "promoting", "primary", "fenced"]
"""What an engine is to its clients; see `gms_core.failover.roles`."""
Order = Literal["", "promote", "demote"]
"""What an operator wants of an engine; empty for nothing."""


class Message(msgspec.Struct, frozen=True, tag_field="type"):
    """Base of all messages."""
