"""Errors on their way from a scheduler to the process that has asked it."""

from __future__ import annotations

import json
from collections.abc import Mapping

from gms_core.engine_log import log
from gms_core.errors import GmsError, rebuild


def told(error: Exception) -> dict[str, str]:
    """An error as text. One that is not of GMS is logged here, with its traceback."""
    if isinstance(error, GmsError):
        return {"code": error.code, "message": error.message, "hint": error.hint}
    log().exception("an error that was not expected", exc_info=error)
    return {"code": GmsError.code, "message": f"{type(error).__name__}: {error}", "hint": "The log of the scheduler has more."}


def as_error(refusal: Mapping[str, str]) -> GmsError:
    """The error that `told` has described."""
    return rebuild(refusal["code"], refusal["message"], refusal["hint"], {})


def written(refusal: Mapping[str, str]) -> str:
    """What `told` has said, in one string."""
    return json.dumps(refusal)


def read(text: str) -> GmsError:
    """The error of `written`."""
    return as_error(json.loads(text))
