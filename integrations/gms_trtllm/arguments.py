"""The place where TensorRT-LLM looks for its class of options, and what GMS puts there.

Patches in the process that the user starts never reach the ranks, which are fresh interpreters. The options do: they are pickled, and an object of a
class of GMS's own can only be made again by importing its module. So a rank that receives them is prepared before it loads anything.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import tensorrt_llm.llmapi.llm as programs
from tensorrt_llm.llmapi import llm_args
from tensorrt_llm.llmapi.llm_args import TorchLlmArgs

import gms_trtllm
from gms_core.config import take_from_parent, told_to_children
from gms_core.errors import EngineUnsupported
from gms_trtllm.identity import expect
from gms_trtllm.outer_pool import check_sleep

_PLACE = "TorchLlmArgs"
_SETTINGS = "gms_settings"


def is_native() -> bool:
    """Whether this TensorRT-LLM loads through the library `gpu_memory_service` by itself."""
    return "GMS" in llm_args.LoadFormat.__members__


def asks_for_gms(args: Any) -> bool:
    """Whether an engine with these options shares its weights."""
    return getattr(args.load_format, "name", "") == "GMS" or getattr(args, "shares_weights", False)


def expect_if_asked(args: Any) -> None:
    """Let the identity of what this process loads be made of these options, if they ask for GMS.

    Raises:
        EngineUnsupported: Weights would lie in a pool of TensorRT-LLM's own.
    """
    if asks_for_gms(args):
        check_sleep(getattr(args, "sleep_config", None))
        expect(args)


def with_settings(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """What is pickled of options, and GMS's settings with them: the ranks of an engine do not get the environment of the process that starts them."""
    return {**state, _SETTINGS: told_to_children()}


def prepare_rank(args: Any, state: Mapping[Any, Any]) -> None:
    """Make a process ready that was given options which ask for GMS.

    Args:
        args: The options.
        state: What was pickled of them.
    """
    if asks_for_gms(args):
        take_from_parent(state.get(_SETTINGS, {}))
        gms_trtllm.prepare()
        expect_if_asked(args)


def take_arguments_place() -> None:
    """Let engines that are made from now on have options of GMS's own class. Idempotent.

    Raises:
        EngineUnsupported: This TensorRT-LLM does not make its options of a class of that name.
    """
    kind = _kind()
    found = getattr(programs, _PLACE, None)
    if found is kind:
        return
    if found is not TorchLlmArgs:
        raise EngineUnsupported(
            f"{programs.__name__}.{_PLACE} is {found!r}, not TensorRT-LLM's own class of options",
            hint="Something else has replaced it, or this version makes its options elsewhere.",
        )
    setattr(programs, _PLACE, kind)


def give_arguments_place_back() -> None:
    """Undo it. Idempotent."""
    if getattr(programs, _PLACE, None) is _kind():
        setattr(programs, _PLACE, TorchLlmArgs)


def _kind() -> type:
    module = "gms_trtllm.native_arguments" if is_native() else "gms_trtllm.adapter_arguments"
    return importlib.import_module(module).GmsTorchLlmArgs  # type: ignore[no-any-return]
