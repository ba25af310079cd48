"""Real SGLang engines on CPU over two nodes, each with a device server of its own: both nodes load, sleep and end together."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from failover_story import living, until, without_named_memory
from models import write_model
from ports import free_port
from sglang_site import PROMPTS, Server, Site
from test_sglang_sleep import change
from test_vllm_load import hide_weights

from tests.conftest import RunningServer, running_server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]

TOKENS = 6
"""Few: at each layer two processes wait for each other."""
WITHOUT_DUMPS = {"SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0"}
"""SGLang would wait five seconds for them before an engine ends that has lost a rank."""


@dataclass
class Nodes:
    """Two machines, as far as GMS can see."""

    servers: tuple[RunningServer, RunningServer]
    sites: tuple[Site, Site]

    @contextlib.contextmanager
    def engine(self, model: Path, load_format: str = "gms", *options: str, **gms: Any) -> Iterator[Engine]:
        """Start an engine over both; it ends with the context. Arguments are those of `Site.serve`."""
        address = f"127.0.0.1:{free_port()}"

        def node(rank: int) -> AbstractContextManager[Server]:
            place = ("--tp-size", "2", "--nnodes", "2", "--node-rank", str(rank), "--dist-init-addr", address)
            cpus = sorted(os.sched_getaffinity(0))[:2]
            variables = {**WITHOUT_DUMPS, "SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, cpus))}
            return self.sites[rank].serve(model, load_format, *place, *options, environment=variables, **gms)

        with node(0) as head, node(1) as other:
            yield Engine(head, other)


@dataclass
class Engine:
    """One engine: the node that serves, and the other one."""

    head: Server
    other: Server

    @property
    def nodes(self) -> tuple[Server, Server]:
        return self.head, self.other

    def tokens(self) -> list[list[int]]:
        """What it says to some prompts, greedily, once it listens."""
        self.head.wait()
        status, answers = self.ask()
        assert status == 200, answers
        return [answer["output_ids"] for answer in answers]

    def ask(self) -> tuple[int, Any]:
        """The status and the answer of one request."""
        sampling = {"temperature": 0.0, "max_new_tokens": TOKENS, "ignore_eos": True}
        return self.head.post("/generate", {"input_ids": PROMPTS, "sampling_params": sampling})

    def until_gone(self) -> None:
        """Wait until both nodes have ended by themselves."""
        for node in self.nodes:
            until(lambda node=node: node.process.poll() is not None and not living(node.process.pid), f"a node has not ended:\n{node.tail()}")


@pytest.fixture
def nodes(server: RunningServer, tmp_path: Path) -> Iterator[Nodes]:
    with tempfile.TemporaryDirectory(prefix="gms-") as directory, running_server(Path(directory)) as second:
        folders = [tmp_path / name for name in ("node-0", "node-1")]
        for folder in folders:
            folder.mkdir()
        sites = (Site(server.directory, folders[0]), Site(second.directory, folders[1]))
        yield Nodes((server, second), sites)


def test_both_nodes_load_sleep_and_end_together(nodes: Nodes, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    with nodes.engine(model, "auto") as stock, nodes.engine(model) as writer:
        expected = stock.tokens()
        assert writer.tokens() == expected
    hide_weights(model)
    with nodes.engine(model, mode="ro") as reader:
        assert reader.tokens() == expected
        for node, pool in zip(reader.nodes, ("weights", "weights.1"), strict=True):
            figures = node.figures()
            assert (figures["event"], figures["pool"], figures["checkpoint_bytes"]) == ("attached", pool, "0")
        awake = [node.memory()[0] for node in reader.nodes]
        assert change(reader.head, "release")[0] == 200
        until(lambda: [node.memory()[0] for node in reader.nodes] == [0, 0], "both nodes are asleep")
        assert change(reader.head, "resume")[0] == 200
        assert reader.tokens() == expected
        assert [node.memory()[0] for node in reader.nodes] == awake
        with without_named_memory(reader.head.process.pid), without_named_memory(reader.other.process.pid):
            os.kill(reader.other.process.pid, signal.SIGKILL)
            with pytest.raises(OSError):
                reader.ask()
            reader.until_gone()
        assert reader.head.process.returncode != 0
    for server in nodes.servers:
        with server.connect() as session:
            until(lambda session=session: not session.status().pools[0].readers, "nobody reads the weights")
            assert [pool.generation for pool in session.status().pools] == [1]


@pytest.mark.long
def test_all_ranks_are_refused_or_publish_when_a_server_has_not_what_its_rank_needs(nodes: Nodes, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    with nodes.engine(model) as writer:
        expected = writer.tokens()
    exchanged = Nodes((nodes.servers[1], nodes.servers[0]), (nodes.sites[1], nodes.sites[0]))
    with exchanged.engine(model, tag="weights.1") as engine:
        assert "tp: '0/2' != '1/2'" in engine.head.refusal()
        assert "the first rank of this engine was not granted a lease" in engine.other.refusal()
    nodes.servers[1].lose_everything()
    with nodes.engine(model) as engine:
        assert engine.tokens() == expected
        assert [node.figures()["event"] for node in engine.nodes] == ["published", "published"]
