"""Which processors are near a GPU, as far as the kernel's files tell: no library is asked, so nothing is initialised."""

from __future__ import annotations

import os
from pathlib import Path

GPUS = Path("/proc/driver/nvidia/gpus")
"""The driver has a directory there for each GPU, named after its place on the bus."""
PCI = Path("/sys/bus/pci/devices")


def processors_near(device: str, *, gpus: Path = GPUS, pci: Path = PCI) -> frozenset[int]:
    """Processors of the NUMA node of a GPU; empty where that is not known, such as for an instance of a GPU, or for host memory.

    Args:
        device: The GPU's UUID.
        gpus: Where the driver tells of GPUs.
        pci: Where the kernel tells of the bus.
    """
    try:
        for place in gpus.iterdir():
            if device in (place / "information").read_text().split():
                node = pci / place.name.lower()
                if int((node / "numa_node").read_text()) < 0:  # the firmware does not tell
                    return frozenset()
                return parse_processors((node / "local_cpulist").read_text())
    except (OSError, ValueError):
        pass
    return frozenset()


def parse_processors(text: str) -> frozenset[int]:
    """Understand a list of processors as the kernel writes it: ``0-3,8``.

    Raises:
        ValueError: It is no such list.
    """
    found: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def stay_near(device: str) -> None:
    """Have this thread, and those that it starts, run on processors near a GPU alone, as far as it may run on any of them."""
    chosen = processors_near(device) & os.sched_getaffinity(0)
    if chosen:
        os.sched_setaffinity(0, chosen)
