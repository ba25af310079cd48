"""The supervisor as the keeper of its devices, backed by systemd: begins with what systemd has passed, or with what a keeper process still has."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from gms_core.devices import DeviceId
from gms_core.errors import KeeperLost
from gms_core.keeper.connection import Keeper, listen, listens_at
from gms_core.keeper.store import DescriptorStore, Room, check
from gms_core.keeper.stored import StoredKeeper, label_file
from gms_core.protocol.framing import batches, close_descriptors
from gms_core.runtime_dir import keeper_path, socket_path
from gms_core.server.ownership import owned
from gms_core.service_manager import ServiceManager
from gms_core.vmm.undo import UndoStack

log = logging.getLogger(__name__)

LABEL, SOCKET = "label", "socket"
"""What is kept beside memory, once for each device and from its first start on: so there is always room for both."""
_NAME = re.compile(rf"[^/]+/(memory/[0-9]+/[0-9]+|{LABEL}|{SOCKET})")
_Passed = list[tuple[str, int]]
"""What systemd has passed for one device: names, and descriptors that are the list's."""


class OwnKeepers:
    """The keepers of this process's devices, each from the first start of its device's server on.

    Args:
        devices: Which ones. What systemd has of others stays there.
        directory: The runtime directory, prepared.
        manager: What it has passed is taken from it.

    Raises:
        ConfigurationError: systemd keeps nothing for this process.
    """

    def __init__(self, devices: Sequence[DeviceId], directory: Path, manager: ServiceManager) -> None:
        check(manager)
        passed, room = _take(manager)
        for device in sorted(passed.keys() - set(devices)):
            log.warning("%s is not served: systemd still has %d descriptors of it, until the service is stopped", device, len(passed[device]))
            close_descriptors(number for _, number in passed[device])
        self._directory = directory
        self._waiting = {device: _Estate(passed.get(device, []), manager, room, device) for device in devices}

    def begin(self, device: DeviceId) -> None:
        """Become the keeper of a device, unless this is it already. Its server is to be started after this.

        If it raises, systemd has what it had of the device, and this can be called again.

        Raises:
            ServerUnavailable: The device has a server, or systemd has its memory for another service.
            QuotaExceeded: There is no room for what a keeper process has, or for a device that was not there before.
            KeeperLost: systemd does not answer, or a socket cannot be made.
            PermissionRefused: The keeper there is another user's.
        """
        if device in self._waiting:
            path = socket_path(device, self._directory)
            try:
                with owned(path):
                    self._waiting[device].begin(keeper_path(path)).start()
            except OSError as error:
                raise KeeperLost(f"this process cannot be the keeper of {device}: {error.strerror or error}") from error
            del self._waiting[device]


def discard_store(manager: ServiceManager) -> None:
    """Give up what systemd has kept: keepers are processes now, and what nobody takes back would be kept for ever."""
    if manager.passed:
        log.warning("systemd has kept %d descriptors, and --keeper systemd was not given: they are given up", len(manager.passed))
        manager.discard({name for name, _ in manager.passed})


def _take(manager: ServiceManager) -> tuple[dict[DeviceId, _Passed], Room]:
    """What was passed, by device, and how much room there is. What nobody has named so is closed, here and there."""
    names = [name for name, _ in manager.passed]
    if strange := {name for name in names if not _NAME.fullmatch(name)}:
        log.warning("systemd has kept %d descriptors with names that nobody gave: they are given up", len(strange))
        if manager.discard(strange):
            names = [name for name, _ in manager.passed]
    found: defaultdict[DeviceId, _Passed] = defaultdict(list)
    for full, number in manager.passed:
        device, _, name = full.partition("/")
        found[DeviceId(device)].append((name, number))
    manager.passed = []
    return found, Room(manager.told.most, names)


class _Estate:
    """What a device's keeper begins with: what systemd has passed of it, and has until it is told otherwise."""

    def __init__(self, passed: _Passed, manager: ServiceManager, room: Room, device: DeviceId) -> None:
        times = Counter(name for name, _ in passed)
        close_descriptors(number for name, number in passed if times[name] > 1)  # nobody could tell which one is meant
        self._kept = {name: number for name, number in passed if times[name] == 1}
        self._store = DescriptorStore(manager, room, device, [name for name, _ in passed])

    def begin(self, path: Path) -> StoredKeeper:
        """Make the keeper that listens at a path. If it raises, this can be called again: nothing is lost that a journal may believe in."""
        if LABEL not in self._kept:
            self._close([name for name in self._kept if name != SOCKET])  # no journal believes in it, and the label may need its room
        if SOCKET in self._kept and not self._listens_at(path):
            self._close([SOCKET])
        self._store.remove_all_but(self._kept)  # what was closed, and what an earlier try has left
        process = None if SOCKET in self._kept else _process(path)
        return self._go_on(path) if process is None else self._move(process, path)

    def _go_on(self, path: Path) -> StoredKeeper:
        with UndoStack() as undo:
            new = {} if LABEL in self._kept else {LABEL: label_file("")}
            undo.push(close_descriptors, new.values())
            if SOCKET in self._kept:
                self._store.put(new)
                listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, fileno=self._kept.pop(SOCKET))
            else:
                listening = self._listen(path, new)
            undo.commit()
        kept = {**self._kept, **new}
        return StoredKeeper(listening, self._store, kept, kept.pop(LABEL))

    def _move(self, process: Keeper, path: Path) -> StoredKeeper:
        """Take everything from a keeper process. Until the last step it has all of it, and is asked again by the next try, or the next start."""
        with UndoStack() as undo:
            undo.push(process.close)
            self._close(list(self._kept))
            self._store.remove_all_but(())
            kept, label = process.kept(), label_file(process.label)
            undo.push(close_descriptors, [*kept.values(), label])
            for piece in batches(list(kept.items())):
                self._store.put(dict(piece))
            listening = self._listen(path, {LABEL: label})
            undo.commit()
        process.end()
        log.info("the keeper process of %s has left %d allocations to systemd", self._store.device, len(kept))
        return StoredKeeper(listening, self._store, kept, label)

    def _listens_at(self, path: Path) -> bool:
        """Whether whoever looks for the keeper comes to the socket on which the last supervisor listened."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, fileno=os.dup(self._kept[SOCKET])) as listening:
            return listens_at(listening, path)

    def _listen(self, path: Path, new: Mapping[str, int]) -> socket.socket:
        """Listen in the place of whoever did. The store has the socket before clients see it: by it they see whether another server may follow."""
        return listen(path, lambda descriptor: self._store.put({**new, SOCKET: descriptor}))

    def _close(self, names: Sequence[str]) -> None:
        close_descriptors([self._kept.pop(name) for name in names])


def _process(path: Path) -> Keeper | None:
    try:
        return Keeper(path)
    except KeeperLost:
        return None
