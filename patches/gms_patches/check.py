"""Verdicts on an engine's source, installed or in a wheel: is everything that an adapter relies on there, as it expects it?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from gms_core.plugins.engines import EngineSource
from gms_core.plugins.findings import Status, Verdict
from gms_patches.patch import Kind, Patch, Symbol
from gms_patches.source import Found, find

_FIX = "Install a version that this adapter was tested with, or update GMS."


def in_range(version: str, versions: str) -> bool:
    """Whether a version lies in a range; pre-releases and local builds count by their release, and what is no version does not."""
    try:
        return SpecifierSet(versions).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def is_needed(patch: Patch, version: str) -> bool:
    """Whether a patch has a part in this version of the engine."""
    after = not patch.necessary_from or in_range(version, f">={patch.necessary_from}")
    return after and not (patch.unnecessary_from and in_range(version, f">={patch.unnecessary_from}"))


def check_symbol(symbol: Symbol, source: EngineSource) -> Verdict:
    """Whether a symbol is there, with one of the accepted parameter lists."""
    if symbol.versions and not in_range(source.version, symbol.versions):
        return Verdict(symbol.target, Status.OK, f"not needed in {source.version}, only in {symbol.versions}")
    found = find(symbol.target, source.text)
    if found is None:
        return Verdict(symbol.target, Status.FAIL, f"not found, needed for {symbol.feature}", _FIX)
    return _accepts(symbol.target, symbol.signatures, found)


def check_patch(patch: Patch, source: EngineSource) -> Verdict:
    """Whether a patch can be applied: version, parameter list and, where it replaces, the code."""
    if patch.unnecessary_from and in_range(source.version, f">={patch.unnecessary_from}"):
        return Verdict(patch.name, Status.OK, f"not needed from {patch.unnecessary_from} on")
    if patch.necessary_from and in_range(source.version, f"<{patch.necessary_from}"):
        return Verdict(patch.name, Status.OK, f"not needed before {patch.necessary_from}")
    found = find(patch.target, source.text)
    if found is None:
        return Verdict(patch.name, Status.FAIL, f"{patch.target} not found", _FIX)
    verdict = _accepts(patch.name, patch.signatures, found)
    if verdict.status is Status.OK and patch.kind is Kind.REPLACE and found.fingerprint not in patch.fingerprints:
        return Verdict(patch.name, Status.FAIL, f"the code of {patch.target} has changed: fingerprint {found.fingerprint} is not known", _FIX)
    if verdict.status is Status.OK and patch.versions and not in_range(source.version, patch.versions):
        return Verdict(patch.name, Status.WARN, f"{source.version} is outside the tested range {patch.versions}", _FIX)
    return verdict


def _accepts(target: str, signatures: Sequence[str], found: Found) -> Verdict:
    place = f"{found.module}, line {found.line}"
    if not signatures or found.parameters in signatures:
        return Verdict(target, Status.OK, place)
    if found.parameters is None:
        return Verdict(target, Status.FAIL, f"{place}: no longer a function", _FIX)
    expected = " or ".join(f"({accepted})" for accepted in signatures)
    return Verdict(target, Status.FAIL, f"{place}: parameters ({found.parameters}), expected {expected}", _FIX)


def requirements(symbols: Sequence[Symbol], patches: Sequence[Patch]) -> tuple[Callable[[EngineSource], Verdict], ...]:
    """All checks of an adapter, in the form that `gms_core.plugins.engines.EngineAdapter` takes."""
    return (*(partial(check_patch, patch) for patch in patches), *(partial(check_symbol, symbol) for symbol in symbols))
