"""Takes over what the server before has left: its journal, and the memory that a keeper has."""

from __future__ import annotations

import functools
import logging
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from gms_core.errors import JournalDamaged
from gms_core.keeper.connection import Keeper
from gms_core.keeper.keeping import Keeping
from gms_core.runtime_dir import journal_path, keeper_path
from gms_core.server.journal import Journal
from gms_core.server.memory import of_kept_name
from gms_core.server.state import State, read
from gms_core.vmm.driver import Descriptor

log = logging.getLogger(__name__)


@dataclass
class Estate:
    """What a server begins with.

    Attributes:
        allocations: Descriptor, which is the estate's until somebody takes it, and bytes, by number.
    """

    keeping: Keeping
    journal: Journal
    state: State
    allocations: dict[int, tuple[Descriptor, int]]

    def leave(self) -> None:
        """Leave everything to the next server."""
        self.journal.close()
        self.keeping.close()

    def end(self) -> None:
        """There is no next server: the memory goes."""
        self.journal.remove()
        self.keeping.end()


def take_over(socket_path: Path, device: str, patience_s: float | None) -> Estate:
    """Find what the last server of a socket has left, or begin anew. The caller owns the socket's lock.

    Args:
        socket_path: Of the server.
        device: Its device.
        patience_s: Seconds without a server after which the keeper gives the memory up; None if the supervisor is the keeper.

    Raises:
        KeeperLost: There is no keeper, and none can be started.
        ServerUnavailable: Systemd has the memory for another service.
        JournalUnavailable: The journal cannot be read or written.
        VersionMismatch: A later version has left what this one would not understand. It is left as it is.
    """
    path = keeper_path(socket_path)
    find = functools.partial(Keeper, path, patience_s, stored=patience_s is None)
    keeper = find()
    try:
        journal, state = _journal(journal_path(socket_path), device, keeper.label)
        found = keeper.kept()
        kept = {of_kept_name(name)[0]: (name, number) for name, number in found.items()}
        if missing := state.allocations.keys() - kept.keys():
            log.error("the keeper of %s lacks %d allocations: what is left of them is given up", device, len(missing))
            state = read(journal.values, device, "")
        unknown = [entry for identifier, entry in kept.items() if identifier not in state.allocations]
        for _, number in unknown:
            os.close(number)
        keeper.drop([name for name, _ in unknown])
        label = keeper.label if state.with_memory else secrets.token_hex(16)
        if label != keeper.label:
            keeper.set_label(label)
    except BaseException:
        if keeper.new:
            keeper.end()  # nobody would come back for it
        keeper.close()
        raise
    allocations = {identifier: (Descriptor(kept[identifier][1]), size) for identifier, size in state.allocations.items()}
    return Estate(Keeping(keeper, find, label), journal, state, allocations)


def _journal(path: Path, device: str, label: str) -> tuple[Journal, State]:
    try:
        journal = Journal(path)
    except JournalDamaged as error:
        log.error("%s: it is put aside, and everything begins anew", error.message)
        journal = Journal.replacing(path)
    try:
        return journal, read(journal.values, device, label)
    except JournalDamaged as error:
        log.error("%s: it is put aside, and everything begins anew", error.message)
        journal.close()
        return Journal.replacing(path), State()
    except BaseException:
        journal.close()
        raise
