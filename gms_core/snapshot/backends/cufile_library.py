"""cuFile, which reads from disks into a GPU's memory: what it needs of a machine, and its driver, which is opened without its compatibility mode.

In compatibility mode cuFile reads into host memory and copies from there, as ``staged`` does but slower, and tells nobody. So it is switched off:
what cannot be read directly is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gms_core.errors import BackendUnavailable, DriverUnavailable

MODULES = Path("/proc/modules")
_MODULE = "nvidia_fs"


def refuse_without_kernel_module() -> None:
    """Look at the kernel first: where it does not list its modules, opening the driver never returns.

    Raises:
        BackendUnavailable: It does not, or cuFile's module is not among them.
    """
    try:
        loaded = {line.split()[0] for line in MODULES.read_text(encoding="utf-8").splitlines()}
    except OSError as error:
        raise BackendUnavailable(
            f"this machine's kernel does not list its modules ({MODULES}: {error.strerror}), and there the driver of cuFile never opens"
        ) from error
    if _MODULE not in loaded:
        raise BackendUnavailable(
            f"the kernel module {_MODULE} is not loaded: without it cuFile could only copy through host memory, slower than the backend 'staged'",
            hint="Install NVIDIA's GPUDirect Storage, then: modprobe nvidia-fs",
        )


def bindings() -> Any:
    """The bindings of cuFile.

    Raises:
        BackendUnavailable: They are missing.
    """
    try:
        from cuda.bindings import cufile
    except ImportError as error:
        raise BackendUnavailable(
            f"the Python bindings of cuFile cannot be imported: {error}", hint="They come with cuda-bindings from 12.9 on: pip install 'gms[cuda]'"
        ) from error
    return cufile


def open_driver() -> str:
    """Open the driver in this process, once, without compatibility mode. Returns what was found, in words.

    Only where `refuse_without_kernel_module` does not refuse: it may never return otherwise.

    Raises:
        BackendUnavailable: There is no GPU, no library, or the driver does not open.
    """
    cufile = bindings()
    try:
        from gms_core.vmm.cuda_calls import initialise

        initialise()
    except DriverUnavailable as error:
        raise BackendUnavailable(error.message, hint=error.hint) from error
    try:
        version = cufile.get_version()
        if not cufile.use_count():
            cufile.set_parameter_bool(int(cufile.BoolConfigParameter.PROPERTIES_ALLOW_COMPAT_MODE), False)
            cufile.driver_open()
    except Exception as error:  # its own errors have no common base with those of a library that is missing
        raise BackendUnavailable(
            f"the driver of cuFile does not open: {error}", hint="NVIDIA's gdscheck -p tells what this machine and its file systems support."
        ) from error
    return f"cuFile {version // 1000}.{version % 1000 // 10}"
