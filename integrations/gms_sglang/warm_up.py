"""SGLang's own warm-up, which asks the server at its address: it has to wait until that is this engine's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class WarmUp:
    """Holds the thread back in which SGLang warms up, sets its health and freezes its garbage collector, all through requests to its own address."""

    def __init__(self) -> None:
        self._settled = threading.Event()
        self._wanted = False

    def settle(self, wanted: bool) -> None:
        """The gate is open, or never will be. The first word counts."""
        if not self._settled.is_set():
            self._wanted = wanted
            self._settled.set()

    def run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """In that thread: wait, and do what SGLang does if there is an address to do it at."""
        self._settled.wait()
        if self._wanted:
            original(*args, **kwargs)
