"""A pool of KV memory in the process of a test, for what needs no server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from gms_core.client.arena import Received, Take
from gms_core.errors import AcquireTimeout
from gms_core.layout import Allocation, Identity
from gms_core.protocol.framing import close_descriptors
from gms_core.protocol.messages import Held, Planned
from gms_core.vmm.driver import Address
from gms_core.vmm.host import HostDriver


def do_nothing(address: Address, size: int) -> None:
    """What has to be done to make fresh memory of this device zero."""


class Pool:
    """A pool of which the front may be all that is held at first.

    Attributes:
        whole: Whether all of it is granted at once.
        proven: Whether the rest may be mapped.
    """

    name = "kv"

    def __init__(self, driver: HostDriver) -> None:
        self.driver, self.whole = driver, False
        self.proven = threading.Event()
        self.proven.set()
        self.planned: Planned | None = None
        self.released = False
        self._handles: dict[int, object] = {}

    def plan(self, identity: Identity, timeout_s: float, on_wait: Callable[[str], None] | None = None) -> Planned | None:
        return self.planned

    def provide(self, plan: bytes, sizes: Sequence[int], timeout_s: float, *, front: Sequence[int] = ()) -> Planned:
        offsets = [sum(sizes[:number]) for number in range(len(sizes))]
        allocations = [Allocation(number + 1, offsets[number], size) for number, size in enumerate(sizes)]
        spares = [Allocation(100 + index, offsets[index], sizes[index]) for index in front]
        self.planned = Planned(self.name, plan, tuple(allocations), 0, tuple(spares))
        self._handles = {one.id: self.driver.create(one.size) for one in (*allocations, *spares)}
        return self.planned

    def receive(self, take: Take) -> None:
        assert self.planned is not None
        for one in (*self.planned.allocations, *self.planned.spares):
            item = Received(one.id, one.size, self.driver.export(self._handles[one.id]))  # type: ignore[arg-type]
            take([item])
            close_descriptors([item.descriptor])

    def hold(self, timeout_s: float, on_wait: object = None, *, bridge: bool = False) -> Held:
        return Held(self.name, 5, 1, self.whole or not bridge)

    def await_whole(self, timeout_s: float) -> None:
        if not self.proven.wait(timeout_s):
            raise AcquireTimeout("rank 3 is still there")

    def release(self) -> None:
        self.released = True

    def close(self) -> None:
        """Give the memory back."""
        while self._handles:
            self.driver.release(self._handles.popitem()[1])  # type: ignore[arg-type]
