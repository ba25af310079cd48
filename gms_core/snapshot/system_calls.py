"""System calls for which there is neither a function in Python nor one in the C library, by number."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

from gms_core.errors import TransferFailed
from gms_core.snapshot.transfer import Probe

_NUMBERS = {
    "x86_64": {"io_setup": 206, "io_destroy": 207, "io_getevents": 208, "io_submit": 209},
    "aarch64": {"io_setup": 0, "io_destroy": 1, "io_submit": 2, "io_getevents": 4},
}
_EVERYWHERE = {"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427}
_DEADLINE_S = 10.0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_TRY = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
room = ctypes.create_string_buffer(256)
libc.syscall(*(ctypes.c_long(int(number)) for number in sys.argv[1:]), ctypes.byref(room))
print(ctypes.get_errno())
"""


def number(call: str) -> int | None:
    """A call's number on this machine; None if it is not known here."""
    return (_EVERYWHERE | _NUMBERS[machine]).get(call) if (machine := platform.machine()) in _NUMBERS else None


def needed(call: str) -> int:
    """A call's number on this machine, for a backend that works here.

    Raises:
        TransferFailed: It is not known here.
    """
    found = number(call)
    if found is None:
        raise TransferFailed(f"the number of the system call {call} is not known here", hint="Use the backend 'staged'.")
    return found


def system_call(call: int, *arguments: int) -> int:
    """Make a call, again if a signal interrupts it: Python does so for its own calls alone.

    Args:
        call: Its number.
        arguments: Numbers and addresses.

    Raises:
        OSError: The kernel refuses.
    """
    words = [ctypes.c_long(argument) for argument in arguments]
    while True:
        result = int(_libc.syscall(ctypes.c_long(call), *words))
        if result >= 0:
            return result
        failure = ctypes.get_errno()
        if failure != errno.EINTR:
            raise OSError(failure, os.strerror(failure))


def refusal(call: str, *arguments: int) -> Probe:
    """Try a call whose last argument is the address of some room for its answer, in a child: a sandbox may end whoever makes it.

    Args:
        call: Its name.
        arguments: Before the address.
    """
    wanted = number(call)
    if wanted is None:
        return Probe(False, f"the number of the system call {call} on a machine of the kind {platform.machine()!r} is not known here")
    command = [sys.executable, "-I", "-S", "-c", _TRY, str(wanted), *map(str, arguments)]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    except subprocess.TimeoutExpired:
        return Probe(False, f"{call} has not come back after {_DEADLINE_S:g} seconds")
    except OSError as error:
        return Probe(False, f"{call} cannot be tried: {error}")
    if tried.returncode < 0:
        return Probe(False, f"a sandbox ends whoever calls {call} ({signal.Signals(-tried.returncode).name}); {_advice(call)}")
    if tried.returncode or not tried.stdout.strip().isdecimal():
        return Probe(False, f"{call} cannot be tried: {tried.stderr.strip()[-200:]}")
    failure = int(tried.stdout)
    if failure:
        return Probe(False, f"{call} is refused: {errno.errorcode.get(failure, failure)} ({os.strerror(failure)}); {_advice(call)}")
    return Probe(True, f"{call} works")


def _advice(call: str) -> str:
    if call == "io_uring_setup" and _setting("/proc/sys/kernel/io_uring_disabled") not in ("", "0"):
        return "kernel.io_uring_disabled is set on this machine"
    return "container runtimes and sandboxes block it unless their seccomp profile names it"


def _setting(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""
