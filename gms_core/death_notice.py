"""A notice of a process's death, from the kernel, the moment its threads stop.

Closed sockets and pidfds tell of a death late: the kernel first gives the process's memory back, some 50 ms for each GiB of it (measured). But before
that, as a thread ends, it walks the thread's list of robust futexes, marks those that the thread owned and wakes who waits for them (futex(2),
get_robust_list(2)). So a process that wants its death to be noticed at once owns such a futex, in a page that it shares with whoever is to notice.

A notice proves nothing: other threads of the process, and its work on a device, may still be running. It is a reason to look, and to fence.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import threading

from gms_core.errors import ProtocolError

_SYSCALLS = {"x86_64": (273, 202), "aarch64": (99, 98)}
"""Numbers of set_robust_list and futex by machine."""
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_EVERYBODY = 2**31 - 1
_WAITERS = 0x80000000
_OWNER_DIED = 0x40000000
_UNOWNED = 0
_libc = ctypes.CDLL(None, use_errno=True)


class _Node(ctypes.Structure):
    """``struct robust_list``."""


_Node._fields_ = [("next", ctypes.POINTER(_Node))]


class _Head(ctypes.Structure):
    """``struct robust_list_head`` of linux/futex.h."""

    _fields_ = (("list", _Node), ("futex_offset", ctypes.c_long), ("pending", ctypes.POINTER(_Node)))


class _Page:
    """One shared page whose first word is the futex."""

    def __init__(self, descriptor: int) -> None:
        self._map = mmap.mmap(descriptor, mmap.PAGESIZE)
        self.word = ctypes.c_uint32.from_buffer(self._map)

    @property
    def address(self) -> int:
        """Of the word, in this process."""
        return ctypes.addressof(self.word)


def create() -> int | None:
    """Make the page that a notice is given in; returns its close-on-exec descriptor, or None where this kernel's calls are not known."""
    if platform.machine() not in _SYSCALLS:
        return None
    descriptor = os.memfd_create("gms-death-notice", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, mmap.PAGESIZE)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def give_at_death(descriptor: int) -> None:
    """Have the kernel give the notice when this process dies. A thread is started that does nothing for as long as the process lives.

    Args:
        descriptor: Of a page that another process has made; it stays the caller's.

    Raises:
        ProtocolError: It is no such page, or is in use, or this process may not do what it takes.
    """
    calls = _SYSCALLS.get(platform.machine())
    if calls is None:
        raise ProtocolError(f"how a notice of death is asked for is not known on {platform.machine()}")
    try:
        page = _Page(descriptor)
    except (OSError, ValueError) as error:
        raise ProtocolError(f"the page for the notice of death cannot be used: {error}") from error
    if page.word.value != _UNOWNED:
        raise ProtocolError("the page for the notice of death is another process's")
    answered, failures = threading.Event(), list[str]()

    def own() -> None:
        try:
            node, head = _Node(), _Head()
            head.list.next, node.next = ctypes.pointer(node), ctypes.pointer(head.list)
            head.futex_offset = page.address - ctypes.addressof(node)
            if _libc.syscall(calls[0], ctypes.byref(head), ctypes.c_size_t(ctypes.sizeof(head))):
                raise OSError(ctypes.get_errno(), "set_robust_list failed")
            page.word.value = threading.get_native_id() | _WAITERS  # a waiter is announced at once: nobody else may write to the word
        except Exception as error:  # noqa: BLE001 - raised by whoever waits for this thread
            failures.append(str(error))
            return
        finally:
            answered.set()
        threading.Event().wait()  # for ever; head and node live as long

    try:
        threading.Thread(target=own, name="gms-death-notice", daemon=True).start()
    except RuntimeError as error:
        raise ProtocolError(f"no thread can be started for the notice of death: {error}") from error
    answered.wait()
    if failures:
        raise ProtocolError(f"no notice of death can be given: {failures[0]}")


class Notice:
    """A page, as whoever is to notice sees it.

    Args:
        descriptor: Of the page; it stays the caller's, who may close it at once.

    Raises:
        OSError: It cannot be mapped.
    """

    def __init__(self, descriptor: int) -> None:
        self._page = _Page(descriptor)
        self._futex = _SYSCALLS[platform.machine()][1]

    def wait(self) -> bool:
        """Wait until the notice is given or `end` is called, which needs a thread of its own.

        Returns:
            True then; False when nobody owns the page.
        """
        while (value := self._page.word.value) & _WAITERS and not value & _OWNER_DIED:
            self._call(_FUTEX_WAIT, value)
        return bool(value & _OWNER_DIED)

    def end(self) -> None:
        """End a `wait`: the process is known to have exited, or nobody wants to know. The kernel gives no notice for a word that it finds changed."""
        self._page.word.value = _OWNER_DIED
        self._call(_FUTEX_WAKE, _EVERYBODY)

    def _call(self, operation: int, value: int) -> None:
        _libc.syscall(self._futex, ctypes.c_void_p(self._page.address), operation, ctypes.c_uint32(value), None, None, 0)
