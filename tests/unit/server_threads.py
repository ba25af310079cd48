"""A device server in a thread of the test's own process, for what has to be set inside of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from gms_core.allowed import Allowed
from gms_core.server.limits import Limits
from gms_core.server.listener import Listener, bound_socket
from gms_core.server.memory import Memory
from gms_core.server.service import Service
from gms_core.vmm.host import HostDriver


@contextlib.contextmanager
def server_in_thread(directory: Path, limits: Limits | None = None, *, memory_bytes: int = 2**20, admitted: Allowed | None = None) -> Iterator[Path]:
    """Serve host memory in a runtime directory that is there; gives the socket."""
    limits, admitted = limits or Limits(), admitted or Allowed()
    path, ready, stop, loops = directory / "host.sock", threading.Event(), asyncio.Event(), []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        with contextlib.closing(Memory(HostDriver(memory_bytes), limits)) as memory, bound_socket(path, admitted.files) as bound:
            listener = asyncio.create_task(Listener(bound, Service("host", memory, limits), os.getuid(), admitted).run())
            ready.set()
            await stop.wait()
            listener.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listener

    thread = threading.Thread(target=asyncio.run, args=[serve()])
    thread.start()
    assert ready.wait(10)
    try:
        yield path
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join()
