"""A real vLLM shadow that serves from the first blocks of its KV memory while a process of the last engine is still exiting."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from types import SimpleNamespace
from typing import Any

import pytest
from failover_story import Client, Running, Story, until

from tests.ports import free_port
from tests.unit.engine_processes import EngineProcess

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

BRIDGE = {"bridge_bytes": 4 * 2**20}
STRAGGLER_BYTES = 2**30
"""Memory of a process that the kernel needs longer to end than an API server."""


def test_shadow_serves_rightly_from_its_bridge_and_then_from_all_blocks(story: Story) -> None:
    port = free_port()
    client = Client(story.model, port)
    with contextlib.ExitStack() as engines:

        def start(name: str, **failover: Any) -> Running:
            return engines.enter_context(story.engine(name, "--port", str(port), failover=failover))

        running = start("engine-0", **BRIDGE)
        story.until_role(running, "primary")
        right = client.tokens()
        _until_whole(running)
        # The third one wants no bridge: it takes over from engines that have one.
        for number, options in enumerate((BRIDGE, BRIDGE, {}), 1):
            shadow = start(f"engine-{number}", **options)
            story.until_role(shadow, "standby")
            straggler = EngineProcess(story.server.socket, _cohort(story, running), "rank 9")
            try:
                straggler.ask("fatten", STRAGGLER_BYTES)
                os.killpg(running.process.pid, signal.SIGKILL)
                story.until_role(shadow, "primary")
                assert client.tokens() == right
                if options:
                    _until_whole(shadow)
                assert client.tokens() == right
                assert story.primaries() == [shadow.name]
                assert straggler.wait() == -signal.SIGKILL
            finally:
                straggler.end()
            running.until_gone()
            running = shadow


def _cohort(story: Story, running: Running) -> str:
    seen = story.seen(running)
    assert seen is not None
    return seen.cohort


def _until_whole(running: Running) -> None:
    until(lambda: re.search(r"all \d+ blocks of the KV cache can be used", running.log.read_text()), f"{running.name} has not got all blocks")


class Core:
    """An engine core, as far as it gives out blocks; the pool is vLLM's own."""

    def __init__(self, blocks: int, *, caching: bool = True) -> None:
        from vllm.v1.core.block_pool import BlockPool

        self.pool = BlockPool(blocks, caching, 16)
        self.scheduler = SimpleNamespace(kv_cache_manager=SimpleNamespace(block_pool=self.pool))
        self.proofs = [("waiting", ""), ("proven", "")]
        self.awake = True
        self.asked: list[str] = []

    def collective_rpc(self, method: str) -> list[Any]:
        self.asked.append(method)
        return self.proofs if method == "gms_proven" else [True, self.awake]


@pytest.mark.parametrize("caching", [False, True])
def test_no_other_block_is_given_out_before_all_may_be_used(caching: bool) -> None:
    from gms_vllm import block_supply

    core = Core(100, caching=caching)
    assert block_supply.withhold(core, 10)
    assert block_supply.withhold(core, 10)
    pool = core.pool
    assert (pool.get_num_free_blocks(), pool.num_gpu_blocks) == (9, 10)
    taken = pool.get_new_blocks(9)
    assert {block.block_id for block in taken} == set(range(1, 10))
    with pytest.raises(ValueError, match="free blocks"):
        pool.get_new_blocks(1)
    assert pool.get_usage() == 1.0
    pool.free_blocks(taken[:4])
    assert pool.get_num_free_blocks() == 4

    assert block_supply.give_all(core) == ("waiting", "")
    assert core.asked == ["gms_proven"], "memory is mapped before every rank may"
    core.proofs[0] = ("failed", "it cannot be ended")
    assert block_supply.give_all(core) == ("failed", "it cannot be ended")
    core.proofs[0], core.awake = ("proven", ""), False
    assert block_supply.give_all(core) == ("asleep", "")
    assert pool.num_gpu_blocks == 10, "blocks of memory that is not mapped"
    core.awake = True
    assert block_supply.give_all(core) == block_supply.give_all(core) == ("whole", "")
    assert (pool.get_num_free_blocks(), pool.num_gpu_blocks) == (94, 100)
    rest = pool.get_new_blocks(94)
    assert {block.block_id for block in (*rest, *taken[4:])} == set(range(1, 100))
    pool.free_blocks([*rest, *taken[4:]])
    assert pool.reset_prefix_cache()


def test_cache_counts_as_empty_while_blocks_are_withheld() -> None:
    from gms_vllm import block_supply

    core = Core(100)
    assert block_supply.withhold(core, 10)
    assert core.pool.reset_prefix_cache()
    assert core.pool.get_usage() == 0.0


@pytest.mark.parametrize("blocks", [0, 1, 101])
def test_there_is_no_bridge_when_it_is_none_of_the_pool(blocks: int) -> None:
    from gms_vllm import block_supply

    core = Core(100)
    assert not block_supply.withhold(core, blocks)
    assert (core.pool.get_num_free_blocks(), core.pool.num_gpu_blocks) == (99, 100)
    assert block_supply.give_all(core) == ("whole", "")


@pytest.mark.parametrize("what", ["in use", "cached"])
def test_there_is_no_bridge_when_a_block_behind_it_is_not_idle(what: str) -> None:
    from gms_vllm import block_supply

    core = Core(100)
    taken = core.pool.get_new_blocks(50)
    if what == "cached":
        core.pool.free_blocks(taken)
        core.pool.blocks[40]._block_hash = b"of a request"
    assert not block_supply.withhold(core, 10)
    assert core.pool.num_gpu_blocks == 100


def test_there_is_no_bridge_when_the_scheduler_has_no_block_pool_or_several() -> None:
    from gms_vllm import block_supply

    core = Core(100)
    for manager in (None, SimpleNamespace(), SimpleNamespace(block_pool=core.pool, coordinator=SimpleNamespace(gpu_pool=object()))):
        core.scheduler = SimpleNamespace(kv_cache_manager=manager)
        assert not block_supply.withhold(core, 10)
