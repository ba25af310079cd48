"""GMS for TensorRT-LLM: where it has `LoadFormat.GMS` itself, the library that its loader imports; elsewhere a part in its loader.

TensorRT-LLM loads no plugins, so a program says it: `install`, before it makes an engine. Nothing is changed by importing this package.
"""

from __future__ import annotations

import sys

from gms_core.engine_log import log_as

LOG = "TRT-LLM.gms"
"""Below TensorRT-LLM's own logger, whose handlers and level it shares."""


def install() -> None:
    """Let this process, and the ranks of the engines that it makes, share weights through GMS. Idempotent.

    Engines without ``load_format="GMS"`` are not touched. Where the real library `gpu_memory_service` is installed, and TensorRT-LLM loads through
    it, that one is used.

    Raises:
        EngineUnsupported: This TensorRT-LLM is not as the adapter knows it; names the symbol. Nothing was changed.
    """
    from gms_trtllm.arguments import take_arguments_place

    try:
        prepare()
        take_arguments_place()
    except BaseException:
        uninstall()
        raise


def prepare() -> None:
    """Let this process alone load through GMS. Idempotent.

    Raises:
        EngineUnsupported: See `install`.
    """
    from gms_trtllm.arguments import is_native

    log_as(LOG)
    if is_native():
        from gms_patches.for_trtllm import NATIVE
        from gms_patches.guard import guard
        from gms_trtllm.library import offer

        guard(NATIVE)
        offer()
    else:
        from gms_trtllm.adapter import take_part

        take_part()
    from gms_trtllm.sleep import take_part_in_sleep

    take_part_in_sleep()


def uninstall() -> None:
    """Undo `install` in this process. Engines that are there go on. Idempotent."""
    for name, undo in _UNDO.items():
        module = sys.modules.get(f"gms_trtllm.{name}")
        if module is not None:
            getattr(module, undo)()


_UNDO = {
    "hold": "let_servers_go",
    "kv": "leave_kv_memory",
    "arguments": "give_arguments_place_back",
    "sleep": "give_up_part_in_sleep",
    "adapter": "give_up_part",
    "library": "withdraw",
}
"""Modules, if they are there, and what undoes the work of each."""
