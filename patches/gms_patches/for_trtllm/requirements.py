"""What is checked in an engine's source: versions with the load format need other symbols than those without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from gms_core.plugins.engines import EngineSource
from gms_core.plugins.findings import Status, Verdict
from gms_patches.check import check_patch, check_symbol
from gms_patches.for_trtllm.patches import (
    BUILD_MANAGERS,
    LOAD_MODEL,
    MATERIALISE_MEMORY,
    PREPARE_ESTIMATION,
    RELEASE_MEMORY,
    RELOAD_MODEL,
    SERVE,
)
from gms_patches.for_trtllm.symbols import ADAPTER, COMMON, LOAD_FORMAT, NATIVE, PLACING
from gms_patches.patch import Patch, Symbol
from gms_patches.source import find

Requirement = Callable[[EngineSource], Verdict]


def if_native(native: bool, target: str, requirement: Requirement) -> Requirement:
    """A requirement of versions that have the load format themselves, or of the others.

    Args:
        native: Of which.
        target: What it looks at.
        requirement: The verdict on it.
    """

    def judge(source: EngineSource) -> Verdict:
        if (find(LOAD_FORMAT, source.text) is not None) is not native:
            return Verdict(target, Status.OK, f"not needed: this version has {'no ' if native else ''}LoadFormat.GMS")
        return requirement(source)

    return judge


def where_present(target: str, requirement: Requirement) -> Requirement:
    """A requirement of something that a version need not have."""

    def judge(source: EngineSource) -> Verdict:
        return requirement(source) if find(target, source.text) is not None else Verdict(target, Status.OK, "not there, and not needed then")

    return judge


def symbols(table: Sequence[Symbol], *, native: bool) -> tuple[Requirement, ...]:
    """Requirements of a table of symbols."""
    return tuple(if_native(native, symbol.target, partial(check_symbol, symbol)) for symbol in table)


def patch(one: Patch, *, native: bool, optional: bool = False) -> Requirement:
    """The requirement of a patch."""
    found: Requirement = partial(check_patch, one)
    return if_native(native, one.name, where_present(one.target, found) if optional else found)


_WHERE_PRESENT = (RELEASE_MEMORY, MATERIALISE_MEMORY, SERVE, PREPARE_ESTIMATION, BUILD_MANAGERS)

REQUIREMENTS: tuple[Requirement, ...] = (
    *(partial(check_symbol, symbol) for symbol in COMMON),
    *symbols(NATIVE, native=True),
    patch(LOAD_MODEL, native=False),
    patch(RELOAD_MODEL, native=False, optional=True),
    *symbols(ADAPTER, native=False),
    *(where_present(one.target, partial(check_symbol, one)) for one in PLACING),
    *(
        where_present(one.target, partial(check_patch, one))
        for one in (RELEASE_MEMORY, MATERIALISE_MEMORY, SERVE, PREPARE_ESTIMATION, BUILD_MANAGERS)
    ),
)
"""All checks of the adapter, in the form that `gms_core.plugins.engines.EngineAdapter` takes."""
