"""Real vLLM engines on CPU share one copy of the weights: the first publishes, the others attach without the checkpoint, and all say the same."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from models import SHAPES, write_model
from safetensors.torch import load_file, save_file
from site_of_engines import Site, stock, two_ranks

from gms_core.checkpoint import content_digest
from gms_core.cli import gms
from gms_core.layout import Identity
from gms_core.protocol.messages import PoolStatus

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def hide_weights(model: Path) -> None:
    hidden = model.parent / "hidden"
    hidden.mkdir()
    for path in model.glob("*.safetensors"):
        shutil.move(path, hidden)


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_are_equal_when_an_engine_attaches_without_the_checkpoint(shape: str, site: Site, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", shape)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    with site.engine(**stock(model)) as unshared, site.engine(model) as writer:
        expected, published = unshared.answer()["tokens"], writer.answer()
        unshared.end()
        assert published.get("tokens") == expected, published
        assert published["figures"]["event"] == "published"
        assert published["figures"]["checkpoint_bytes"] == size
        hide_weights(model)
        with site.engine(model) as reader:
            attached = reader.answer()
            assert attached.get("tokens") == expected, attached
            assert attached["figures"]["event"] == "attached"
            assert attached["figures"]["generation"] == published["figures"]["generation"] == 1
            assert attached["figures"]["bytes"] == published["figures"]["bytes"] >= 0.9 * size
            assert attached["figures"]["checkpoint_bytes"] == 0
            both = [writer.again(), reader.again()]
            assert [answer["tokens"] for answer in both] == [expected] * 2
            assert sum(answer["pss"] for answer in both) <= published["figures"]["bytes"] + 2**20


def test_tokens_are_equal_when_the_weights_are_bfloat16(site: Site, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "qwen3-moe")
    arguments = {"dtype": "bfloat16"}
    starts: list[dict[str, Any]] = [stock(model), {"model": model}, {"model": model, "mode": "ro"}]
    unshared, published, attached = site.run_together(*({**start, "arguments": arguments} for start in starts))
    assert published.get("tokens") == attached.get("tokens") == unshared["tokens"], (published, attached)


@pytest.mark.parametrize("same", [True, False])
def test_tokens_are_equal_when_a_tied_model_has_a_head_in_its_checkpoint(same: bool, site: Site, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "qwen3-tied")
    add_head(model, same=same)
    unshared, published = site.run_together(stock(model), {"model": model})
    hide_weights(model)
    attached = site.run(model, mode="ro")
    assert published.get("tokens") == attached.get("tokens") == unshared["tokens"], (published, attached)


def add_head(model: Path, *, same: bool) -> None:
    (path,) = model.glob("*.safetensors")
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"] = head if same else head.flip(0)
    save_file(tensors, path, metadata={"format": "pt"})


def test_dummy_weights_are_shared_when_no_checkpoint_is_there_at_all(site: Site, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    hide_weights(model)
    published, attached = site.run_together({"model": model, "inner": "dummy"}, {"model": model, "inner": "dummy", "mode": "ro"})
    assert published.get("tokens") == attached.get("tokens") is not None, (published, attached)


def test_options_reach_the_inner_loader_when_they_are_not_ours(site: Site, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    published = site.run(model, rest={"enable_multithread_load": True, "num_threads": 2})
    assert published["figures"]["event"] == "published"
    refused = site.run(model, rest={"no_such_option": 1}, mode="rw")
    assert "no_such_option" in refused["message"]


def test_one_publishes_and_one_attaches_when_two_engines_start_together(site: Site, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    with site.engine(model) as first, site.engine(model) as second:
        answers = [first.answer(), second.answer()]
    assert sorted(answer["figures"]["event"] for answer in answers) == ["attached", "published"]
    assert answers[0]["tokens"] == answers[1]["tokens"]


def test_waiting_engine_publishes_when_the_writer_dies_half_way(site: Site, server: Any, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    dying = server.connect("dying")
    dying.acquire("weights", "rw", Identity({}), timeout_s=5)
    with site.engine(model) as engine:
        wait_until(server, lambda pool: len(pool.waiting) == 1)
        dying.close()
        answer = engine.answer()
    assert answer["figures"]["event"] == "published"
    assert answer["figures"]["wait_seconds"] > 0


def wait_until(server: Any, condition: Callable[[PoolStatus], bool]) -> None:
    with server.connect("observer") as session:
        while not any(condition(pool) for pool in session.status().pools):
            time.sleep(0.05)


def test_process_dies_when_it_writes_to_a_shared_weight(site: Site, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    with site.engine(model, mode="rw") as writer, site.engine(model, mode="ro") as reader:
        for engine in (writer, reader):
            engine.answer()
            engine.tell("write")
            assert engine.process.wait(60) == -signal.SIGSEGV


def test_reader_is_refused_when_another_model_is_published(site: Site, tmp_path: Path) -> None:
    published = site.run(write_model(tmp_path / "one", "llama", seed=1))
    assert published["figures"]["event"] == "published"
    models = write_model(tmp_path / "two", "llama", seed=2), write_model(tmp_path / "three", "qwen3-untied")
    other, shape = site.run_together(*({"model": model, "mode": "ro"} for model in models))
    assert other["error"] == "identity_mismatch"
    assert "model" in other["message"]
    assert shape["error"] == "identity_mismatch"
    assert "architecture" in shape["message"]


def test_reader_is_refused_when_it_has_another_maximal_length(site: Site, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    _, refused = site.run_together({"model": model}, {"model": model, "mode": "ro", "arguments": {"max_model_len": 64}})
    assert refused["error"] == "identity_mismatch"
    assert "max_model_len" in refused["message"]


def test_reader_is_refused_when_the_contents_of_the_checkpoint_differ(site: Site, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama", seed=1)
    site.run(model)
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    content_digest(sorted(moved.glob("*.safetensors")), tmp_path / "cache")
    assert site.run(moved, mode="ro")["figures"]["event"] == "attached"
    write_model(model, "llama", seed=2)
    content_digest(sorted(model.glob("*.safetensors")), tmp_path / "cache")
    refused = site.run(model, mode="ro")
    assert refused["error"] == "identity_mismatch"
    assert "content" in refused["message"]


def test_reader_is_refused_when_the_checkpoint_was_replaced_and_nobody_has_read_the_new_one(site: Site, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama", seed=1)
    site.run(model)
    write_model(model, "llama", seed=2)
    refused = site.run(model, mode="ro")
    assert refused["error"] == "identity_mismatch"
    assert "content" in refused["message"]


def test_reader_is_refused_when_dummy_weights_are_published_and_its_checkpoint_is_gone(site: Site, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    hide_weights(model)
    _, refused = site.run_together({"model": model, "inner": "dummy"}, {"model": model, "mode": "ro"})
    assert refused["error"] == "identity_mismatch"
    assert "load" in refused["message"]


def test_checkpoint_not_found_when_the_first_engine_has_no_weights(site: Site, server: Any, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    hide_weights(model)
    refused = site.run(model)
    assert refused["error"] == "checkpoint_not_found"
    assert str(model) in refused["message"]
    with server.connect() as session:
        status = session.status()
    assert status.allocated_bytes == 0
    assert [pool.generation for pool in status.pools] in ([], [0])


def test_waiting_is_bounded_when_nothing_is_published(site: Site, tmp_path: Path) -> None:
    refused = site.run(write_model(tmp_path / "model", "llama"), mode="ro", acquire_timeout_s=1.0)
    assert refused["error"] == "acquire_timeout"


def test_server_is_named_when_none_is_running(tmp_path: Path) -> None:
    nowhere = tmp_path / "run"
    nowhere.mkdir(mode=0o700)
    refused = Site(nowhere, tmp_path).run(write_model(tmp_path / "model", "llama"))
    assert refused["error"] == "server_unavailable"
    assert "gms serve" in refused["message"]


def test_all_ranks_attach_when_the_model_is_split_over_two(site: Site, server: Any, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "qwen3-moe")
    ranks = two_ranks()
    with site.engine(model, **ranks) as first:
        published = first.answer()
        hide_weights(model)
        with site.engine(model, **ranks) as second, server.connect() as session:
            attached = second.answer()
            pools = {pool.name: (pool.generation, len(pool.readers)) for pool in session.status().pools}
    assert attached.get("tokens") == published.get("tokens") is not None, (published, attached)
    assert pools == {"weights": (1, 2), "weights.1": (1, 2)}


def test_all_ranks_attach_without_the_checkpoint_when_a_snapshot_was_restored(site: Site, server: Any, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    ranks = two_ranks()
    with site.engine(model, **ranks) as first:
        published = first.answer()
    where = [f"--root={tmp_path / 'snapshots'}", "--runtime-dir", str(server.directory)]
    saved = CliRunner().invoke(gms, ["snapshot", "save", "model", "--ranks", *where])
    assert saved.exit_code == 0, saved.output
    server.lose_everything()
    hide_weights(model)
    restored = CliRunner().invoke(gms, ["snapshot", "restore", "model", *where])
    assert restored.exit_code == 0, restored.output
    with site.engine(model, **ranks) as second, server.connect() as session:
        attached = second.answer()
        pools = {pool.name: pool.generation for pool in session.status().pools}
    assert attached.get("tokens") == published.get("tokens") is not None, (published, attached)
    assert pools == {"weights": 2, "weights.1": 2}


def test_no_rank_publishes_when_one_of_them_gets_no_lease(site: Site, server: Any, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    with server.connect("other") as other:
        other.acquire("weights.1", "rw", Identity({}), timeout_s=5)
        refused = site.run(model, acquire_timeout_s=1.0, **two_ranks())
        pools = {pool.name: pool.generation for pool in other.status().pools}
    assert "error" in refused
    assert set(pools.values()) == {0}
