"""Asks several servers at once for their state, in a short time: one that hangs keeps no other's answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gms_core.client.question import ask_once
from gms_core.errors import GmsError
from gms_core.protocol.messages import Status, StatusReport

log = logging.getLogger(__name__)

CLIENT = "gms metrics"
ANSWER_S = 2.0
"""Seconds that a server has to answer; less than those in which Prometheus wants all of it."""


def scrape(sockets: Sequence[Path], limit_s: float = ANSWER_S) -> list[tuple[str, StatusReport | None]]:
    """What each server says.

    Args:
        sockets: Of the servers; a socket's name is the device's.
        limit_s: Seconds that all of it may take.

    Returns:
        Device and report, in the same order; None for a server that does not answer.
    """
    if not sockets:
        return []
    with ThreadPoolExecutor(len(sockets), thread_name_prefix="gms-scrape") as threads:
        return list(threads.map(lambda path: (path.stem, _report(path, limit_s)), sockets))


def _report(path: Path, limit_s: float) -> StatusReport | None:
    try:
        return ask_once(path, Status(brief=True), StatusReport, client=CLIENT, limit_s=limit_s)
    except (GmsError, OSError) as error:
        log.debug("no metrics of %s: %s", path.stem, error)
        return None
