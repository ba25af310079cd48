"""A rank of an engine that fails over, as one of its engine's cohort: the cohort's name comes with the options, as all settings do."""

from __future__ import annotations

from pathlib import Path

from gms_core.config import settings
from gms_core.failover.cohort import take_place
from gms_core.failover.front_end.named import be_told
from gms_core.failover.life_line import end_with_life_line
from gms_core.layout import Identity
from gms_trtllm import kv
from gms_trtllm.ranks import rank

_told = ""
"""The cohort for which this process does as it is told already."""


def process_name(number: int) -> str:
    """What a rank is called in its cohort."""
    return f"rank {number}"


def join(socket: Path, weights: Identity, connect_timeout_s: float) -> None:
    """Join this rank to its engine's cohort, if it has one: the death of any of its processes is the engine's. It obeys the process that serves then.

    Until that is of the cohort too, this rank ends with it by their life line.

    Args:
        socket: Of the server of this rank's device.
        weights: What it loads; a draft model is loaded after the model that it is for.
        connect_timeout_s: Seconds to connect.

    Raises:
        EngineUnsupported: Its KV memory cannot be planned.
        GmsError: The server does not want this process.
    """
    global _told
    cohort, name = settings().cohort, process_name(rank())
    if not cohort:
        return
    end_with_life_line()
    take_place(name, [socket], serves=False, connect_timeout_s=connect_timeout_s)
    if cohort != _told:
        kv.plan_kv_memory(socket, weights)
        be_told(name, serves=False, calls=kv.calls())
        _told = cohort
