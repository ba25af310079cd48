"""What figures hold for: the machine, and the versions of what was run on it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import gms_core
from gms_core.devices import list_gpus
from gms_core.errors import DriverUnavailable
from tools.bench.document import FileSystem, Gpu, Machine

ROOT = Path(__file__).parents[2]
"""Of the source tree."""
NVIDIA_VERSION = Path("/sys/module/nvidia/version")
GIT_S = 10


def machine(folders: Mapping[str, Path]) -> Machine:
    """This machine, as it is now. What it does not tell is left empty.

    Args:
        folders: That exist, by what will lie there.
    """
    gpus = _gpus()
    commit, modified = _commit()
    return Machine(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        kernel=platform.release(),
        gpus=gpus,
        driver=_driver() if gpus else "",
        file_systems={name: file_system(folder) for name, folder in folders.items()},
        python=platform.python_version(),
        gms=gms_core.__version__,
        commit=commit,
        modified=modified,
        load=round(os.getloadavg()[0], 2),
    )


def file_system(folder: Path, mounts: str | None = None) -> FileSystem:
    """The file system that a directory lies in.

    Args:
        folder: It exists.
        mounts: What the kernel says is mounted, as in ``/proc/self/mountinfo``; None to ask it.
    """
    usage = shutil.disk_usage(folder)
    wanted = folder.resolve()
    kind = source = ""
    longest = -1
    for line in (Path("/proc/self/mountinfo").read_text() if mounts is None else mounts).splitlines():
        before, _, after = line.partition(" - ")
        point = Path(before.split()[4].replace("\\040", " "))
        if wanted.is_relative_to(point) and len(point.parts) >= longest:  # of several mounts at one place the last one is seen
            longest, (kind, source) = len(point.parts), after.split()[:2]
    return FileSystem(kind, source, usage.total, usage.free)


def _cpu() -> str:
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpus() -> tuple[Gpu, ...]:
    try:
        return tuple(Gpu(device.name, device.total_bytes) for device in list_gpus())
    except DriverUnavailable:
        return ()


def _driver() -> str:
    try:
        return NVIDIA_VERSION.read_text().strip()
    except OSError:  # a container may not show it
        import pynvml

        return str(pynvml.nvmlSystemGetDriverVersion())


def _commit() -> tuple[str, bool]:
    """Of the source tree, and whether files differ from it."""
    try:
        found = [
            subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=GIT_S, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return "", False
    return found[0], bool(found[1])
