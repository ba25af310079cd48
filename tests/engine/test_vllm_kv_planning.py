"""How an engine that fails over comes to its budget, with vLLM's own classes and without an engine: identity, start-up checks, several ranks."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gms_core.engine_config import FailoverConfig, GmsConfig
from tests.conftest import RunningServer
from tests.unit.engine_processes import EngineProcess

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's imports warn about things that are not ours
    import vllm.v1.worker.gpu_worker as gpu_worker
    from vllm.engine.arg_utils import EngineArgs

    from gms_vllm import accounting
    from gms_vllm.kv_identity import kv_fields
    from gms_vllm.kv_plan import KvPlan

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

GIB = 2**30
BUDGETS = (777, 700)
"""Of two ranks, on devices that had not the same room."""


@dataclass
class Snapshot:
    """Of a device whose free memory changes between two measurements."""

    free: list[int]
    total_memory: int = 100 * GIB
    free_memory: int = field(init=False)
    device_: str = "a device"

    def __post_init__(self) -> None:
        self.measure()

    def measure(self) -> None:
        self.free_memory = self.free.pop(0)


def without_seam(init_snapshot: Any, cache_config: Any) -> int:
    """As vLLM had it before it knew of weights in other processes."""
    requested = math.ceil(init_snapshot.total_memory * cache_config.gpu_memory_utilization)
    if init_snapshot.free_memory < requested:
        raise ValueError("less than desired")
    return requested


@pytest.fixture(params=["seam", "no seam"])
def arguments(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """What vLLM passes beside the snapshot, with 10 GiB of shared weights."""
    monkeypatch.setattr(accounting, "external_bytes", lambda config, options: 10 * GIB)
    cache = SimpleNamespace(gpu_memory_utilization=0.5)
    if request.param == "seam":
        return cache, 10 * GIB
    monkeypatch.setattr(gpu_worker, "request_memory", without_seam)
    return (cache,)


def test_engine_needs_no_room_when_it_adopts_a_plan(arguments: tuple[Any, ...]) -> None:
    with accounting.startup_check(SimpleNamespace(), GmsConfig(), lambda: True):
        assert gpu_worker.request_memory(Snapshot([1 * GIB, 1 * GIB]), *arguments) == 40 * GIB


def test_room_is_measured_anew_when_the_engine_makes_the_plan(arguments: tuple[Any, ...]) -> None:
    with accounting.startup_check(SimpleNamespace(), GmsConfig(), lambda: False):
        assert gpu_worker.request_memory(Snapshot([1 * GIB, 41 * GIB]), *arguments) == 40 * GIB
        with pytest.raises(ValueError, match="ess than"):
            gpu_worker.request_memory(Snapshot([41 * GIB, 29 * GIB]), *arguments)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from models import write_model

    return write_model(tmp_path_factory.mktemp("model"), "llama")


def fields_of(model: Path, tag: str = "weights", lock: str = "gms:a", **arguments: Any) -> dict[str, str]:
    config = EngineArgs(model=str(model), dtype="float32", max_model_len=64, enforce_eager=True, **arguments).create_engine_config()
    return kv_fields(config, GmsConfig(tag=tag), FailoverConfig(lock=lock))


def test_identity_tells_engines_apart_when_their_blocks_would_differ(model: Path) -> None:
    plain = fields_of(model)
    assert fields_of(model, gpu_memory_utilization=0.3, kv_cache_memory_bytes=2**24, max_num_seqs=7) == plain
    for differing, arguments in (
        ("kv_block_size", {"block_size": 64}),
        ("kv_num_gpu_blocks_override", {"num_gpu_blocks_override": 9}),
        ("kv_enable_prefix_caching", {"enable_prefix_caching": False}),
        ("speculative", {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}}),
        ("weights", {"tag": "others"}),
        ("lock", {"lock": "gms:b"}),
    ):
        other = fields_of(model, **arguments)  # type: ignore[arg-type]
        assert other.get(differing) != plain.get(differing), differing


RANK = """
import json, sys
from pathlib import Path
import torch.distributed as dist
from gms_core.client import Membership, RetainedPool, connect
from gms_core.errors import GmsError
from gms_core.layout import Identity
from gms_vllm import kv_planning

class Group:
    # What vLLM's group of ranks has, on the same kind of process group.
    def __init__(self, rank):
        self.rank_in_group, self.world_size, self.cpu_group = rank, 2, dist.group.WORLD

    def broadcast_object(self, value, src):
        values = [value]
        dist.broadcast_object_list(values, src=src)
        return values[0]

socket, store, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
membership = Membership.join(connect(socket_path=Path(socket)), "two ranks", "two ranks", f"rank {rank}")
kv_planning.all_ranks = lambda: Group(rank)
planning = kv_planning.KvPlanning(RetainedPool(membership.session, f"kv.{rank}"), membership, rank)
try:
    kv_planning._agree(planning, Identity({"kind": "a"}), 30.0, "kv_cache")
    knew = planning.memory_bytes
    if knew is None:
        planning.share(100 + rank)
    print(json.dumps([planning.plan is not None, knew, planning.budgets]), flush=True)
except GmsError as error:
    print(json.dumps(error.code), flush=True)
sys.stdin.readline()
"""


def two_ranks(server: RunningServer, folder: Path) -> list[Any]:
    """What both ranks of an engine learn of their pools."""
    commands = [[sys.executable, "-c", RANK, str(server.socket), str(folder / "store"), str(rank)] for rank in (0, 1)]
    with subprocess.Popen(commands[0], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        with subprocess.Popen(commands[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as second:
            answers = [json.loads(rank.stdout.readline()) for rank in (first, second) if rank.stdout is not None]
            second.communicate("\n")
        first.communicate("\n")
    return answers


@contextlib.contextmanager
def planned(server: RunningServer, pool: str, kind: str = "a", budgets: tuple[int, ...] = BUDGETS) -> Iterator[None]:
    """While it lasts, another engine uses a pool that it has planned."""
    other = EngineProcess(server.socket, f"who planned {pool}")
    try:
        assert other.ask("plan", pool, kind) is None
        other.ask("provide", KvPlan(budgets, 1, (4096,), "", "").encode().decode(), [4096])
        yield
    finally:
        other.end()


def test_all_ranks_measure_and_know_of_all_budgets_when_none_has_a_plan(server: RunningServer, tmp_path: Path) -> None:
    assert two_ranks(server, tmp_path) == [[False, None, [100, 101]]] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_has_its_own_budget_again_when_only_one_of_them_has_a_plan(server: RunningServer, tmp_path: Path, rank: int) -> None:
    with planned(server, f"kv.{rank}"):
        assert two_ranks(server, tmp_path) == [[rank == 0, BUDGETS[0], list(BUDGETS)], [rank == 1, BUDGETS[1], list(BUDGETS)]]


def test_engine_is_refused_when_its_ranks_have_plans_of_different_engines(server: RunningServer, tmp_path: Path) -> None:
    with planned(server, "kv.0"), planned(server, "kv.1", budgets=(1, 2)):
        assert two_ranks(server, tmp_path) == ["identity_mismatch"] * 2


@pytest.mark.parametrize("refused", [0, 1])
def test_no_rank_waits_for_ever_when_another_one_is_refused(server: RunningServer, tmp_path: Path, refused: int) -> None:
    with planned(server, f"kv.{refused}", kind="b"):
        answers = two_ranks(server, tmp_path)
    assert (answers[refused], answers[1 - refused]) == ("identity_mismatch", "connection_lost")
