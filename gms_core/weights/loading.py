"""One load of an engine: as the lease that it is granted says, it publishes the weights or attaches to them, and what it holds is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from gms_core.client import Session, WriteLease
from gms_core.weights.holdings import Holding, keep
from gms_core.weights.identity import check_content
from gms_core.weights.leases import Granted

Model = TypeVar("Model")
Load = Callable[[Holding, Granted], Model]


def publish_or_attach(
    session: Session,
    ask: Callable[[], Granted],
    *,
    publish: Load[Model],
    attach: Load[Model],
    free_memory: Callable[[], int],
    content: str,
    files: Sequence[Path],
) -> tuple[Model, Holding]:
    """Load, and keep session, lease and arena for the life of this process.

    Args:
        session: With the server of this rank's device. It is closed if anything is raised.
        ask: Gets this rank's lease.
        publish: Loads with a write lease.
        attach: Loads with a read lease.
        free_memory: Bytes of the device that are free now.
        content: Digest of the checkpoint as far as it was known when the lease was asked for, else empty: then it is compared before attaching.
        files: Of the checkpoint, as far as they lie on this machine.

    Returns:
        The model, and what keeps its memory.

    Raises:
        GmsError: Neither was possible. Nothing of this engine is left in the server.
    """
    try:
        before = free_memory()
        granted = ask()
        holding = Holding(session, granted.lease, neighbours=before - free_memory())
        if isinstance(granted.lease, WriteLease):
            model = publish(holding, granted)
        else:
            if not content:
                check_content(files, granted.lease.layout.identity)
            model = attach(holding, granted)
        keep(holding)
    except BaseException:
        session.close()
        raise
    return model, holding
