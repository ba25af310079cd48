"""One process for each image of a snapshot: started at once, watched, and all ended if one of them fails.

The processes are spawned, never forked, and import nothing that they do not need. Ctrl-C on a terminal does not reach them: whoever runs `carry_out`
is interrupted, kills them, waits until they are gone, and only then goes on with its own end; once they publish, it waits until that has ended. When
that one is killed, they end by themselves; until the last of them has, locks that it has handed to them are held.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import msgspec

from gms_core.config import child_environment
from gms_core.devices import HOST, DeviceId
from gms_core.errors import GmsError, TransferFailed, rebuild
from gms_core.exit_words import how
from gms_core.snapshot.orders import COMMIT, Arrived, Done, Failed, Order, Progress, Report
from gms_core.stop_signals import stop_signals

log = logging.getLogger(__name__)

KILLED_S = 20.0
"""Seconds after which a process that was killed is left to the kernel: it hangs there, in a disk that does not answer, say."""
PUBLISHED_S = 20.0
"""Seconds that processes get to publish what has arrived, from an interrupt on."""

Watch = Callable[[str, Progress], None]
"""Is told how far which image is."""


class Task(NamedTuple):
    """An image's.

    Attributes:
        name: What people call the image.
        order: What is to be done with it.
        device: Whose memory it is in, or is to come to; its process sees no other GPU. None if it needs no device.
    """

    name: str
    order: Order
    device: DeviceId | None = None


class _Child:
    """A process with an order, once it is started.

    Attributes:
        name: What people call its image.
        arrived: Whether its image is there, and it waits to be told to publish it.
        done: What it told at last.
        error: Why it failed.
    """

    def __init__(self, task: Task) -> None:
        self.name = task.name
        self.arrived = False
        self.done: Done | None = None
        self.error: GmsError | None = None
        self._task = task
        self._line = bytearray()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, locks: Collection[int]) -> None:
        """Start it.

        Raises:
            TransferFailed: The machine has no room for it.
        """
        gpu = self._task.device if self._task.device != HOST else None
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "gms_core.snapshot.entry", *([gpu] if gpu else [])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0,
                pass_fds=tuple(locks),
                bufsize=0,
                env=child_environment(CUDA_VISIBLE_DEVICES=gpu) if gpu else None,
            )
        except OSError as error:
            raise TransferFailed(f"a process for {self.name} cannot be started: {error.strerror}", hint="Is there memory left?") from error
        self.send(msgspec.json.encode(self._task.order) + b"\n")

    @property
    def reports(self) -> int:
        """Descriptor that reports come from."""
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def send(self, line: bytes) -> None:
        """Tell it something. If it has ended, that is seen elsewhere."""
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            while line:
                line = line[os.write(self._process.stdin.fileno(), line) :]

    def read(self) -> list[Report] | None:
        """Take in what has come; None once nothing will come any more."""
        data = os.read(self.reports, 1 << 20)
        if not data:
            return None
        *lines, rest = data.split(b"\n")
        if lines:
            lines[0] = bytes(self._line) + lines[0]
            self._line.clear()
        self._line += rest
        return [msgspec.json.decode(line, type=Report) for line in lines]

    def kill(self) -> None:
        """Kill it, if it was started and has not ended."""
        if self._process is not None:
            self._process.kill()

    def bury(self) -> None:
        """Wait until it is gone, once it was killed."""
        if self._process is None:
            return
        try:
            self._process.wait(KILLED_S)
        except subprocess.TimeoutExpired:
            log.warning("process %d was killed %g s ago, and hangs in the kernel", self._process.pid, KILLED_S)
        else:
            self.end()

    def end(self) -> int:
        """Forget it, once it has ended, for which this waits; returns its exit code. Idempotent."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        code = self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        return code


def carry_out(tasks: Sequence[Task], watch: Watch, locks: Collection[int] = ()) -> list[Done]:
    """Carry tasks out, all at once.

    What is restored is published only when all of it has arrived. If that then fails for one image, the others are published all the same.

    Args:
        tasks: Of each image.
        watch: Is told how far each is.
        locks: Descriptors of locks that are held as long as one of the processes is there.

    Returns:
        What came of each, in the same order.

    Raises:
        GmsError: The first one that failed did so for this reason. The others were cancelled, and no process is left.
        KeyboardInterrupt: And whatever else a signal raises in the calling thread, which is the main one: no process is left then, either. Once
            images are published, that waits for `PUBLISHED_S` at most, and what is published is told, as a hint or in the log.
    """
    crew = _Crew(watch)
    try:
        for task in tasks:
            crew.start(task._replace(order=msgspec.structs.replace(task.order, at_once=len(tasks))), locks)
        crew.run()
    finally:
        crew.end()
    return crew.results()


class _Crew:
    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._children: list[_Child] = []
        self._selector = selectors.DefaultSelector()
        self._publishing = False

    def start(self, task: Task, locks: Collection[int]) -> None:
        child = _Child(task)
        self._children.append(child)  # an interrupt may come before there is a process: `end` finds it all the same once there is
        child.start(locks)
        self._selector.register(child.reports, selectors.EVENT_READ, child)

    def run(self) -> None:
        """Wait for the end of all."""
        while self._selector.get_map():
            for key, _ in self._selector.select():
                child: _Child = key.data
                self._take_in(child)
                if child.error is not None:
                    raise self._explained(child, child.error)
            if all(child.arrived for child in self._children):
                self._publish()

    def _publish(self) -> None:
        """Have all publish, and wait for their end. A signal to end waits likewise, but not for ever: it would tear apart what belongs together."""
        numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
        came, deadline = b"", math.inf
        with stop_signals(numbers) as told:
            self._publishing = True
            self._selector.register(told, selectors.EVENT_READ)
            for child in self._children:
                child.send(COMMIT)
            while len(self._selector.get_map()) > 1 and (left := deadline - time.monotonic()) > 0:
                for key, _ in self._selector.select(left if left < math.inf else None):
                    if key.fileobj is told:
                        came += told.recv(1)
                        deadline = min(deadline, time.monotonic() + PUBLISHED_S)
                    else:
                        self._take_in(key.data)
            self._selector.unregister(told)
            with contextlib.suppress(BlockingIOError):
                came += told.recv(64)
        for number in numbers:
            if number in came:
                self._interrupt(number)

    def _interrupt(self, number: int) -> None:
        """Have a signal do now what it would have done when it came, and tell what is published in spite of it."""
        handler = signal.getsignal(number)
        try:
            if callable(handler):
                handler(number, None)
            else:
                signal.raise_signal(number)
        except GmsError as error:
            if told := self._published():
                error.add_hint(told)
            raise
        except KeyboardInterrupt:
            log.warning("%s", self._published())
            raise

    def _published(self) -> str:
        """Which images are published, and of which that is not known; empty if none can be."""
        if not self._publishing:
            return ""
        known = [f"{child.name} as generation {child.done.generation}" for child in self._children if child.done and child.done.generation]
        unknown = [child.name for child in self._children if child.arrived and child.done is None and child.error is None]
        told = [f"Published already: {', '.join(known)}."] if known else []
        told += [f"Look whether these are published: {', '.join(unknown)}."] if unknown else []
        return " ".join(told)

    def _take_in(self, child: _Child) -> None:
        reports = child.read()
        if reports is None:
            self._selector.unregister(child.reports)
            code = child.end()
            if child.done is None and child.error is None:
                hint = "Look at the kernel's log: memory may have run out." if code < 0 else ""
                child.error = TransferFailed(f"its process {how(code)}, and said nothing", hint=hint)
            return
        for report in reports:
            match report:
                case Arrived():
                    child.arrived = True
                case Done():
                    child.done = report
                case Failed():
                    child.error = rebuild(report.code, report.message, report.hint, report.details)
                case _:
                    self._watch(child.name, report)

    def _explained(self, child: _Child, error: GmsError) -> GmsError:
        """The error, with the image that it is about where there are several, and with what is published in spite of it."""
        message = f"{child.name}: {error.message}" if len(self._children) > 1 else error.message
        explained = rebuild(error.code, message, error.hint, error.details)
        if told := self._published():
            explained.add_hint(told)
        return explained

    def end(self) -> None:
        """See to it that no process is left, and nothing of theirs under way. Idempotent."""
        self._selector.close()
        for child in self._children:
            child.kill()
        for child in self._children:
            child.bury()

    def results(self) -> list[Done]:
        failed = next((child for child in self._children if child.error is not None), None)
        if failed is not None and failed.error is not None:
            raise self._explained(failed, failed.error)
        return [child.done for child in self._children if child.done is not None]
