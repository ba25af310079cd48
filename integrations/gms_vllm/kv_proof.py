"""The wait, beside the work of a rank, for the proof that every process of the last holder has exited."""

from __future__ import annotations

import logging
import threading

from gms_core.client import RetainedPool

log = logging.getLogger("vllm.gms")


class Proof:
    """Waits in a thread of its own until all of a pool may be mapped of which the front is held.

    Args:
        pool: Which one.
        timeout_s: Seconds to wait at most.
    """

    def __init__(self, pool: RetainedPool, timeout_s: float) -> None:
        self._pool, self._timeout_s = pool, timeout_s
        self._over = threading.Event()
        self._failure: BaseException | None = None
        threading.Thread(target=self._wait, name="gms-proof", daemon=True).start()

    def there(self) -> bool:
        """Whether it is there.

        Raises:
            GmsError: It will not be, as `gms_core.client.RetainedPool.await_whole` says.
        """
        if not self._over.is_set():
            return False
        if self._failure is not None:
            raise self._failure
        return True

    def _wait(self) -> None:
        try:
            self._pool.await_whole(self._timeout_s)
        except BaseException as error:  # noqa: BLE001 - raised by whoever asks
            log.error("pool %s: the rest of the memory is not granted: %s", self._pool.name, error)
            self._failure = error
        finally:
            self._over.set()
