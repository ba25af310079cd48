"""Transfer backends by their names: those that GMS brings along, each imported when it is wanted, and those of plugins."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import NamedTuple

from gms_core.errors import BackendUnavailable, InvalidArgument
from gms_core.plugins.loading import load
from gms_core.snapshot.transfer import TransferBackend

DEFAULT = "staged"
FOR_OBJECTS = "object"
"""The default where the root is in an object store."""


class _Place(NamedTuple):
    module: str
    attribute: str


_BUILT_IN: Mapping[str, _Place] = {
    "staged": _Place("gms_core.snapshot.backends.preadv", "STAGED"),
    "aio": _Place("gms_core.snapshot.backends.aio", "AIO"),
    "uring": _Place("gms_core.snapshot.backends.uring", "URING"),
    "object": _Place("gms_core.snapshot.backends.object", "OBJECT"),
    "local-ssd-pinned": _Place("gms_core.snapshot.backends.pinned", "PINNED"),
    "nixl-posix": _Place("gms_core.snapshot.backends.nixl_posix", "NIXL_POSIX"),
    "nixl-posix-direct": _Place("gms_core.snapshot.backends.nixl_direct", "NIXL_POSIX_DIRECT"),
    "nixl-gds": _Place("gms_core.snapshot.backends.nixl_direct", "NIXL_GDS"),
    "nixl-ucx": _Place("gms_core.snapshot.backends.nixl_ucx", "NIXL_UCX"),
    "cufile-gds": _Place("gms_core.snapshot.backends.cufile_gds", "CUFILE_GDS"),
}
ALIASES: Mapping[str, str] = {"preadv": "staged", "cpu-staged": "staged", "local-ssd-striped": "staged"}
"""Other names of the field for the same: with several roots each one has a queue and threads of its own in any case."""


def names() -> tuple[str, ...]:
    """Of all backends: those of GMS, the default first, then those of plugins. Aliases are not among them."""
    return (*_BUILT_IN, *sorted(_plugged().keys()))


def find(name: str) -> TransferBackend:
    """The backend of a name, or of an alias.

    Raises:
        InvalidArgument: There is none; the hint names those that there are.
    """
    place = _BUILT_IN.get(ALIASES.get(name, name))
    if place is not None:
        found = getattr(importlib.import_module(place.module), place.attribute)
        assert isinstance(found, TransferBackend)
        return found
    plugged = _plugged()
    if name not in plugged:
        raise InvalidArgument(f"there is no transfer backend {name!r}", hint=f"There are {', '.join((*_BUILT_IN, *sorted(plugged), *ALIASES))}.")
    return plugged[name]


def usable(name: str) -> TransferBackend:
    """The backend of a name, if it can be used on this machine.

    Raises:
        InvalidArgument: There is none of that name.
        BackendUnavailable: It cannot be used here; the message says why.
    """
    backend = find(name)
    probe = backend.probe()
    if not probe.usable:
        hint = "" if backend.name in (DEFAULT, FOR_OBJECTS) else f"The backend {DEFAULT!r} works on every machine."
        raise BackendUnavailable(f"the transfer backend {backend.name!r} cannot be used here: {probe.reason}", hint=hint)
    return backend


def _plugged() -> dict[str, TransferBackend]:
    """Those of plugins. A name that GMS has itself stays its own."""
    found = load().collect("gms_transfer_backends", TransferBackend)  # type: ignore[type-abstract]
    return {backend.name: backend for backend in found if backend.name not in _BUILT_IN and backend.name not in ALIASES}
