"""Keeps the journal level with the server's state: no reply leaves, and no memory goes, before what it rests on is written down."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping

from gms_core.errors import JournalUnavailable
from gms_core.server.journal import Journal, Values

log = logging.getLogger(__name__)

Encode = Callable[[str, Values], Mapping[str, bytes | None]]
"""Values to set, or None to remove them, for one thing by what its name has after the slash. It is given what is written already."""
EncodeAll = Callable[[], Mapping[str, bytes]]
"""The values of all things of a kind, by their names after the slash."""

UNSYNCED = ("session/", "cohort/", "about")
"""What is of no use after a reboot need not be on the disk: a kill of the server takes nothing from the kernel."""


class Durable:
    """Notes what has changed, and writes it.

    Args:
        journal: Where to; None for a server that nothing outlives.
        each: How things are encoded of which there may be thousands, by kind.
        every: How all things of a kind are encoded, of which there are a few.
    """

    def __init__(self, journal: Journal | None, each: Mapping[str, Encode], every: Mapping[str, EncodeAll]) -> None:
        self._journal = journal
        self._each, self._every = each, every
        self._written: dict[str, set[str]] = {kind: set() for kind in every}
        for name in journal.values if journal is not None else ():
            kind, _, rest = name.partition("/")
            if kind in every:
                self._written[kind].add(rest)
        self._touched: set[str] = set()
        self._kinds: set[str] = set()
        self._after: list[Callable[[], None]] = []
        self._soon = False

    def reserve(self, size: int = 0) -> None:
        """Make sure that a request which adds so many bytes can be written down.

        Raises:
            JournalUnavailable: It cannot: the request has to be refused.
        """
        if self._journal is not None:
            self._journal.reserve(size)

    def size(self, name: str) -> int:
        """Bytes of what is written of one thing, or of all things of a kind: a change writes them again."""
        if self._journal is None:
            return 0
        names = [name] if "/" in name else [f"{name}/{rest}" for rest in self._written[name]]
        return sum(len(self._journal.values.get(one, b"")) for one in names)

    def touch(self, *names: str) -> None:
        """Things may have changed: one each by ``kind/name``, or all of a kind by its name alone."""
        for name in names:
            (self._touched if "/" in name else self._kinds).add(name)
        self._write_soon()

    def after(self, then: Callable[[], None]) -> None:
        """Do something once all that has changed so far is written."""
        self._after.append(then)
        self._write_soon()

    def write(self) -> None:
        """Write what has changed.

        Raises:
            JournalUnavailable: It could not be written; it is with the next try.
        """
        if self._journal is None:
            self._touched.clear()
            self._kinds.clear()
        else:
            if changes := self._changes(self._journal.values):
                self._journal.append(changes, synced=not all(name.startswith(UNSYNCED) for name in changes))
            self._journal.catch_up()
        then, self._after = self._after, []
        for do in then:
            do()

    def _changes(self, written: Values) -> dict[str, bytes | None]:
        changes: dict[str, bytes | None] = {}
        for name in self._touched:
            kind, _, rest = name.partition("/")
            changes.update(self._each[kind](rest, written))
        for kind in self._kinds:
            now = self._every[kind]()
            changes.update({f"{kind}/{rest}": value for rest, value in now.items()})
            changes.update({f"{kind}/{rest}": None for rest in self._written[kind] - now.keys()})
            self._written[kind] = set(now)
        self._touched.clear()
        self._kinds.clear()
        return {name: value for name, value in changes.items() if written.get(name) != value}

    def _write_soon(self) -> None:
        """What no reply waits for is written as soon as the event loop comes to it."""
        if not self._soon:
            self._soon = True
            asyncio.get_running_loop().call_soon(self.write_if_possible)

    def write_if_possible(self) -> None:
        """Write what has changed; what cannot be written is tried again soon."""
        self._soon = False
        try:
            self.write()
        except JournalUnavailable as error:
            log.error("%s", error)  # nobody waits for it; a request is refused until the journal can be written again
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().call_later(1.0, self._write_soon)
