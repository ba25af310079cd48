"""Tries what NIXL can do here, in a process of its own: ``python -m gms_core.snapshot.backends.nixl_probe PLUGIN``."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
from typing import Any

from gms_core.errors import BackendUnavailable
from gms_core.snapshot.backends.asking import answer
from gms_core.snapshot.backends.cufile_library import open_driver, refuse_without_kernel_module
from gms_core.snapshot.backends.nixl_agents import Agent, NixlError, Operation, Range, library
from gms_core.snapshot.backends.nixl_posix import PLUGIN, posix_agent
from gms_core.snapshot.buffers import Ring
from gms_core.snapshot.manifest import PAGE_BYTES
from gms_core.snapshot.transfer import Probe

_SIZE = 2 * PAGE_BYTES


def posix() -> Probe:
    """Write a file that lies in memory and read it back; then write two parts of it at once, of which one may not become so long.

    NIXL has to tell that this one has failed, and that the other one has not, whichever of them is begun first.
    """
    file, ring = os.memfd_create("gms-probe"), Ring(2, _SIZE)
    agent = posix_agent(2)
    agent.register("DRAM", [Range(buffer.address, _SIZE, 0) for buffer in ring.buffers])
    agent.register("FILE", [Range(0, 4 * _SIZE, file)])

    def begun(operation: Operation, number: int, position: int) -> Any:
        return agent.begin(operation, "DRAM", Range(ring.buffers[number].address, _SIZE, 0), Range(position, _SIZE, file))

    def went_well(*handles: Any) -> list[bool]:
        """What becomes of requests that are under way at once, each looked at in turn."""
        left, found = dict(enumerate(handles)), {}
        while left:
            for number, handle in list(left.items()):
                with contextlib.suppress(NixlError):
                    found[number] = False
                    if not agent.has_ended(handle):
                        continue
                    found[number] = True
                del left[number]
            time.sleep(0.0001)
        return [found[number] for number in sorted(found)]

    written, read = (buffer.view[:_SIZE] for buffer in ring.buffers)
    written[:] = os.urandom(_SIZE)
    try:
        moves = all((*went_well(begun("WRITE", 0, 0)), *went_well(begun("READ", 1, 0))))
    except NixlError as error:
        return Probe(False, f"NIXL {library().version} cannot move a file: {error}")
    if not moves or bytes(read) != bytes(written) or os.pread(file, _SIZE, 0) != bytes(written):
        return Probe(False, f"NIXL {library().version} does not read what it has written")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_SIZE + PAGE_BYTES, _SIZE + PAGE_BYTES))
    whole, short = (0, True), (_SIZE, False)
    for parts in ((whole, short), (short, whole)):
        try:
            told = went_well(*[begun("WRITE", number, position) for number, (position, _) in enumerate(parts)])
        except NixlError as error:
            return Probe(False, f"NIXL {library().version} cannot write two parts of a file at once: {error}")
        if told != [well for _, well in parts]:
            return Probe(False, f"NIXL {library().version} does not tell when a disk has taken only a part of a write; versions from 1.5 on do")
    return Probe(True, f"NIXL {library().version}")


def gds() -> Probe:
    """Load the plugin, which opens cuFile's driver."""
    refuse_without_kernel_module()
    found = open_driver()
    Agent("GDS_MT", {}).close()
    return Probe(True, f"NIXL {library().version} with {found}")


def ucx() -> Probe:
    """Load the plugin, and let it say how it can be reached."""
    agent = Agent("UCX", {})
    agent.metadata()
    agent.close()
    return Probe(True, f"NIXL {library().version}")


def _tried(plugin: str) -> Probe:
    library()
    if plugin == PLUGIN:
        return posix()
    if plugin == "GDS_MT":
        return gds()
    if plugin == "UCX":
        return ucx()
    raise BackendUnavailable(f"NIXL's plugin {plugin} is not used here")


if __name__ == "__main__":
    answer(lambda: _tried(sys.argv[1]))
