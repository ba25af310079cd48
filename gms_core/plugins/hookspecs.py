"""The hooks that a plugin can implement. Each is one sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import click

    from gms_core.failover.status import RoleChange
    from gms_core.plugins.engines import EngineAdapter
    from gms_core.plugins.findings import Check
    from gms_core.snapshot.transfer import TransferBackend

hookspec = pluggy.HookspecMarker("gms")
hookimpl = pluggy.HookimplMarker("gms")


@hookspec
def gms_engines() -> list[EngineAdapter]:  # type: ignore[empty-body]
    """Return the engines that the plugin has an adapter for."""


@hookspec
def gms_doctor_checks() -> list[Check]:  # type: ignore[empty-body]
    """Return the checks that ``gms doctor`` runs."""


@hookspec
def gms_transfer_backends() -> list[TransferBackend]:  # type: ignore[empty-body]
    """Return the backends that the plugin can move a snapshot's bytes with."""


@hookspec
def gms_commands(group: click.Group) -> None:
    """Add commands to the ``gms`` command."""


@hookspec
def gms_role_changed(change: RoleChange) -> None:
    """Learn that the engine of this process has another role, in its first API server and after the change is real."""
