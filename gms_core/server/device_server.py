"""The process that owns one device's memory. It maps nothing, creates no context on the device and imports no torch."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import resource
import signal
from io import FileIO
from pathlib import Path

from gms_core.devices import DeviceId
from gms_core.errors import GmsError
from gms_core.runtime_dir import socket_path
from gms_core.server.limits import Limits
from gms_core.server.listener import Listener, bound_socket
from gms_core.server.memory import Memory
from gms_core.server.service import Service
from gms_core.vmm import open_physical_driver

log = logging.getLogger(__name__)


async def serve_device(device: DeviceId, directory: Path, *, host_memory: int | None, lifeline: int, ready: FileIO) -> None:
    """Serve one device until SIGTERM or SIGINT, or until the supervisor has gone.

    Args:
        device: Which one.
        directory: The runtime directory, prepared.
        host_memory: Bytes that the ``host`` device offers; None for all that the machine has.
        lifeline: Descriptor of a pipe whose other end the supervisor holds: its end is the supervisor's end.
        ready: Pipe to which one line is written once clients can connect; closed then.

    Raises:
        GmsError: The device or the socket cannot be had.
    """
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_reader(lifeline, stop.set)
    limits = Limits()
    with (
        contextlib.closing(Memory(open_physical_driver(device, host_memory), limits)) as memory,
        bound_socket(socket_path(device, directory)) as listening,
    ):
        listener = asyncio.create_task(Listener(listening, Service(device, memory, limits), os.getuid()).run())
        ready.write(b"ready\n")
        ready.close()
        log.info("serving %s at %s", device, socket_path(device, directory))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((listener, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        listener.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await listener
    log.info("stopped serving %s", device)


def _raise_descriptor_limit() -> None:
    """One descriptor an allocation and one a session: take all that the hard limit allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run(arguments: list[str]) -> int:
    """The process's main function; returns its exit code, and writes why it failed to the ``ready`` pipe, unless clients could connect already."""
    parser = argparse.ArgumentParser(prog="gms device server")
    parser.add_argument("--device", required=True)
    parser.add_argument("--runtime-dir", type=Path, required=True)
    parser.add_argument("--host-memory", type=int)
    parser.add_argument("--lifeline", type=int, required=True)
    parser.add_argument("--ready", type=int, required=True)
    options = parser.parse_args(arguments)
    _raise_descriptor_limit()
    ready = FileIO(options.ready, "w")
    try:
        asyncio.run(
            serve_device(DeviceId(options.device), options.runtime_dir, host_memory=options.host_memory, lifeline=options.lifeline, ready=ready)
        )
    except GmsError as error:
        try:
            ready.write(json.dumps([error.code, error.message, error.hint]).encode())
        except (OSError, ValueError):  # the supervisor has gone, or the pipe was closed because clients could connect
            log.error("%s", error)
        return 1
    return 0
