"""The load format ``gms``: how SGLang comes to know it, and to the loader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from gms_core.weights.options import LOAD_FORMAT
from gms_sglang.hooks import Hook


def add_load_format() -> None:
    """Let ``--load-format gms`` be written."""
    from sglang.srt.server_args import LOAD_FORMAT_CHOICES, add_load_format_choices

    if LOAD_FORMAT not in LOAD_FORMAT_CHOICES:
        add_load_format_choices([LOAD_FORMAT])


def _choose_loader(original: Callable[[Any], None], load_config: Any) -> None:
    """A load format that is a class is what SGLang makes its loader of. Names it looks up in an enumeration, which cannot be extended."""
    if isinstance(load_config.load_format, str) and load_config.load_format.lower() == LOAD_FORMAT:
        from gms_sglang.loader import GmsModelLoader

        load_config.load_format = GmsModelLoader
        return
    original(load_config)


HOOKS = (Hook("sglang.srt.configs.load_config.LoadConfig._verify_load_format", HookType.AROUND, _choose_loader),)
