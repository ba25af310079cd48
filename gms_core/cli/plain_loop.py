"""Threads that do nothing but move parts of files, or objects, from or to buffers in huge pages: what backends are compared with."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from gms_core.snapshot.buffers import Buffer, Ring, populate

Part = TypeVar("Part")
Mover = Callable[[], contextlib.AbstractContextManager[Callable[[Part, Buffer], None]]]
"""Gives a thread what moves one part, and takes it back at the thread's end."""


def timed(parts: Sequence[Part], threads: int, chunk_bytes: int, mover: Mover[Part]) -> float:
    """Seconds to move all parts, once every thread has its buffer.

    Args:
        parts: In the order in which they are begun.
        threads: How many.
        chunk_bytes: Of each thread's buffer.
        mover: Moves them.
    """
    left = deque(parts)
    ready = threading.Barrier(threads + 1)

    def work(buffer: Buffer) -> None:
        try:
            populate([buffer])
            ready.wait()
        except BaseException:
            ready.abort()
            raise
        with mover() as move:
            while left:
                try:
                    part = left.popleft()
                except IndexError:
                    return
                move(part, buffer)

    ring = Ring(threads, chunk_bytes)
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="gms-plain") as pool:
            working = [pool.submit(work, buffer) for buffer in ring.buffers]
            with contextlib.suppress(threading.BrokenBarrierError):
                ready.wait()
            began = time.perf_counter()
            for one in working:
                one.result()
            return time.perf_counter() - began
    finally:
        ring.close()
