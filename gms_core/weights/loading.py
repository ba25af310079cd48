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
            publishing = Publishing(holding, granted.lease, granted.wait_seconds, identity, files)
            model, manifest = publish(granted.lease)
            publishing.end(manifest)
        else:
            if not identity.fields.get("content"):
                check_content(files, granted.lease.layout.identity)
            model = attach_with(holding, granted.lease, granted.wait_seconds, attach)
        keep(holding)
    except BaseException:
        session.close()
        raise
    return model, holding


class Publishing:
    """A load with a write lease, from the grant to the commit: for engines that call back nobody in between.

    Args:
        holding: Of the lease.
        lease: The model is loaded into its arena.
        wait_seconds: What waiting for the lease took.
        identity: Of what is loaded.
        files: Of the checkpoint, as far as they lie on this machine; their digest is read from now on.
    """

    def __init__(self, holding: Holding, lease: WriteLease, wait_seconds: float, identity: Identity, files: Sequence[Path]) -> None:
        self._holding, self._lease, self._wait_seconds = holding, lease, wait_seconds
        self._start = time.perf_counter()
        self._checkpoint_bytes = sum(path.stat().st_size for path in files) if files else -1
        self._identity = final_identity(identity, files)

    def end(self, manifest: bytes) -> None:
        """Make what is loaded read-only, and publish it, now or once the engine is ready (see `gms_core.weights.holdings`).

        Raises:
            GmsError: It could not be published.
        """
        self._lease.trim()
        self._lease.arena.set_access(Access.READ)
        seconds = time.perf_counter() - self._start
        commit(Due(self._holding, self._lease, manifest, self._identity, seconds, self._wait_seconds, self._checkpoint_bytes))


def attach_with(holding: Holding, lease: ReadLease, wait_seconds: float, attach: Callable[[ReadLease], Model]) -> Model:
    """Make a model on top of a committed layout, and tell of it.

    Args:
        holding: Of the lease.
        lease: On the layout.
        wait_seconds: What waiting for the lease took.
        attach: Makes the model.
    """
    start = time.perf_counter()
    model = attach(lease)
    layout = lease.layout
    holding.external_bytes = layout.size
    report(holding, Figures("attached", lease.pool, layout.generation, layout.size, time.perf_counter() - start, wait_seconds, checkpoint_bytes=0))
    return model
