"""The built-in checks of ``gms doctor``: each tries the thing itself and shows what it saw."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterable, Iterator
from pathlib import Path

from gms_core import __version__
from gms_core.config import Settings
from gms_core.errors import ConfigurationError, DriverError, GmsError, PermissionRefused
from gms_core.plugins.findings import Check, Finding, Status
from gms_core.plugins.hookspecs import hookimpl

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
NVIDIA_DEVICE = Path("/dev/nvidiactl")
ENOUGH_DESCRIPTORS = 4096
ENOUGH_MAPPINGS = 65530
"""The kernel's default of vm.max_map_count."""


@hookimpl
def gms_doctor_checks() -> list[Check]:
    """The checks, in the order in which a person would ask."""
    return [
        Check("environment", environment),
        Check("host device", host_device),
        Check("GPU driver", gpu_driver),
        Check("GPUs", gpus),
        Check("limits", limits),
        Check("runtime directory", runtime_directory),
        Check("servers", servers),
    ]


def environment(_: Settings) -> Iterable[Finding]:
    """Versions of what runs."""
    evidence = f"gms {__version__}, Python {platform.python_version()}, Linux {platform.release()} {platform.machine()}"
    supported = platform.system() == "Linux"
    return [Finding(Status.OK if supported else Status.FAIL, "platform", evidence, "" if supported else "GMS needs Linux.")]


def host_device(_: Settings) -> Iterator[Finding]:
    """Carry one page of host memory through the whole life of an allocation, seal included."""
    from gms_core.devices import HOST
    from gms_core.vmm import open_driver

    driver = open_driver(HOST)
    try:
        handle = driver.create(driver.granularity)
        sealed = driver.seal(handle)
        info = driver.memory_info()
        yield Finding(Status.OK, "host memory", f"memfd created; {info.free / 2**30:.1f} of {info.total / 2**30:.1f} GiB free")
        fix = "" if sealed else "Linux 5.1 or newer has the seal; until then read-only sharing on the host device is by agreement only."
        evidence = "the kernel refuses new writable mappings of committed memory" if sealed else "the kernel has no F_SEAL_FUTURE_WRITE"
        yield Finding(Status.OK if sealed else Status.WARN, "kernel seals", evidence, fix)
    finally:
        driver.close()


def gpu_driver(_: Settings) -> Iterator[Finding]:
    """Kernel driver, NVML, and the CUDA bindings."""
    if not (NVIDIA_DRIVER.exists() or NVIDIA_DEVICE.exists()):
        fix = "Nothing, for engines on CPU (gms serve --device host). For a GPU: install its driver, or give the container the GPU."
        yield Finding(Status.WARN, "NVIDIA driver", f"neither {NVIDIA_DRIVER} nor {NVIDIA_DEVICE} exists", fix)
        return
    evidence = NVIDIA_DRIVER.read_text().splitlines()[0] if NVIDIA_DRIVER.exists() else f"{NVIDIA_DEVICE} exists"
    yield Finding(Status.OK, "NVIDIA driver", evidence)


def gpus(_: Settings) -> Iterator[Finding]:
    """Each GPU: its UUID as NVML and CUDA report it, and 2 MiB through create, export, import, map and access, without a context."""
    if not (NVIDIA_DRIVER.exists() or NVIDIA_DEVICE.exists()):
        return
    from gms_core.devices import cuda_uuid, list_gpus

    known = list_gpus()
    if not known:
        yield Finding(Status.FAIL, "GPUs", "NVML lists no GPU", "Give this process, or its container, access to the GPU.")
    visible = set()
    for ordinal in range(len(known)):
        try:
            visible.add(cuda_uuid(ordinal))
        except GmsError as error:
            if not visible:
                raise
            yield Finding(
                Status.WARN, "GPUs", f"CUDA shows {ordinal} of {len(known)} GPUs to this process: {error.message}", "See CUDA_VISIBLE_DEVICES."
            )
            break
    for gpu in known:
        name = f"{gpu.id} ({gpu.name})"
        if gpu.id not in visible:
            yield Finding(Status.WARN, name, "NVML lists it, CUDA does not show it to this process", "See CUDA_VISIBLE_DEVICES.")
            continue
        yield _exercise(gpu.id, name)


def _exercise(device: str, name: str) -> Finding:
    """Bring one allocation through its life; a driver without virtual memory management or descriptors fails at a call that has a name."""
    from gms_core.devices import DeviceId
    from gms_core.vmm import open_driver
    from gms_core.vmm.driver import Access
    from gms_core.vmm.undo import UndoStack

    try:
        driver = open_driver(DeviceId(device))
        size = driver.granularity
        with UndoStack() as undo:
            undo.push(driver.close)
            handle = driver.create(size)
            undo.push(driver.release, handle)
            descriptor = driver.export(handle)
            undo.push(os.close, descriptor)
            imported = driver.import_descriptor(descriptor, size)
            undo.push(driver.release, imported)
            address = driver.reserve(size)
            undo.push(driver.free_reservation, address, size)
            driver.map(address, size, imported)
            undo.push(driver.unmap, address, size)
            driver.set_access(address, size, Access.READ)
            info = driver.memory_info()
    except DriverError as error:
        fix = error.hint or "Virtual memory management with POSIX descriptors is needed: update the driver, or leave the confining sandbox."
        return Finding(Status.FAIL, name, error.message, fix)
    free = f"{info.free / 2**30:.1f} of {info.total / 2**30:.1f} GiB free"
    return Finding(Status.OK, name, f"created, exported, imported and mapped {size // 2**20} MiB without a context; {free}")


def limits(_: Settings) -> Iterator[Finding]:
    """Limits of this process that GMS can run into."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    enough = hard == resource.RLIM_INFINITY or hard >= ENOUGH_DESCRIPTORS
    fix = "" if enough else f"Raise the hard limit (ulimit -Hn) to at least {ENOUGH_DESCRIPTORS}: a server holds one per allocation and per session."
    yield Finding(Status.OK if enough else Status.WARN, "open files", f"hard limit {_limit(hard)}", fix)
    addresses = resource.getrlimit(resource.RLIMIT_AS)[0]
    free = addresses == resource.RLIM_INFINITY
    fix = "" if free else "Lift it (ulimit -v unlimited): an arena reserves as many addresses as the device has memory."
    yield Finding(Status.OK if free else Status.FAIL, "address space", f"limit {_limit(addresses)}", fix)
    mappings = int(Path("/proc/sys/vm/max_map_count").read_text())
    enough = mappings >= ENOUGH_MAPPINGS
    fix = "" if enough else f"sysctl vm.max_map_count={ENOUGH_MAPPINGS}"
    yield Finding(Status.OK if enough else Status.WARN, "mappings of a process", f"vm.max_map_count is {mappings}", fix)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def runtime_directory(chosen: Settings) -> Iterable[Finding]:
    """Whether servers and clients of this user may use the directory."""
    directory = chosen.runtime_dir
    if not (directory.exists() or directory.is_symlink()):
        parent = next(folder for folder in directory.parents if folder.exists())
        if os.access(parent, os.W_OK | os.X_OK):
            return [Finding(Status.OK, str(directory), f"not there yet; gms serve makes it in {parent}")]
        return [Finding(Status.FAIL, str(directory), f"not there, and {parent} is not writable", "Choose another with GMS_RUNTIME_DIR.")]
    from gms_core.runtime_dir import ANY_GROUP, prepare

    try:
        prepare(directory, ANY_GROUP)
    except (PermissionRefused, ConfigurationError) as error:
        return [Finding(Status.FAIL, str(directory), error.message, error.hint or "Choose another with GMS_RUNTIME_DIR.")]
    who = "which only its group may enter besides" if directory.stat().st_mode & 0o070 else "closed to others"
    return [Finding(Status.OK, str(directory), f"a directory of this user, {who}")]


def servers(chosen: Settings) -> Iterator[Finding]:
    """Each socket of the runtime directory: whether a server answers."""
    from gms_core.client import connect
    from gms_core.runtime_dir import sockets

    try:
        paths = sockets(chosen.runtime_dir)
    except PermissionRefused as error:
        yield Finding(Status.WARN, "servers", error.message, "Choose another with GMS_RUNTIME_DIR.")
        return
    if not paths:
        yield Finding(Status.OK, "servers", f"none has a socket in {chosen.runtime_dir}")
    for path in paths:
        try:
            with connect(socket_path=path, client="gms doctor", timeout_s=2.0) as session:
                report = session.status()
        except GmsError as error:
            yield Finding(Status.FAIL, path.name, error.message, error.hint or "Restart it: gms serve")
            continue
        same = report.server == __version__
        evidence = f"gms {report.server}, pid {report.pid}, {len(report.pools)} pools, {len(report.sessions) - 1} other sessions"
        yield Finding(
            Status.OK if same else Status.WARN, path.name, evidence, "" if same else f"This is gms {__version__}: run one version everywhere."
        )
