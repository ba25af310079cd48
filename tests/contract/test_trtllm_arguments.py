"""The options of TensorRT-LLM: what its own tests say of them, on the double, and what GMS's class of options adds."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError
from trtllm_engines import by_the_adapter, everywhere, natively

from tests.trtllm_double import NATIVE, ROOT, STAGED_HOOKS, WITHOUT_GMS

REBALANCE = {"enabled": True, "helper_slots_per_rank": 1}


def args_of(**options: Any) -> Any:
    """Upstream's own where it knows GMS, else GMS's."""
    from tensorrt_llm.llmapi import llm

    import gms_trtllm
    from gms_trtllm.arguments import is_native

    if not is_native():
        gms_trtllm.install()
    return llm.TorchLlmArgs(model="model", **options)


@everywhere
def test_block_is_empty_when_nothing_is_said(variant: str) -> None:
    block = args_of().gms_config
    assert (block.socket_path, block.mode, block.tag) == (None, "auto", "weights")


@everywhere
@pytest.mark.parametrize("mode", ["auto", "rw", "ro"])
def test_mode_is_taken_when_it_is_one(variant: str, mode: str) -> None:
    assert args_of(load_format="GMS", gms_config={"mode": mode}).gms_config.mode == mode


@everywhere
@pytest.mark.parametrize("mode", ["", "AUTO", "Rw", "read", "write", "shadow"])
def test_mode_is_refused_when_it_is_none(variant: str, mode: str) -> None:
    with pytest.raises(ValidationError, match="Input should be 'auto', 'rw' or 'ro'"):
        args_of(load_format="GMS", gms_config={"mode": mode})


@everywhere
@pytest.mark.parametrize("tag", ["", " ", "\t", "\n", " \t\n"])
def test_tag_is_refused_when_it_is_blank(variant: str, tag: str) -> None:
    with pytest.raises(ValidationError, match=r"gms_config\.tag must be a non-empty string"):
        args_of(load_format="GMS", gms_config={"tag": tag})


@everywhere
def test_tag_is_taken_when_there_is_one(variant: str) -> None:
    assert args_of(load_format="GMS", gms_config={"tag": "llama"}).gms_config.tag == "llama"


@everywhere
@pytest.mark.parametrize("block", [{"socket_path": "/run/s"}, {"mode": "ro"}, {"tag": "llama"}])
def test_block_without_effect_is_warned_of_when_the_load_format_is_another(variant: str, block: dict[str, str], caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        args_of(load_format="GMS", gms_config=block)
        args_of()
        assert caplog.text == ""
        args_of(gms_config=block)
    assert "gms_config is set, and has no effect" in caplog.text


@everywhere
def test_experts_that_move_are_refused_when_weights_are_shared(variant: str) -> None:
    with pytest.raises(ValidationError, match=r"LoadFormat\.GMS.*active moe_config\.rebalance"):
        args_of(load_format="GMS", moe_config={"rebalance": REBALANCE})
    if variant != STAGED_HOOKS:
        with pytest.raises(ValidationError, match=r"LoadFormat\.GMS.*moe_config\.load_balancer"):
            args_of(load_format="GMS", moe_config={"load_balancer": {}})
    args_of(moe_config={"rebalance": REBALANCE})
    args_of(load_format="GMS")
    args_of(load_format="GMS", moe_config={"rebalance": {**REBALANCE, "enabled": False}})
    args_of(load_format="GMS", moe_config={"rebalance": {**REBALANCE, "helper_slots_per_rank": 0}})


@natively
def test_load_format_has_its_name_and_number_when_it_is_there(variant: str) -> None:
    from tensorrt_llm.llmapi.llm_args import LoadFormat

    assert (LoadFormat.GMS.name, LoadFormat.GMS.value) == ("GMS", 3)
    with pytest.raises(ValueError, match="gms"):
        LoadFormat("gms")


@everywhere
@pytest.mark.parametrize("written", ["GMS", "gms", 3])
def test_load_format_is_known_when_it_is_written_in_any_way(variant: str, written: Any) -> None:
    from gms_trtllm.arguments import asks_for_gms

    args = args_of(load_format=written)
    assert args.load_format.name == ("GMS" if variant in NATIVE else "AUTO")
    assert (args.checkpoint_format, asks_for_gms(args)) == ("HF", True)
    assert not asks_for_gms(args_of(load_format="AUTO"))


@everywhere
@pytest.mark.parametrize("written", [True, False, "bogus"])
def test_load_format_is_refused_when_there_is_none_of_that_name(variant: str, written: Any) -> None:
    with pytest.raises(ValidationError, match="Invalid LoadFormat"):
        args_of(load_format=written)


@by_the_adapter
def test_nothing_is_ignored_silently_when_upstream_does_not_know_gms(variant: str) -> None:
    from tensorrt_llm.llmapi.llm_args import TorchLlmArgs

    for options in ({"load_format": "gms"}, {"gms_config": {}}):
        with pytest.raises(ValidationError):
            TorchLlmArgs(model="model", **options)


@everywhere
def test_block_is_refused_when_it_has_a_key_that_is_none(variant: str) -> None:
    with pytest.raises(ValidationError, match=r"gms_config\.sockets\n.*Extra inputs are not permitted"):
        args_of(load_format="GMS", gms_config={"sockets": "/run"})


@by_the_adapter
def test_load_format_is_another_one_when_its_number_is_taken(variant: str, monkeypatch: Any) -> None:
    from enum import Enum

    import gms_trtllm
    from gms_trtllm.arguments import take_arguments_place

    take_arguments_place()
    from gms_trtllm import adapter_arguments

    monkeypatch.setattr(adapter_arguments, "LoadFormat", Enum("LoadFormat", {"AUTO": 0, "OTHER": 3}))
    with pytest.raises(ValidationError, match=r"Input should be|3 is not a valid LoadFormat"):  # upstream was asked, and does not know it here
        args_of(load_format=3)
    gms_trtllm.uninstall()


@by_the_adapter
def test_load_format_is_kept_when_options_are_copied_pickled_or_dumped(variant: str) -> None:
    args = args_of(load_format="gms", gms_config={"tag": "llama"})
    kept = [copy.copy(args), copy.deepcopy(args), pickle.loads(pickle.dumps(args)), args.model_copy(), type(args)(**args.model_dump())]
    assert [(one.shares_weights, one.load_format.name, one.gms_config.tag) for one in kept] == [(True, "AUTO", "llama")] * 5
    assert args.model_dump()["load_format"] == "GMS"
    assert "load_format" not in args.model_dump(exclude={"load_format"})
    assert set(args.model_dump(include={"model"})) == {"model"}
    assert args_of().model_dump()["load_format"].name == "AUTO"


@everywhere
def test_options_of_engines_are_those_of_gms_when_it_is_installed(variant: str) -> None:
    from tensorrt_llm.llmapi import llm, llm_args

    import gms_trtllm

    for _ in range(2):
        gms_trtllm.install()
    args = llm.TorchLlmArgs(model="model", load_format="gms", gms_config={"tag": "llama"})
    assert isinstance(args, llm_args.TorchLlmArgs)
    assert args.gms_config.tag == "llama"
    with pytest.raises(ValidationError, match="Invalid LoadFormat"):
        llm.TorchLlmArgs(model="model", load_format="bogus")
    for _ in range(2):
        gms_trtllm.uninstall()
    assert llm.TorchLlmArgs is llm_args.TorchLlmArgs


@everywhere
def test_installing_is_refused_when_something_else_has_taken_the_place(variant: str, monkeypatch: Any) -> None:
    from tensorrt_llm.llmapi import llm

    import gms_trtllm
    from gms_core.errors import EngineUnsupported

    monkeypatch.setattr(llm, "TorchLlmArgs", dict)
    with pytest.raises(EngineUnsupported, match="not TensorRT-LLM's own class of options"):
        gms_trtllm.install()


RANK = """
import pickle, sys
args = pickle.loads(sys.stdin.buffer.read())
from gms_trtllm import library
import importlib.util
from gms_patches.apply import in_force
prepared = "trtllm-load-model" in in_force() or importlib.util.find_spec("gpu_memory_service") is not None
print(type(args).__name__, args.gms_config.tag, prepared)
"""


@pytest.mark.parametrize("variant", [WITHOUT_GMS, STAGED_HOOKS], indirect=True)
@pytest.mark.parametrize(("load_format", "prepared"), [("GMS", True), ("AUTO", False)])
def test_a_fresh_interpreter_is_prepared_when_it_gets_the_options(variant: str, load_format: str, prepared: bool) -> None:
    from tensorrt_llm.llmapi import llm

    import gms_trtllm
    from gms_core.config import child_environment

    gms_trtllm.install()
    args = llm.TorchLlmArgs(model="model", load_format=load_format, gms_config={"tag": "llama"})
    environment = child_environment(PYTHONPATH=":".join([str(ROOT), *filter(None, sys.path)]))
    result = subprocess.run([sys.executable, "-c", RANK], input=pickle.dumps(args), capture_output=True, check=True, env=environment)
    assert result.stdout.decode().split() == ["GmsTorchLlmArgs", "llama", str(prepared)]
