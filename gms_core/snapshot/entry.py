"""Where a process that moves one image begins: ``python -m gms_core.snapshot.entry [GPU]``.

It stays on the processors near the GPU, by its UUID. That GPU, the only one that it sees, needs a context, which takes a tenth of a second to make,
several of them on one machine as long one after the other; and the driver's start takes as long again. All that goes on behind the back of Python,
which imports meanwhile what the work needs.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading

from gms_core.snapshot.numa import stay_near

log = logging.getLogger(__name__)


def begin_context() -> None:
    """Make the context of the first GPU that this process sees, and keep it to the end.

    What goes wrong is not told: whoever needs the context meets the same, and tells it with the bindings' words.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if not driver.cuInit(0) and not driver.cuDeviceGet(ctypes.byref(device), 0):
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


if __name__ == "__main__":
    ended = 1
    try:
        for gpu in sys.argv[1:]:
            stay_near(gpu)
            threading.Thread(target=begin_context, name="gms-early-context", daemon=True).start()
        from gms_core.snapshot import child

        ended = child.main()
    except BaseException:
        log.exception("nobody can be told")
    finally:
        logging.shutdown()
        # Not through the interpreter's end: a library of a backend may wait there for what does not end, or crash (NIXL's UCX does).
        os._exit(ended)
