"""The ranks of an engine that compute together, as far as GMS asks something of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from gms_core.errors import GmsError, rebuild

Result = TypeVar("Result")


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


def all_or_none(ranks: Ranks | None, step: Callable[[], Result]) -> Result:
    """Take a step on every rank, and go on only if all of them could.

    Args:
        ranks: All of them; None if there is one.
        step: This rank's part. It must leave nothing that others see.

    Returns:
        What this rank's step returned.

    Raises:
        GmsError: Another rank's step failed, and as what.
        Exception: This rank's did.
    """
    if ranks is None:
        return step()
    try:
        result = step()
    except Exception as error:
        ranks.all_gather_object((error.code if isinstance(error, GmsError) else GmsError.code, str(error)))
        raise
    for number, failure in enumerate(ranks.all_gather_object(None)):
        if failure is not None:
            code, sentence = failure
            raise rebuild(code, f"rank {number} of this engine could not: {sentence}", "", {})
    return result
