"""What ``gms run --restore`` runs before engines start: ``gms snapshot restore``, once it is known that there is such a snapshot."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from gms_core.errors import InvalidArgument


def restore_command(wanted: str | None, roots: Sequence[Path | str], devices: Sequence[str], directory: Path) -> tuple[str, ...] | None:
    """The command; None if nothing is to be restored.

    Args:
        wanted: ``NAME`` or ``NAME@VERSION``.
        roots: As the user has named them; none for those of the environment.
        devices: As the user has named them.
        directory: Of the servers' sockets.

    Raises:
        InvalidArgument: There are roots, and nothing to restore from them.
        GmsError: There is no such snapshot.
    """
    if wanted is None:
        if roots:
            raise InvalidArgument("--root is of no use without --restore", hint="Name the snapshot with --restore, or leave --root out.")
        return None
    from gms_core.cli.serve import ALL
    from gms_core.snapshot.config import snapshot_config
    from gms_core.snapshot.shelves import open_shelf

    with open_shelf(snapshot_config({"roots": tuple(roots)}).roots).find(wanted):
        pass
    words = [word for root in roots for word in ("--root", str(root))]
    words += [word for device in devices if device != ALL for word in ("--device", device)]
    return (sys.executable, "-P", "-m", "gms_core.cli", "snapshot", "restore", wanted, "--if-missing", "--runtime-dir", str(directory), *words)
