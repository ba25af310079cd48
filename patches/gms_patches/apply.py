"""Applying a patch to a live engine: once, reversibly, and not at all where the engine is not as the patch knows it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gms_core.config import settings
from gms_core.errors import EngineUnsupported
from gms_patches.check import in_range
from gms_patches.patch import Kind, Patch
from gms_patches.source import fingerprint, parameters

Build = Callable[[Callable[..., Any]], Callable[..., Any]]

MARKER = "__gms_patch__"
"""Attribute of a patched function: the name of the patch."""

_lock = threading.RLock()
_applied: dict[str, Applied] = {}


@dataclass(frozen=True, slots=True)
class Applied:
    """A patch in force."""

    patch: Patch
    owner: Any
    attribute: str
    original: Callable[..., Any]
    replacement: Callable[..., Any]

    def revert(self) -> None:
        """Put the original back. Idempotent.

        Raises:
            EngineUnsupported: Something else has patched the same function since, and would be lost.
        """
        with _lock:
            if _applied.get(self.patch.name) is not self:
                return
            if inspect.getattr_static(self.owner, self.attribute) is not self.replacement:
                raise EngineUnsupported(
                    f"{self.patch.target} was patched by something else after {self.patch.name}", hint="Revert that patch first, or restart."
                )
            setattr(self.owner, self.attribute, self.original)
            del _applied[self.patch.name]


def apply(patch: Patch, build: Build) -> Applied:
    """Put a patch in force. Applying it again changes nothing and returns what is in force.

    Args:
        patch: What is patched, and under which conditions.
        build: Makes the function that takes the original's place.

    Raises:
        EngineUnsupported: The engine's version, or its function, is not one that the patch knows. Nothing was changed.
            ``GMS_ALLOW_UNTESTED_ENGINE=1`` lifts the check of version and code, never the one of the parameters.
    """
    with _lock:
        if (existing := _applied.get(patch.name)) is not None:
            return existing
        owner, attribute = _owner(patch)
        original = inspect.getattr_static(owner, attribute)
        _check(patch, original)
        replacement = functools.update_wrapper(build(original), original)
        setattr(replacement, MARKER, patch.name)
        setattr(owner, attribute, replacement)
        applied = _applied[patch.name] = Applied(patch, owner, attribute, original, replacement)
        return applied


@contextlib.contextmanager
def applied(patch: Patch, build: Build) -> Iterator[None]:
    """Keep a patch in force for a while. One that is in force already stays in force afterwards."""
    with _lock:
        was_applied = patch.name in _applied
        result = apply(patch, build)
    try:
        yield
    finally:
        if not was_applied:
            result.revert()


def in_force() -> list[str]:
    """Names of the patches in force in this process."""
    with _lock:
        return sorted(_applied)


def _owner(patch: Patch) -> tuple[Any, str]:
    module, _, path = patch.target.partition(":")
    *outer, attribute = path.split(".")
    try:
        owner: Any = importlib.import_module(module)
        for name in outer:
            owner = getattr(owner, name)
        inspect.getattr_static(owner, attribute)
    except (ImportError, AttributeError) as error:
        raise EngineUnsupported(f"patch {patch.name}: {patch.target} is not there ({error})", hint=_hint(patch)) from error
    return owner, attribute


def _check(patch: Patch, original: object) -> None:
    if not inspect.isfunction(original):
        raise EngineUnsupported(f"patch {patch.name}: {patch.target} is a {type(original).__name__}, not a plain function", hint=_hint(patch))
    found = parameters(original)
    if found not in patch.signatures:
        expected = " or ".join(f"({accepted})" for accepted in patch.signatures)
        raise EngineUnsupported(f"patch {patch.name}: {patch.target} takes ({found}), expected {expected}", hint=_hint(patch))
    if settings().allow_untested_engine:
        return
    version = installed_version(patch.distributions)
    if patch.versions and not in_range(version, patch.versions):
        raise EngineUnsupported(f"patch {patch.name} was tested with {patch.versions}, not with {version or 'an unknown version'}", hint=_hint(patch))
    if patch.kind is Kind.REPLACE and _live_fingerprint(original) not in patch.fingerprints:
        raise EngineUnsupported(f"patch {patch.name}: the code of {patch.target} is not the code that it was written for", hint=_hint(patch))


def _live_fingerprint(function: Callable[..., Any]) -> str:
    try:
        return fingerprint(inspect.getsource(function))
    except OSError:
        return ""


def _hint(patch: Patch) -> str:
    tested = f"{patch.distributions[0]} {patch.versions}" if patch.versions else f"another version of {patch.distributions[0]}"
    return f"Use {tested}, a newer GMS, or GMS_ALLOW_UNTESTED_ENGINE=1 at your own risk; `gms patches check` shows what differs."


def installed_version(distributions: tuple[str, ...]) -> str:
    """Version of the first of these distributions that is installed; empty if none is."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""
