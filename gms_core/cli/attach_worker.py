"""A fresh process that attaches once and prints how long each step took: ``python -m gms_core.cli.attach_worker KIND SOCKET POOL``.

``attach`` is what an engine does, through the client. ``bare`` is the driver alone: the same memory from descriptors that are here already,
with as few calls as there can be, which is the limit that no client can beat on this machine.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from gms_core.cli.refusal import as_dict
from gms_core.client import ReadLease, Session, connect
from gms_core.client.arena import Received
from gms_core.errors import GmsError, ProtocolError
from gms_core.layout import Identity
from gms_core.protocol.framing import close_descriptors
from gms_core.protocol.messages import Export
from gms_core.vmm import open_driver
from gms_core.vmm.driver import Access, Address, Descriptor

PHASES = {
    "connect": "socket and handshake",
    "acquire": "read lease and layout, one round trip",
    "export": "descriptors, one round trip",
    "reserve": "virtual addresses",
    "import": "descriptors to handles",
    "map": "handles to addresses",
    "access": "set access",
    "rest": "everything else",
}
CALLS = {"reserve": "reserve", "import_descriptor": "import", "map": "map", "set_access": "access"}
IDENTITY = Identity({"model": "gms bench attach"})
STAMP = b"attached"

Times = dict[str, float]


class Stopwatch:
    """Adds up the seconds that calls take, by phase; a call within a call counts for its own phase alone."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._within = 0.0

    def watch(self, owner: object, method: str, phase: str) -> None:
        """Time every call of a bound method, of this one object."""
        call = getattr(owner, method)

        def timed(*args: object, **kwargs: object) -> object:
            return self.time(phase, lambda: call(*args, **kwargs))

        setattr(owner, method, timed)

    def time(self, phase: str, call: Callable[[], object]) -> object:
        """Time one call."""
        outside, self._within = self._within, 0.0
        started = time.perf_counter()
        try:
            return call()
        finally:
            spent = time.perf_counter() - started
            self.seconds[phase] += spent - self._within
            self._within = outside + spent


def attach(socket: Path, pool: str) -> Times:
    """Attach as an engine does, from no connection to mapped memory."""
    _warm(socket)
    watch = Stopwatch()
    started = time.perf_counter()
    with connect(socket_path=socket, client="gms bench attach") as session:
        watch.seconds["connect"] = time.perf_counter() - started
        driver = session.driver
        for method, phase in CALLS.items():
            watch.watch(driver, method, phase)
        watch.watch(session, "receive_allocations", "export")
        before = time.perf_counter()
        with _lease(session, pool) as lease:
            watch.seconds["acquire"] = time.perf_counter() - before
            arena = lease.map()
            total = time.perf_counter() - started
            _verify(session, arena.base, lease.layout.size)
    watch.seconds["rest"] = total - sum(watch.seconds.values())
    return {**watch.seconds, "total": total}


def bare(socket: Path, pool: str) -> Times:
    """Map descriptors that were received before the clock starts."""
    watch = Stopwatch()
    with connect(socket_path=socket, client="gms bench attach (bare driver)") as session, _lease(session, pool) as lease:
        driver, layout = session.driver, lease.layout
        received: list[Received] = []
        session.receive_allocations(Export(pool), lambda some: received.extend(_with_own_descriptors(some)))
        for method, phase in CALLS.items():
            watch.watch(driver, method, phase)
        started = time.perf_counter()
        base = driver.reserve(layout.extent)
        handles = [driver.import_descriptor(item.descriptor, item.size) for item in received]
        for allocation, handle in zip(layout.allocations, handles, strict=True):
            driver.map(Address(base + allocation.offset), allocation.size, handle)
        driver.set_access(base, layout.extent, Access.READ)
        total = time.perf_counter() - started
        close_descriptors(item.descriptor for item in received)
        _verify(session, base, layout.size)
        driver.unmap(base, layout.extent)
        for handle in handles:
            driver.release(handle)
        driver.free_reservation(base, layout.extent)
    watch.seconds["rest"] = total - sum(watch.seconds.values())
    return {**watch.seconds, "total": total}


def _with_own_descriptors(received: Sequence[Received]) -> list[Received]:
    return [Received(item.id, item.size, Descriptor(os.dup(item.descriptor))) for item in received]


def _warm(socket: Path) -> None:
    """Load the driver's library and initialise it: an engine has done so long before it attaches."""
    with connect(socket_path=socket, client="gms bench attach (initialising)") as session:
        open_driver(session.device).close()


def _lease(session: Session, pool: str) -> ReadLease:
    lease = session.acquire(pool, "ro", IDENTITY, timeout_s=10.0)
    if not isinstance(lease, ReadLease):
        raise ProtocolError("the server gave a write lease to a reader")
    return lease


def _verify(session: Session, base: Address, size: int) -> None:
    """Outside the clock: what is mapped is what was published, at both ends."""
    for address in (base, Address(base + size - len(STAMP))):
        found = session.driver.read(address, len(STAMP))
        if found != STAMP:
            raise ProtocolError(f"the mapped memory holds {found!r} where {STAMP!r} was published")


def main(arguments: list[str]) -> int:
    """Measure once and print one line of JSON."""
    kind, socket, pool = arguments
    measure = {"attach": attach, "bare": bare}[kind]
    try:
        click.echo(json.dumps({"seconds": measure(Path(socket), pool)}))
    except GmsError as error:
        click.echo(json.dumps({"error": as_dict(error)}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
