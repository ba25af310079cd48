"""SGLang's file of load figures in /dev/shm. SGLang never removes it, so each engine would leave one behind, however it ends."""

from __future__ import annotations

import os
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

_KIND = "shared_memory"
_FOLDER = "/dev/shm"  # noqa: S108 - as SGLang has it


def expect_load_file(port_args: Any) -> None:
    """Have the name go with the engine. Called before the schedulers make the file.

    Args:
        port_args: SGLang's ``PortArgs``.
    """
    path = _path(port_args)
    if path.parent == Path(_FOLDER):
        resource_tracker.register(f"/{path.name}", _KIND)


def unname_load_file(port_args: Any, manager: Any) -> None:
    """Remove the name, once everybody has the file open: the schedulers, which are up, and this process, which opens it here.

    Args:
        port_args: SGLang's ``PortArgs``.
        manager: SGLang's ``TokenizerManager``.
    """
    path = _path(port_args)
    if path.parent == Path(_FOLDER) and manager.load_snapshot_reader.read_all():
        os.unlink(path)
        resource_tracker.unregister(f"/{path.name}", _KIND)


def _path(port_args: Any) -> Path:
    from sglang.srt.managers.load_snapshot import shm_path_for

    return Path(shm_path_for(port_args.instance_id))
