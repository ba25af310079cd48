"""Requests that would write to weights get a refusal for an answer. An error would end the scheduler, and so would the write."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from gms_core.engine_log import log
from gms_patches.for_sglang import UPDATE_PATCHES
from gms_sglang.hooks import Hook

_WRITES = "reset_tensors"
"""The one action of ``check_weights`` that does."""
_ANSWERS = {
    "update_weights_from_disk": "UpdateWeightFromDiskReqOutput",
    "update_weights_from_distributed": "UpdateWeightsFromDistributedReqOutput",
    "update_weights_from_tensor": "UpdateWeightsFromTensorReqOutput",
    "update_weights_from_ipc": "UpdateWeightsFromIPCReqOutput",
    "begin_weight_update": "BeginWeightUpdateReqOutput",
    "end_weight_update": "EndWeightUpdateReqOutput",
    "check_weights": "CheckWeightsReqOutput",
}
"""What each request is answered with, in ``sglang.srt.managers.io_struct``."""


def _answer(request: str, original: Callable[..., Any], manager: Any, received: Any) -> Any:
    import sglang.srt.managers.io_struct as io_struct

    if request == "check_weights" and received.action != _WRITES:
        return original(manager, received)
    what = f"{request} ({_WRITES})" if request == "check_weights" else request
    message = (
        f"{what} writes to weights in place, and these are shared with other engines through GMS. "
        "Publish the new weights as a new generation: start an engine with the mode rw, and end this one when that serves."
    )
    log().error(message)
    return getattr(io_struct, _ANSWERS[request])(success=False, message=message)


HOOKS = tuple(Hook(patch, "around", partial(_answer, patch.target.rpartition(".")[2])) for patch in UPDATE_PATCHES)
