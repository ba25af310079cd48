"""The process of a device server: ``python -m gms_core.server``, started by the supervisor."""

from __future__ import annotations

import contextlib
import sys
import threading

from gms_core.errors import GmsError


def _start_cuda() -> None:
    """Initialise the CUDA driver, which takes about 0.2 s of waiting, while the rest of the program is imported."""
    with contextlib.suppress(GmsError):  # the server opens the driver once more, and says then why it cannot
        from gms_core.vmm.cuda_calls import initialise

        initialise()


if __name__ == "__main__":
    if "host" not in sys.argv:
        threading.Thread(target=_start_cuda, name="start-cuda", daemon=True).start()
    import logging

    from gms_core.server.device_server import run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s gms[%(process)d] %(message)s")
    sys.exit(run(sys.argv[1:]))
