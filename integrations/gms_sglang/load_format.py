"""The load format ``gms``: how SGLang comes to know it, and what is looked at once it is asked for. These two hooks are always there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gms_core.weights.options import LOAD_FORMAT
from gms_patches.for_sglang import RESOLVE_ARGUMENTS, RESOLVE_ARGUMENTS_BEFORE, VERIFY_LOAD_FORMAT
from gms_sglang.hooks import Hook, engage


def add_load_format() -> None:
    """Let ``--load-format gms`` be written."""
    from sglang.srt.server_args import LOAD_FORMAT_CHOICES, add_load_format_choices

    if LOAD_FORMAT not in LOAD_FORMAT_CHOICES:
        add_load_format_choices([LOAD_FORMAT])


def asks_for_gms(load_format: object) -> bool:
    """Whether a load format is this one."""
    return isinstance(load_format, str) and load_format.lower() == LOAD_FORMAT


def _check_arguments(original: Callable[[Any], None], record: Any) -> None:
    """Look at the options in the process that the user started, before it starts others: as they were given, and as SGLang has resolved them."""
    asked = asks_for_gms(record.load_format)
    if asked:
        from gms_sglang.failover import prepare_record
        from gms_sglang.unsupported import check_options, engine_options

        check_options(lambda name: getattr(record, name, None), asked=True)
        prepare_record(record, engine_options(record.model_loader_extra_config).gms)
    original(record)
    from gms_sglang.arguments import option_of

    option = option_of(record)
    if asked or asks_for_gms(option("load_format")) or asks_for_gms(option("speculative_draft_load_format")):
        from gms_sglang import sleep_answers
        from gms_sglang.unsupported import check_engine, check_options, engine_options, tolerate_neighbours

        check_engine(str(option("device")))
        check_options(option, asked=asked)
        tolerate_neighbours()
        engage(sleep_answers.HOOKS)
        if asked:
            from gms_sglang.failover import begin_failover

            begin_failover(record, option, engine_options(option("model_loader_extra_config")).gms)


def _choose_loader(original: Callable[[Any], None], load_config: Any) -> None:
    """A load format that is a class is what SGLang makes its loader of. Names it looks up in an enumeration, which cannot be extended."""
    if asks_for_gms(load_config.load_format):
        from gms_sglang.loader import GmsModelLoader, prepare

        prepare()
        load_config.load_format = GmsModelLoader
        return
    original(load_config)


HOOKS = (
    Hook(VERIFY_LOAD_FORMAT, "around", _choose_loader),
    Hook(RESOLVE_ARGUMENTS, "around", _check_arguments),
    Hook(RESOLVE_ARGUMENTS_BEFORE, "around", _check_arguments),
)
