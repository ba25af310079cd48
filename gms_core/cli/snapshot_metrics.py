"""The metrics that a save or a restore leaves in a file."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gms_core.errors import TransferFailed
from gms_core.metrics.transfers import Transfer
from gms_core.snapshot.on_disk import reference

if TYPE_CHECKING:
    from gms_core.snapshot.whole import Outcome

log = logging.getLogger(__name__)


@contextlib.contextmanager
def recorded(path: Path | None, action: str, wanted: str) -> Iterator[Callable[[Outcome], None]]:
    """Write what came of a command to a file once the context ends; what it yields is told the outcome, if there was one.

    Args:
        path: The file; None for none.
        action: ``save`` or ``restore``.
        wanted: The snapshot, as the user has named it.

    Raises:
        ConfigurationError: prometheus_client is missing; nothing was begun.
        TransferFailed: The command has done what it should, but the file cannot be written. When it has failed, that alone is told.
    """
    if path is None:
        yield lambda _: None
        return
    from gms_core.cli.metrics import exposition

    write = exposition("The file of metrics").write_transfer
    outcomes: list[Outcome] = []
    name = reference(wanted).name

    def came_of_it() -> Transfer:
        for outcome in outcomes:
            return Transfer(action, name, time.time(), outcome.manifest.version, tuple(outcome.images))
        return Transfer(action, name, time.time())

    try:
        yield outcomes.append
    except BaseException:
        try:
            write(came_of_it(), path)
        except OSError as error:
            log.warning("the metrics cannot be written to %s: %s", path, error)
        raise
    try:
        write(came_of_it(), path)
    except OSError as error:
        raise TransferFailed(
            f"the {action} is done, but its metrics cannot be written to {path}: {error.strerror or error}", hint="Its directory has to be there."
        ) from error
