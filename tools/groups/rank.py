"""One rank of a simulated engine: a process that does what an adapter's rank does, with the same parts of the core, on 64 KiB of weights."""

from __future__ import annotations

import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gms_core.vmm.host  # noqa: F401 - once, before ranks are forked: hundreds of them share the processors of one machine here
from gms_core.client import ReadLease, WriteLease, connect
from gms_core.devices import HOST
from gms_core.engine_config import GmsConfig
from gms_core.failover.cohort import take_place
from gms_core.kv import planning
from gms_core.kv.rank import RankKv
from gms_core.kv.retained import RetainedKv
from gms_core.layout import Identity
from gms_core.vmm import open_driver
from gms_core.weights.leases import acquire

WEIGHTS_BYTES = 2**16
KV_BYTES = 2**18
ALIAS_BYTES = 2**16


class Rank:
    """It is told what to do over a pipe, by its engine's first process, which is also the way to its mates (`gms_core.ranks.Ranks`)."""

    def __init__(self, number: int, size: int, tag: str, socket: Path, pipe: Connection) -> None:
        self.rank_in_group, self._tag, self._socket, self._pipe = number, tag, socket, pipe
        self._weights = Identity({"content": "simulated", "rank": f"{number}/{size}"})
        self._lease: ReadLease | WriteLease | None = None
        self._kv: RankKv | None = None

    def obey(self) -> None:
        """Do what is asked, until nobody asks any more."""
        while True:
            try:
                name, arguments = self._pipe.recv()
            except EOFError:
                return
            try:
                self._pipe.send(("done", getattr(self, name)(*arguments)))
            except Exception:  # noqa: BLE001 - it is told to whoever has asked
                self._pipe.send(("failed", traceback.format_exc()))

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Give every rank the objects of all."""
        self._pipe.send(("says", obj))
        said: list[Any] = self._pipe.recv()
        return said

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        """Give every rank the object of one."""
        return self.all_gather_object(obj)[src]

    def connect(self) -> None:
        """Open the session for weights, and join the cohort."""
        self._session = connect(socket_path=self._socket, client=f"rank {self.rank_in_group}")
        take_place(f"rank {self.rank_in_group}", [self._socket], serves=False, connect_timeout_s=30.0)

    def lease(self) -> str:
        """Get a lease with the others, to write or to read; returns which."""
        options = GmsConfig()
        self._lease = acquire(self._session, f"{self._tag}.weights.{self.rank_in_group}", self._weights, options, lambda: self).lease
        return "rw" if isinstance(self._lease, WriteLease) else "ro"

    def publish(self) -> None:
        """Write some weights, and publish them."""
        assert isinstance(self._lease, WriteLease)
        arena = self._lease.arena
        self._session.driver.write(arena.address(arena.allocate(WEIGHTS_BYTES)), bytes([self.rank_in_group % 256]) * WEIGHTS_BYTES)
        self._lease = self._lease.commit(b"", self._weights)

    def attach(self) -> None:
        """Map what is published, and look whether it is this rank's."""
        assert isinstance(self._lease, ReadLease)
        arena = self._lease.map()
        found = self._session.driver.read(arena.base, 1)[0]
        if found != self.rank_in_group % 256:
            raise AssertionError(f"rank {self.rank_in_group} has the weights of rank {found}")

    def stand_by(self) -> None:
        """Get KV memory, on scratch until the promotion."""
        session = connect(socket_path=self._socket, client=f"rank {self.rank_in_group} (kv)")
        pool = f"{self._tag}.kv.{self.rank_in_group}"
        begun = planning.begin(session, pool, self._weights, tag=self._tag, rank=self.rank_in_group, ranks=self, timeout_s=60.0)
        with begun.given_up_on_failure():
            memory = RetainedKv(open_driver(HOST), lambda *_: None, (KV_BYTES,), ALIAS_BYTES)
            self._kv = RankKv(begun, memory, 0, asleep=lambda: False)
            self._kv.initialise([], 1, "simulated", measured=KV_BYTES, explicit=True, memory_timeout_s=60.0)

    def promote(self) -> int:
        """Have the KV memory; returns its epoch."""
        assert self._kv is not None
        return self._kv.promote(60.0).epoch
