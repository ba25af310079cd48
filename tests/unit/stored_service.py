"""A service of which systemd keeps the memory, as far as its supervisor is a keeper; and what is kept."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from gms_core.devices import DeviceId
from gms_core.keeper.connection import Keeper
from gms_core.keeper.keeping import Keeping
from gms_core.runtime_dir import keeper_path, socket_path
from tests.conftest import keepers
from tests.unit.service_manager_stand_in import StandIn
from tests.unit.test_keeper import until

A, B = DeviceId("GPU-a"), DeviceId("GPU-b")
NEVER = -1
_SUPERVISOR = """
import os, signal, sys
from pathlib import Path
from gms_core.server.own_keepers import OwnKeepers
from gms_core.service_manager import ServiceManager

directory, steps, *devices = sys.argv[1:]
deliver, left = ServiceManager.deliver, int(steps)

def deliver_or_die(manager, notes, deadline=None):
    global left
    if left:
        if Path(directory, "deaf").exists():
            raise TimeoutError("its queue is full")
        deliver(manager, notes, deadline)
        left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

ServiceManager.deliver = deliver_or_die
manager = ServiceManager()
keepers = OwnKeepers(devices, Path(directory), manager)
for device in devices:
    keepers.begin(device)
manager.tell("READY=1")
signal.pause()
"""


class Service:
    """The supervisor as far as it is a keeper; the devices' servers are this process."""

    def __init__(self, systemd: StandIn, directory: Path) -> None:
        self.systemd, self.directory = systemd, directory
        self._connected: list[Keeper] = []

    def start(self, *devices: DeviceId, steps: int = NEVER) -> None:
        """Start it; it is killed as soon as it has told systemd so many things."""
        process = self.systemd.start([sys.executable, "-c", _SUPERVISOR, str(self.directory), str(steps), *devices])
        if steps == NEVER:
            self.systemd.wait_until_told("READY=1")
            return
        said = process.communicate(timeout=20)[1]
        assert process.returncode == -signal.SIGKILL, said
        self.systemd.service = None

    def start_and_put_nothing(self, *devices: DeviceId) -> None:
        """Start it; it would be killed if it told systemd anything."""
        self.systemd.start([sys.executable, "-c", _SUPERVISOR, str(self.directory), "0", *devices])
        self.systemd.wait_until_told("READY=1")

    def connect(self, device: DeviceId = A, patience_s: float | None = None, *, stored: bool = True) -> Keeper:
        self._connected.append(Keeper(self.path(device), patience_s, stored=stored))
        return self._connected[-1]

    def path(self, device: DeviceId = A) -> Path:
        return keeper_path(socket_path(device, self.directory))

    def kept(self, device: DeviceId = A) -> list[str]:
        return sorted(self.connect(device).names())

    def close(self) -> None:
        for one in self._connected:
            one.close()
        for pid in keepers(self.directory):
            os.kill(pid, signal.SIGKILL)
        until(lambda: keepers(self.directory) == [])


@contextlib.contextmanager
def files(*names: str) -> Iterator[dict[str, int]]:
    made = {name: os.memfd_create("memory") for name in names}
    try:
        yield made
    finally:
        for number in made.values():
            os.close(number)


def memory(*numbers: int) -> list[str]:
    return [f"memory/{number}/4096" for number in numbers]


def of(device: DeviceId, *names: str) -> list[str]:
    """What systemd has of a device with such memory."""
    return [f"{device}/{name}" for name in sorted(["label", "socket", *names])]


def keep(keeper: Keeper | Keeping, *names: str) -> None:
    with files(*names) as descriptors:
        keeper.keep(descriptors)
