"""The memory of this rank: what GMS has placed, and whether it can be computed on now. A scheduler's process has one."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence

from gms_core.engine_config import FailoverConfig, GmsConfig
from gms_core.errors import NotPromoted
from gms_core.failover.config import failover_config
from gms_core.kv.planning import KvPlanning
from gms_core.kv.private import PrivateKv
from gms_core.kv.rank import RankKv
from gms_core.kv.retained import RetainedKv
from gms_core.layout import Identity
from gms_core.pytorch.kv import clearing
from gms_core.sleep import KvMemory, Sleeper
from gms_core.vmm import open_driver
from gms_core.vmm.driver import Driver
from gms_core.weights import holdings
from gms_sglang.arguments import argument
from gms_sglang.load_format import asks_for_gms
from gms_sglang.place import device_id, torch_device
from gms_sglang.unsupported import engine_options


class Rank:
    """What a rank computes on, besides what PyTorch allocates.

    Attributes:
        weights: Identity of the weights that the engine loads; None before that, and without failover.
        planning: What this rank has to do for its pool of KV memory; None before the engine asks for it, and without failover.
        kv: Its KV memory, if the engine fails over; None before the cache is made.
    """

    def __init__(self) -> None:
        self.weights: Identity | None = None
        self.planning: KvPlanning | None = None
        self.kv: RankKv | None = None
        self._private: PrivateKv | None = None
        self._sleeper = Sleeper()

    @functools.cached_property
    def _driver(self) -> Driver:
        return open_driver(device_id())

    @property
    def asleep(self) -> frozenset[str]:
        """What of it is unmapped now."""
        return self._sleeper.asleep

    def place_private(self, size: int) -> int | None:
        """The address of memory of this rank's own, which is zero, now and after each wake-up; None for memory of PyTorch's.

        That is for what is smaller than memory comes in, and for engines whose KV memory other machines or processes read: they would have to be
        able to register it.
        """
        if str(argument("disaggregation_mode") or "null") != "null":
            return None
        if size < self._driver.granularity:
            return None
        if self._private is None:
            self._private = PrivateKv(self._driver, clearing(torch_device()), options().memory_timeout_s)
        return self._private.place(size)

    def hold_retained(self, buffers: Sequence[int], failover: FailoverConfig) -> RetainedKv:
        """Make addresses for the values of the KV cache, which lie on scratch until this rank is promoted.

        Args:
            buffers: Bytes of each buffer.
            failover: How the engine fails over.
        """
        assert self.planning is not None
        memory = RetainedKv(self._driver, clearing(torch_device()), buffers, failover.alias_bytes)
        # No bridge: SGLang's allocator gives out any page, and is not told to keep to the first ones.
        self.kv = RankKv(self.planning, memory, 0, asleep=lambda: bool(self.asleep))
        return memory

    def check_ready(self) -> None:
        """Make sure that something can be computed.

        Raises:
            EngineAsleep: A part of the memory is not mapped.
            NotPromoted: The KV memory is scratch.
        """
        self._sleeper.check_awake()
        if self.kv is not None and not self.kv.may_compute(scheduled=False):
            raise NotPromoted(
                "this engine is a shadow: its KV memory is scratch, and a request would be answered with nonsense",
                hint="It answers once it is promoted.",
            )

    def suspend(self, tags: Collection[str]) -> None:
        """As `gms_core.sleep.Sleeper.suspend`."""
        self._refresh()
        self._sleeper.suspend(tags)

    def resume(self, tags: Collection[str]) -> None:
        """As `gms_core.sleep.Sleeper.resume`."""
        self._refresh()
        self._sleeper.resume(tags)

    def _refresh(self) -> None:
        parts: list[KvMemory | None] = [self._private, None if self.kv is None else self.kv.memory]
        self._sleeper.kv = [part for part in parts if part is not None]
        self._sleeper.weights = holdings.all_kept()


@functools.cache
def this_rank() -> Rank:
    """The memory of this process."""
    return Rank()


def options() -> GmsConfig:
    """What the user says to GMS for this engine."""
    return engine_options(argument("model_loader_extra_config")).gms


def failover() -> FailoverConfig | None:
    """How this engine fails over, if it does: only one whose own weights come through GMS can."""
    return failover_config(options()) if asks_for_gms(argument("load_format")) else None
