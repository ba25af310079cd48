"""SGLang's detokenizer as a process of an engine that fails over: it ends with the one that has started it, and joins its engine's cohort."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gms_core.engine_log import log_as
from gms_core.failover.front_end.named import be_told
from gms_core.failover.parent_death import end_with_parent
from gms_sglang import LOG

DETOKENIZER = "detokenizer"
"""What it is called; an engine that fails over has one."""


def run_detokenizer(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Be a detokenizer's process: SGLang's own function, in one that the API server can reach. SGLang loads no plugins there."""
    log_as(LOG)
    end_with_parent()
    be_told(DETOKENIZER, serves=False)
    return original(*args, **kwargs)
