"""What checks report: findings of this machine, verdicts on an engine."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gms_core.config import Settings


class Status(enum.StrEnum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of a check of this machine.

    Attributes:
        status: ``fail`` if GMS cannot work so, ``warn`` if a part of it cannot.
        what: What was looked at.
        evidence: What was seen.
        fix: What to do about it; empty when there is nothing to do.
    """

    status: Status
    what: str
    evidence: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """A check that ``gms doctor`` runs.

    Attributes:
        name: One or two words.
        run: Looks, and reports; it may raise a `GmsError`, which is then a finding that fails.
    """

    name: str
    run: Callable[[Settings], Iterable[Finding]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one thing that an adapter needs of an engine is there, as it expects it.

    Attributes:
        target: The symbol or the patch, such as ``vllm.v1.worker.gpu_worker:Worker.load_model``.
        status: ``warn`` for what is there but has not been tested so.
        evidence: What was seen, such as the signature that differs.
        fix: What to do about it; empty when there is nothing to do.
    """

    target: str
    status: Status
    evidence: str
    fix: str = ""
