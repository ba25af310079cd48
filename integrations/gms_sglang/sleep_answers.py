"""What the process that was asked for sleep or wake-up makes of the schedulers' answers: a refusal becomes an error of the request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from gms_core.engine_log import log
from gms_core.errors import EngineBusy, EngineUnsupported, GmsError
from gms_patches.for_sglang import RELEASE_ANSWER, RESUME_ANSWER
from gms_sglang.arguments import Option, option_of
from gms_sglang.hooks import Hook
from gms_sglang.refusals import read

PATIENCE_S = 1.0
"""Seconds to wait for requests that end: a scheduler puts one away some steps after it was answered."""
_LOOK_S = 0.02


async def _answer(communicator: str, original: Callable[..., Any], tokenizer: Any, request: Any, http_request: Any = None) -> None:  # noqa: ARG001
    """Ask the schedulers.

    Args:
        communicator: What asks them, of the tokenizer manager.
        original: SGLang's function, which throws the answers away.
        tokenizer: The tokenizer manager.
        request: What to ask.
        http_request: SGLang has it here, and makes nothing of it either.

    Raises:
        GmsError: One refuses. None of those that compute together has done it then.
        EngineUnsupported: There are several groups of ranks that do not compute together, and could not agree.
    """
    _check_agree(option_of(tokenizer.server_args))
    tokenizer.auto_create_handle_loop()
    deadline = time.monotonic() + PATIENCE_S
    while (refusal := await _asked(getattr(tokenizer, communicator), request)) is not None:
        if not isinstance(refusal, EngineBusy) or time.monotonic() > deadline:
            log().warning("refused: %s", refusal)
            raise refusal
        await asyncio.sleep(_LOOK_S)


def _check_agree(option: Option) -> None:
    if (option("dp_size") or 1) > 1 and not option("enable_dp_attention"):
        raise EngineUnsupported(
            "an engine with --dp-size does not sleep: a part of its replicas might, and the others answer",
            hint="Use --enable-dp-attention, or one engine for each replica.",
        )
    if (option("pp_size") or 1) > 1:
        raise EngineUnsupported(
            "an engine with --pipeline-parallel-size does not sleep: a part of its stages might, and only the first one answers",
            hint="Divide the model by --tensor-parallel-size alone.",
        )


async def _asked(ask: Callable[[Any], Awaitable[Sequence[Any]]], request: Any) -> GmsError | None:
    return next((read(answer.rid) for answer in await ask(request) if answer.rid), None)


HOOKS = (
    Hook(RELEASE_ANSWER, "around", partial(_answer, "release_memory_occupation_communicator")),
    Hook(RESUME_ANSWER, "around", partial(_answer, "resume_memory_occupation_communicator")),
)
