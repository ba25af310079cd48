"""What TensorRT-LLM asks for, and what it is granted."""

from __future__ import annotations

from enum import Enum

from gms_core.protocol.messages import Mode


class RequestedLockType(Enum):
    """What is asked for: to publish, to attach, or whichever comes first."""

    RW = "rw"
    RO = "ro"
    RW_OR_RO = "auto"

    @property
    def mode(self) -> Mode:
        """The same, as GMS says it."""
        return self.value


class GrantedLockType(Enum):
    """What was granted: to publish, or to attach."""

    RW = "rw"
    RO = "ro"
