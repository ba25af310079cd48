"""One load of an engine: as the lease that it is granted says, it publishes the weights or attaches to them, and what it holds is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from gms_core.client import ReadLease, Session, WriteLease
from gms_core.layout import Identity
from gms_core.vmm.driver import Access
from gms_core.weights.holdings import Due, Figures, Holding, commit, keep, report
from gms_core.weights.identity import check_content, final_identity
from gms_core.weights.leases import Granted

Model = TypeVar("Model")


def publish_or_attach(
    session: Session,
    ask: Callable[[], Granted],
    *,
    publish: Callable[[WriteLease], tuple[Model, bytes]],
    attach: Callable[[ReadLease], Model],
    free_memory: Callable[[], int],
    identity: Identity,
    files: Sequence[Path],
) -> tuple[Model, Holding]:
    """Load, and keep session, lease and arena for the life of this process.

    What is loaded with a write lease is read-only from then on, and published now, or once the engine is ready (see `gms_core.weights.holdings`).

    Args:
        session: With the server of this rank's device. It is closed if anything is raised.
        ask: Gets this rank's lease.
        publish: Loads into the arena of a write lease; returns the model and its manifest.
        attach: Makes the model on top of a committed layout.
        free_memory: Bytes of the device that are free now.
        identity: Of what is asked for. If the content is empty in it, it is compared before attaching, and becomes known while publishing.
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
            model = _publish(holding, granted.lease, granted.wait_seconds, publish, identity, files)
        else:
            if not identity.fields.get("content"):
                check_content(files, granted.lease.layout.identity)
            model = _attach(holding, granted.lease, granted.wait_seconds, attach)
        keep(holding)
    except BaseException:
        session.close()
        raise
    return model, holding


def _publish(
    holding: Holding,
    lease: WriteLease,
    wait_seconds: float,
    publish: Callable[[WriteLease], tuple[Model, bytes]],
    identity: Identity,
    files: Sequence[Path],
) -> Model:
    start = time.perf_counter()
    checkpoint_bytes = sum(path.stat().st_size for path in files) if files else -1
    final = final_identity(identity, files)  # it reads the files' digest while they are loaded
    model, manifest = publish(lease)
    lease.trim()
    lease.arena.set_access(Access.READ)
    commit(Due(holding, lease, manifest, final, time.perf_counter() - start, wait_seconds, checkpoint_bytes))
    return model


def _attach(holding: Holding, lease: ReadLease, wait_seconds: float, attach: Callable[[ReadLease], Model]) -> Model:
    start = time.perf_counter()
    model = attach(lease)
    layout = lease.layout
    holding.external_bytes = layout.size
    report(holding, Figures("attached", lease.pool, layout.generation, layout.size, time.perf_counter() - start, wait_seconds, checkpoint_bytes=0))
    return model
