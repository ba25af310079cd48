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
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path

from gms_core.allowed import allowed
from gms_core.devices import DeviceId
from gms_core.errors import GmsError
from gms_core.quotas import Quota, decode_quotas
from gms_core.runtime_dir import socket_path
from gms_core.server.adoption import Estate, take_over
from gms_core.server.exit_codes import HANDED_OVER
from gms_core.server.heap import Heap
from gms_core.server.limits import Limits
from gms_core.server.listener import Listener, bound_socket
from gms_core.server.memory import Memory
from gms_core.server.service import Service
from gms_core.vmm import open_physical_driver
from gms_core.vmm.driver import PhysicalDriver

log = logging.getLogger(__name__)

CHECK_KEEPER_S = 2.0
"""Seconds between two looks at whether the keeper is there."""
TRIM_S = 30.0
"""Seconds between two looks at whether the server holds much free memory."""
_HANDED_OVER = "another server takes over"
_LEFT_TO_SYSTEMD = "it was told to end, and systemd has the memory"


async def serve_device(
    device: DeviceId,
    directory: Path,
    *,
    host_memory: int | None,
    keep_s: float,
    stored: bool,
    allow: Sequence[str],
    quotas: Sequence[Quota],
    lifeline: int,
    ready: FileIO,
) -> int:
    """Serve one device until SIGTERM or SIGINT, until the supervisor has gone, or until another server asks for everything.

    Args:
        device: Which one.
        directory: The runtime directory, prepared.
        host_memory: Bytes that the ``host`` device offers; None for all that the machine has.
        keep_s: Seconds for which the memory is kept without a server.
        stored: Whether the supervisor is the keeper, and systemd decides what becomes of the memory.
        allow: Who may use the server besides its own user and root; see `gms_core.allowed`.
        quotas: What users and pools may have.
        lifeline: Descriptor of a pipe whose other end the supervisor holds: its end is the supervisor's end.
        ready: Pipe to which one line is written once clients can connect; closed then.

    Returns:
        The exit code.

    Raises:
        GmsError: The device or the socket cannot be had.
    """
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[str] = loop.create_future()

    def leave(why: str) -> None:
        if not stop.done():
            stop.set_result(why)

    def supervisor_gone() -> None:
        loop.remove_reader(lifeline)
        leave("the supervisor has gone")

    for number in (signal.SIGTERM, signal.SIGINT):
        # To systemd a restart is a stop and a start: whether there is a next server it alone knows, and closes what it keeps if there is none.
        loop.add_signal_handler(number, leave, _LEFT_TO_SYSTEMD if stored else "")
    loop.add_reader(lifeline, supervisor_gone)
    path, admitted = socket_path(device, directory), allowed(allow)
    driver = open_physical_driver(device, host_memory)
    # The lock goes last: until then the keeper and the journal are this one's.
    with bound_socket(path, admitted.files) as listening, contextlib.ExitStack() as ends:
        estate, memory, service = _begin(device, path, driver, keep_s, stored, quotas, lambda: leave(_HANDED_OVER))
        ends.callback(estate.leave)
        ends.callback(memory.close)
        minding = [asyncio.create_task(_check_keeper(memory)), asyncio.create_task(_trim(Heap()))]
        listener = asyncio.create_task(Listener(listening, service, os.getuid(), admitted).run())
        ready.write(b"ready\n")
        ready.close()
        log.info("serving %s at %s", device, path)
        await asyncio.wait((listener, stop), return_when=asyncio.FIRST_COMPLETED)
        for task in (listener, *minding):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        why = stop.result() if stop.done() else "it has failed"
        if not why:
            estate.end()  # first: to end what the device is being asked for may take longer than there is time
    log.info("stopped serving %s%s", device, f", and left everything to the next server: {why}" if why else "")
    return HANDED_OVER if why == _HANDED_OVER else 0


def _begin(
    device: DeviceId, path: Path, driver: PhysicalDriver, keep_s: float, stored: bool, quotas: Sequence[Quota], on_hand_over: Callable[[], None]
) -> tuple[Estate, Memory, Service]:
    """Go on with what the last server has left, or, if that is beyond this one, begin anew: a device without a server is worse."""
    limits = Limits(keep_s=keep_s).within(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    while True:
        estate = take_over(path, device, None if stored else keep_s)
        memory = Memory(driver, limits, estate.keeping)
        service = Service(device, memory, limits, estate.journal, None if stored else on_hand_over, quotas)
        try:
            memory.adopt(estate.allocations, estate.state.about.allocation if estate.state.about else 0)
            estate.keeping.everything = memory.kept
            service.adopt(estate.state, estate.keeping.label)
            service.durable.write()
        except (GmsError, OSError):  # such as no more files: the supervisor tries again
            memory.close()
            estate.leave()
            raise
        except Exception:
            if not estate.state.with_memory:
                raise
            log.exception("what the last server of %s has left cannot be taken over: everything begins anew", device)
            service.stop()
            memory.give_up()
            estate.end()
        else:
            return estate, memory, service


async def _check_keeper(memory: Memory) -> None:
    while True:
        await asyncio.sleep(CHECK_KEEPER_S)
        memory.check_keeper()


async def _trim(heap: Heap) -> None:
    while True:
        await asyncio.sleep(TRIM_S)
        heap.trim()


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
    parser.add_argument("--keep", type=float, required=True)
    parser.add_argument("--stored", action="store_true")
    parser.add_argument("--allow", action="append", default=[])
    parser.add_argument("--quotas", type=decode_quotas, default=())
    parser.add_argument("--lifeline", type=int, required=True)
    parser.add_argument("--ready", type=int, required=True)
    options = parser.parse_args(arguments)
    for pipe in (options.lifeline, options.ready):
        os.set_inheritable(pipe, False)  # they are this process's, and not the keeper's, which outlives it
    _raise_descriptor_limit()
    ready = FileIO(options.ready, "w")
    try:
        return asyncio.run(
            serve_device(
                DeviceId(options.device),
                options.runtime_dir,
                host_memory=options.host_memory,
                keep_s=options.keep,
                stored=options.stored,
                allow=options.allow,
                quotas=options.quotas,
                lifeline=options.lifeline,
                ready=ready,
            )
        )
    except GmsError as error:
        try:
            ready.write(json.dumps([error.code, error.message, error.hint]).encode())
        except (OSError, ValueError):  # the supervisor has gone, or the pipe was closed because clients could connect
            log.error("%s", error)
        return 1
