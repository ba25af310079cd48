"""The ranks of an engine that compute together, as far as GMS asks something of them."""

from __future__ import annotations

from typing import Any, Protocol


class Ranks(Protocol):
    """A group of processes. Each call is made by all of them.

    Attributes:
        rank_in_group: Which of them this process is, from 0.
    """

    @property
    def rank_in_group(self) -> int: ...

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        """Give every rank the object of one."""

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Give every rank the objects of all, in their order."""
