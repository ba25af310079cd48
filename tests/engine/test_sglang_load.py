"""Real SGLang engines on CPU share one copy of the weights: the first publishes, the others attach without the checkpoint, and all say the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import write_model
from sglang_site import Site, ready
from test_vllm_load import hide_weights

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]


@pytest.fixture
def site(server: Any, tmp_path: Path) -> Site:
    return Site(server.directory, tmp_path)


UPDATES = {
    "/update_weights_from_disk": {"model_path": "elsewhere"},
    "/update_weights_from_distributed": {"names": ["a"], "dtypes": ["float32"], "shapes": [[1]]},
    "/update_weights_from_tensor": {"serialized_named_tensors": [""]},
    "/update_weights_from_ipc": {"zmq_handles": {}},
    "/weights_checker": {"action": "reset_tensors"},
}


def test_updates_are_refused_and_weights_are_there_once_when_two_engines_share_them(site: Site, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    with site.serve(model, "auto") as unshared, site.serve(model) as writer:
        expected, published = ready(unshared, writer)
        assert published == expected
        hide_weights(model)
        with site.serve(model, mode="ro") as reader:
            assert ready(reader) == [expected]
            assert (writer.figures()["event"], reader.figures()["event"]) == ("published", "attached")
            assert int(writer.figures()["bytes"]) == int(reader.figures()["bytes"]) >= 0.9 * size
            assert (int(writer.figures()["checkpoint_bytes"]), int(reader.figures()["checkpoint_bytes"])) == (size, 0)
            mine, other = writer.mapped(), reader.mapped()
            shared = mine.keys() & other.keys()  # and not the KV memory, which is each engine's own
            assert {rights for inode in shared for rights in (*mine[inode], *other[inode])} == {"r--s"}
            assert 0 < writer.share(shared) + reader.share(shared) <= int(writer.figures()["bytes"]) + 2**20
            for path, body in UPDATES.items():
                status, answer = reader.post(path, body)
                assert status == 400, answer
                assert "shared with other engines through GMS" in json.dumps(answer)
            assert ready(writer, reader) == [expected, expected]
        with site.serve(model, "gms", "--context-length", "96", mode="ro") as other:
            assert "max_model_len: '96' != '128'" in other.refusal()


@pytest.mark.parametrize("shape", ["qwen3-tied", "mixtral", "deepseek-v2-yarn"])
def test_tokens_are_equal_when_an_engine_attaches_without_the_checkpoint(shape: str, site: Site, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", shape)
    with site.serve(model, "auto") as unshared, site.serve(model) as writer:
        expected, published = ready(unshared, writer)
    assert published == expected
    hide_weights(model)
    with site.serve(model) as reader:
        assert ready(reader) == [expected]
        assert reader.figures()["event"] == "attached"


BREAKER = """
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

def activate():
    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.run_event_loop", lambda *_: None, HookType.BEFORE)
    HookRegistry.apply_hooks()
"""


def test_nothing_is_shared_when_a_hook_is_not_in_place(site: Site, server: Any, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    (tmp_path / "plugins/breaker-1.dist-info").mkdir(parents=True)
    (tmp_path / "plugins/breaker.py").write_text(BREAKER)
    (tmp_path / "plugins/breaker-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: breaker\nVersion: 1\n")
    (tmp_path / "plugins/breaker-1.dist-info/entry_points.txt").write_text("[sglang.srt.plugins]\nbreaker = breaker:activate\n")
    paths = [str(tmp_path / "plugins"), *filter(None, [site.environment().get("PYTHONPATH")])]
    with site.serve(model, environment={"PYTHONPATH": ":".join(paths)}) as engine:
        assert "SGLang has not taken GMS's hooks on sglang.srt.managers.scheduler:Scheduler.run_event_loop" in engine.refusal()
    with server.connect() as session:
        assert session.status().pools == ()


REFUSED: list[tuple[list[str], dict[str, str], str]] = [
    (["--enable-eplb"], {}, "the expert load balancer rewrites"),
    (["--cpu-offload-gb", "1"], {}, "offloaded to host memory"),
    (["--enable-weights-cpu-backup"], {}, "a copy of the weights in host memory"),
    (["--enable-memory-saver"], {}, "torch_memory_saver"),
    (["--quantization", "bitsandbytes"], {}, "a load format of its own"),
    (["--weight-cache-mode", "client", "--weight-cache-socket", "x"], {}, "weight cache"),
    (["--startup-weight-load-mode", "overlap"], {}, "while CUDA graphs are captured"),
    ([], {"SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": "1"}, "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"),
    ([], {"SGLANG_MOONCAKE_CUSTOM_MEM_POOL": "NVLINK"}, "SGLANG_MOONCAKE_CUSTOM_MEM_POOL"),
    (["--enable-hierarchical-cache"], {"GMS_FAILOVER": "{}"}, "--enable-hierarchical-cache cannot hand its KV memory over"),
    (["--speculative-algorithm", "NGRAM", "--model-loader-extra-config", '{"gms": {"failover": {}}}'], {}, "--speculative-algorithm cannot hand"),
    (["--model-loader-extra-config", '{"gms": {"tagg": "x"}}'], {}, "tagg: no such option"),
    (["--model-loader-extra-config", '{"gms": {"inner": "flash_rl"}}'], {}, "it writes new weights"),
]


NEWER = (["--weight-cache-mode"], ["--startup-weight-load-mode"])
"""Options that 0.5.16 does not have."""


def test_options_are_refused_when_they_cannot_go_with_shared_weights(site: Site, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    cases = [([], {}), *((options, environment) for options, environment, _ in REFUSED)]
    allowed, *refused = site.ask(Path(__file__).with_name("sglang_refusals.py"), str(model), json.dumps(cases))
    assert allowed is None
    for answer, (options, environment, words) in zip(refused, REFUSED, strict=True):
        assert answer is not None, (options, environment)
        if options[:1] in NEWER and answer[0] == "no such option":
            continue
        assert answer[0] in ("engine_unsupported", "configuration"), answer
        assert words in answer[1], answer
