"""vLLM's own way to bind its address, led to an address at which nobody listens yet."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gms_core.engine_config import FailoverConfig
from gms_core.failover.front_end.gate import beside, check_path, check_unused, take_path

_OPTION = "--uds"

_set_up_in = 0


def is_set_up() -> bool:
    """Whether this process has bound an address through `set_up`."""
    return _set_up_in == os.getpid()


def set_up(original: Callable[..., Any], arguments: Any, failover: FailoverConfig, *, reuse_port: bool) -> tuple[str, socket.socket]:
    """Bind the engine's address as its gate needs it.

    Args:
        original: vLLM's ``setup_server``, which checks the arguments too.
        arguments: Of the command line.
        failover: How the engine fails over.
        reuse_port: What vLLM wants anyway.

    Returns:
        What vLLM's function returns: the address for people, and the socket.

    Raises:
        ConfigurationError: The path of a Unix socket cannot be used.
    """
    global _set_up_in
    if arguments.uds:
        address, listener = _set_up_path(original, arguments, failover, reuse_port=reuse_port)
    else:
        address, listener = original(arguments, reuse_port=reuse_port or failover.gate == "port")
    _set_up_in = os.getpid()
    return address, listener


def _set_up_path(original: Callable[..., Any], arguments: Any, failover: FailoverConfig, *, reuse_port: bool) -> tuple[str, socket.socket]:
    wanted = Path(arguments.uds)
    check_path(wanted, _OPTION)
    if failover.gate == "503":
        check_unused(wanted, _OPTION)
    try:
        # vLLM binds whatever it is told. The file under this name is of no use: only a socket that has no name yet can be given one later.
        arguments.uds = str(beside(wanted))
        _, bound = original(arguments, reuse_port=reuse_port)
        bound.close()
        os.unlink(arguments.uds)
    finally:
        arguments.uds = str(wanted)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if failover.gate == "503":
        take_path(listener, wanted)
    return f"unix:{wanted}", listener
