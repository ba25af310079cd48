"""An undo stack: several driver calls that all hold, or none of them does.

Modelled on cuda.core: every success registers its inverse, and one `UndoStack.commit` at the end disarms them all.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, Self

Arguments = ParamSpec("Arguments")


class UndoStack:
    """Runs the registered inverses, newest first, when its block ends without `commit`.

    An inverse that fails does not keep the others from running, and never hides the error that ended the block: it is told as a note of that
    error. When the block ended well, the first failure is raised, with the others as its notes.

    Args:
        kept: Says whether what was done is to be kept although `commit` was not called: an interrupt can come between `commit` and the assignment
            that makes the owner rely on what was done, but not within that assignment.
    """

    def __init__(self, kept: Callable[[], bool] = lambda: False) -> None:
        self._inverses: list[tuple[str, Callable[[], object]]] = []
        self._kept = kept

    def push(self, inverse: Callable[Arguments, object], *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        """Register the inverse of a call that has just succeeded."""
        name = getattr(inverse, "__qualname__", repr(inverse))
        self._inverses.append((name, lambda: inverse(*args, **kwargs)))

    def commit(self) -> None:
        """Keep what was done. Inverses that are pushed later are armed again."""
        self._inverses.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        failures: list[tuple[str, Exception]] = []
        if self._kept():
            self.commit()
        while self._inverses:
            name, inverse = self._inverses.pop()
            try:
                inverse()
            except Exception as failure:  # noqa: BLE001 - the other inverses must run; it is raised or noted below
                failures.append((name, failure))
        raised = error if error is not None else failures.pop(0)[1] if failures else None
        if raised is not None:
            for name, other in failures:
                raised.add_note(f"while undoing, {name} failed: {type(other).__name__}: {other}")
        if error is None and raised is not None:
            raise raised
