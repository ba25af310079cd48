"""What a patch and a relied-on symbol are: data, with no behaviour of their own."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Kind(enum.StrEnum):
    """How a patch treats its target."""

    WRAP = "wrap"
    """The replacement calls the original; its signature must be known."""
    REPLACE = "replace"
    """The replacement stands in for the original; the original's very code must be known."""


@dataclass(frozen=True, slots=True)
class Symbol:
    """Something of an engine that an adapter uses, and how it expects it.

    Attributes:
        target: ``module:qualified.name``; a class's attribute may be a method, a field, or what its methods assign to ``self``.
        feature: What the adapter needs it for.
        signatures: Parameter lists that are accepted, as `gms_patches.check.parameters` writes them; empty if only its presence matters.
        versions: Engine versions in which it must be there; empty for all. Elsewhere the adapter does without it.
    """

    target: str
    feature: str
    signatures: tuple[str, ...] = ()
    versions: str = ""


def group(feature: str, module: str, names: dict[str, tuple[str, ...]], versions: str = "") -> tuple[Symbol, ...]:
    """Symbols of one module that are needed for the same thing: their names, each with the parameter lists that are accepted."""
    return tuple(Symbol(f"{module}:{name}", feature, signatures, versions) for name, signatures in names.items())


@dataclass(frozen=True, slots=True)
class Patch:
    """A change of one function of an engine. What takes the function's place is given when the patch is applied.

    Attributes:
        name: Short and stable, for logs and for the marker on the patched function.
        target: ``module:qualified.name`` of a plain function or method.
        kind: Whether it calls the original.
        distributions: Names under which the engine is installed; the first that is found counts.
        versions: Engine versions that it was tested with; empty where its target's parameters alone decide.
        signatures: Parameter lists of the target that it accepts.
        fingerprints: Fingerprints of the target's source that it accepts; a patch that replaces has at least one.
        reason: Why it exists, in a sentence.
        upstream: Where the engine's project discusses it, or the seam that would make it unnecessary.
        unnecessary_from: The engine version from which it is no longer needed; empty while there is none.
        necessary_from: The engine version from which it is needed, because the function was elsewhere before; empty for all.
    """

    name: str
    target: str
    kind: Kind
    distributions: tuple[str, ...]
    versions: str
    signatures: tuple[str, ...]
    reason: str
    fingerprints: tuple[str, ...] = ()
    upstream: str = ""
    unnecessary_from: str = ""
    necessary_from: str = ""
