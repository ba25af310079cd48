"""What a scheduler answers where it cannot compute: its KV memory is scratch, or part of its memory is not mapped."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from gms_core.engine_log import log
from gms_core.errors import GmsError
from gms_patches.for_sglang import ADD_REQUEST, RUN_BATCH
from gms_sglang.hooks import Hook
from gms_sglang.rank import this_rank


def _add(original: Callable[..., None], scheduler: Any, request: Any, is_retracted: bool = False) -> None:
    """Take a request, or refuse it at once: it never becomes a part of a batch.

    The probes of SGLang's health endpoints are requests too. To them a refusal is an answer like any other, and a sign of life.
    """
    try:
        this_rank().check_ready()
    except GmsError as error:
        log().debug("request %s is refused: %s", request.rid, error.message)  # whoever asks is told, and probes are many
        _abort(scheduler, request, str(error))
    else:
        original(scheduler, request, is_retracted)


def _abort(scheduler: Any, request: Any, message: str) -> None:
    from sglang.srt.managers.io_struct import AbortReq

    reason = {"type": "abort", "status_code": HTTPStatus.SERVICE_UNAVAILABLE, "message": message}
    refusal = AbortReq(rid=request.rid, finished_reason=reason, http_worker_ipc=request.http_worker_ipc)  # the tokenizer worker that waits for it
    scheduler.ipc_channels.send_to_tokenizer.send_output(refusal, request)
    if hasattr(scheduler, "_release_aborted_request"):  # 0.5.16 has nothing to release there
        scheduler._release_aborted_request(request)  # noqa: SLF001 - as SGLang does where it refuses


def _run(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute a batch.

    Raises:
        GmsError: It would be computed on scratch, or on no memory. That ends the engine, as the fault would that it would be otherwise.
    """
    this_rank().check_ready()
    return original(scheduler, *args, **kwargs)


HOOKS = (Hook(ADD_REQUEST, "around", _add), Hook(RUN_BATCH, "around", _run))
