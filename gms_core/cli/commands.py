"""The built-in commands, as a plugin. Each one's module is imported when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gms_core.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from gms_core.cli.group import GmsGroup

COMMANDS = {
    "serve": "gms_core.cli.serve:serve",
    "run": "gms_core.cli.run:run",
    "status": "gms_core.cli.status:status",
    "events": "gms_core.cli.events:events",
    "metrics": "gms_core.cli.metrics:metrics",
    "pool": "gms_core.cli.pool:pool",
    "snapshot": "gms_core.cli.snapshot:snapshot",
    "audit": "gms_core.cli.audit:audit",
    "failover": "gms_core.cli.failover:failover",
    "identity": "gms_core.cli.identity:identity",
    "doctor": "gms_core.cli.doctor:doctor",
    "patches": "gms_core.cli.patches:patches",
    "bench": "gms_core.cli.bench:bench",
}


@hookimpl
def gms_commands(group: GmsGroup) -> None:
    """Add them."""
    for name, target in COMMANDS.items():
        group.add_lazy(name, target)
