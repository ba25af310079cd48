"""Calls of the CUDA driver that put something into a stream, or look at one, made with the interpreter's lock held.

The bindings let go of it around every call. These calls take a few microseconds, and a thread that lets go of the lock waits for it again among all
the others that copy: with a dozen of them that takes longer than the call.
"""

from __future__ import annotations

import ctypes

from gms_core.errors import DriverUnavailable
from gms_core.vmm.cuda_calls import failure

_NOT_READY = 600


class QuickCalls:
    """The calls, for any thread in which the context is current that streams and events belong to.

    Raises:
        DriverUnavailable: There is no driver.
    """

    def __init__(self) -> None:
        try:
            library = ctypes.PyDLL("libcuda.so.1")
        except OSError as error:
            raise DriverUnavailable(f"the CUDA driver cannot be loaded: {error}") from error
        self._copy, self._record, self._query = library.cuMemcpyHtoDAsync_v2, library.cuEventRecord, library.cuEventQuery
        self._copy.argtypes = (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        self._record.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        self._query.argtypes = (ctypes.c_void_p,)

    def copy_to_device(self, target: int, source: int, size: int, stream: int) -> None:
        """``cuMemcpyHtoDAsync``. The source has to be pinned: a copy of other memory waits for the device, and all other threads with it.

        Raises:
            DriverError: The driver refuses.
        """
        if result := self._copy(target, source, size, stream):
            raise failure("cuMemcpyHtoDAsync", result, f"{size} bytes to {target:#x}")

    def record(self, event: int, stream: int) -> None:
        """``cuEventRecord``.

        Raises:
            DriverError: The driver refuses.
        """
        if result := self._record(event, stream):
            raise failure("cuEventRecord", result)

    def is_done(self, event: int) -> bool:
        """``cuEventQuery``: whether all that was in its stream when it was recorded is done.

        Raises:
            DriverError: The driver refuses, or something in the stream has failed.
        """
        result = self._query(event)
        if result and result != _NOT_READY:
            raise failure("cuEventQuery", result)
        return not result
