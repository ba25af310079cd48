"""The descriptors that systemd keeps for this service, and how much room there is: it never says that it has not kept one."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from gms_core import service_manager
from gms_core.errors import ConfigurationError, KeeperLost, QuotaExceeded
from gms_core.service_manager import ServiceManager, remove_note, store_note

log = logging.getLogger(__name__)

AGAIN_S = 1.0
"""Seconds that systemd has for what it is told again later in any case: a server waits for it, and has waited for other things before."""
AT_ONCE = 64
"""Removals that it is told of in one go. Those that it has seen are done, so that a slow one comes to an end as well."""
NAMES_BYTES = 128 * 1024 - len("LISTEN_FDNAMES=\0")
"""All names come to the next start in one variable, and the kernel takes none that is longer (MAX_ARG_STRLEN of execve(2)): the start would fail."""


class Room:
    """How many more descriptors systemd can keep, and pass to the next start. Safe to use from several threads.

    Args:
        most: How many it keeps.
        names: Of all that it has.
    """

    def __init__(self, most: int, names: Collection[str] = ()) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._count = len(names)
        self._bytes = _bytes(names)

    def take(self, names: Collection[str]) -> None:
        """Count names that are about to be there.

        Raises:
            QuotaExceeded: There is no room for all of them; none is counted then.
        """
        with self._lock:
            if self._count + len(names) > self._most:
                raise QuotaExceeded(
                    f"systemd's descriptor store has no room for {len(names)} more descriptors: it has {self._count} of {self._most}",
                    hint="Raise FileDescriptorStoreMax= of the unit, or use larger slabs.",
                )
            if self._bytes + _bytes(names) > NAMES_BYTES:
                raise QuotaExceeded(
                    f"systemd could not pass {self._count + len(names)} descriptors to the next start: their names are too long together",
                    hint="Use larger slabs.",
                )
            self._count += len(names)
            self._bytes += _bytes(names)

    def give_back(self, names: Collection[str]) -> None:
        """Names that were counted are not there any more."""
        with self._lock:
            self._count -= len(names)
            self._bytes -= _bytes(names)


class DescriptorStore:
    """The descriptors that systemd keeps for one device. For one thread at a time; the stores of several devices do not wait for one another.

    Whatever it is told takes less time than a keeper has for its answer.

    Args:
        manager: Of this service.
        room: What there is for all devices; what is there already is counted in it.
        device: Its names begin with it there.
        names: What is there already, one as often as it is there.
    """

    def __init__(self, manager: ServiceManager, room: Room, device: str, names: Iterable[str] = ()) -> None:
        self.device = device
        self._manager = manager
        self._room = room
        self._kept = Counter(names)
        self._doomed: set[str] = set()

    def put(self, descriptors: Mapping[str, int]) -> None:
        """Have descriptors kept, under names that are not there yet. They are kept when this returns, and none is if it raises.

        Args:
            descriptors: They stay the caller's as well.

        Raises:
            QuotaExceeded: There is no room for all of them.
            KeeperLost: systemd does not answer.
        """
        if not descriptors:
            return
        deadline = time.monotonic() + service_manager.WAIT_S
        try:
            self._remove_doomed(deadline)
            self._room.take([self._full(name) for name in descriptors])
            self._kept.update(descriptors.keys())
            self._doomed |= descriptors.keys()  # unless it is known that they have arrived
            self._manager.deliver(((store_note(self._full(name)), (number,)) for name, number in descriptors.items()), deadline)
        except OSError as error:
            raise KeeperLost(f"systemd cannot be given descriptors to keep: {error}") from error
        self._doomed -= descriptors.keys()

    def remove(self, names: Iterable[str]) -> None:
        """Have everything of these names closed; what cannot be now is closed when that is tried again, and before anything else is kept."""
        self._doomed |= {name for name in names if name in self._kept}
        self.try_again()

    def remove_all_but(self, names: Collection[str]) -> None:
        """Have everything closed that is not of these names, as `remove` does."""
        self.remove([name for name in self._kept if name not in names])

    def try_again(self) -> None:
        """Have everything closed that should have been, and could not be. Never raises, and takes little time."""
        try:
            self._remove_doomed(time.monotonic() + AGAIN_S)
        except OSError as error:
            log.warning("systemd cannot be told to close %d descriptors of %s: %s", len(self._doomed), self.device, error)

    def _remove_doomed(self, deadline: float) -> None:
        while names := sorted(self._doomed)[:AT_ONCE]:
            self._manager.deliver(((remove_note(self._full(name)), ()) for name in names), deadline)
            self._room.give_back([self._full(name) for name in names for _ in range(self._kept.pop(name))])
            self._doomed.difference_update(names)

    def _full(self, name: str) -> str:
        return f"{self.device}/{name}"


def _bytes(names: Iterable[str]) -> int:
    return sum(len(name) + 1 for name in names)


def check(manager: ServiceManager) -> None:
    """Check that systemd keeps descriptors for this process.

    Raises:
        ConfigurationError: It does not, or does not say how many.
    """
    if not manager.listens or not manager.told.main:
        raise ConfigurationError(
            "systemd keeps nothing for this process: it is not known to be the main process of a service that may notify it",
            hint="Run it as ExecStart= of a unit with Type=notify, without a shell or another program around it; or leave --keeper systemd out. "
            "Before version 248 systemd does not say which process is the main one.",
        )
    if not manager.told.most:
        raise ConfigurationError(
            "systemd does not say how many descriptors it keeps for this service: FDSTORE is not set",
            hint="Set FileDescriptorStoreMax= in the unit, and before systemd 254 also Environment=FDSTORE= with the same number.",
        )
