"""A process that has imported vLLM, and forks an engine of `vllm_engine` whenever it is asked to: imports are most of what an engine's start takes.

    python zygote.py

Its standard input is a socket, whose end is that of the process. A message is JSON, an engine's arguments and its environment, and comes with four
descriptors: the engine's standard input, output and error, and a pipe for its number and, once it has ended, its exit code.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import IO

MESSAGE_BYTES = 2**20
STANDARD = (0, 1, 2)


class Forked:
    """An engine that a zygote has forked, as far as tests use a `subprocess.Popen`."""

    def __init__(self, stdin: int, stdout: int, status: int) -> None:
        self.returncode: int | None = None
        self.stdin, self.stdout, self._status = os.fdopen(stdin, "w"), os.fdopen(stdout), os.fdopen(status, "rb", 0)
        if not (first := self._status.readline()):
            self.close()
            raise AssertionError("the zygote has ended")
        self.pid = int(first)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, as soon as there is one; that of a signal is negative.

        Raises:
            subprocess.TimeoutExpired: It goes on.
        """
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._status, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(f"engine {self.pid}", timeout or 0.0)
            self.returncode = int(self._status.readline())
        return self.returncode

    def communicate(self, said: str = "", timeout: float | None = None) -> None:
        """Say a last thing, and wait until all of its processes have closed their output, and it has ended."""
        if not self.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self.stdin.write(said)
                self.stdin.close()
            self.stdout.read()
        try:
            self.wait(timeout)
        finally:
            self.close()

    def close(self) -> None:
        for file in (self.stdin, self.stdout, self._status):
            with contextlib.suppress(BrokenPipeError):
                file.close()


class Zygote:
    """The process, from the test's side.

    Args:
        log: Of its own.
        environment: Of its own.
    """

    def __init__(self, log: Path, environment: dict[str, str]) -> None:
        self._log = log
        self._channel, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other, log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, __file__], stdin=other, stdout=output, stderr=output, env=environment, start_new_session=True
            )

    def fork(self, arguments: list[str], environment: dict[str, str], errors: IO[str]) -> Forked:
        """Start an engine, in a session of its own."""
        (its_input, our_input), (our_output, its_output), (our_status, its_status) = os.pipe(), os.pipe(), os.pipe()
        passed = [its_input, its_output, errors.fileno(), its_status]
        try:
            socket.send_fds(self._channel, [json.dumps([arguments, environment]).encode()], passed)
        finally:
            for descriptor in (its_input, its_output, its_status):
                os.close(descriptor)
        try:
            return Forked(our_input, our_output, our_status)
        except AssertionError as error:
            error.add_note(self._log.read_text())
            raise

    def close(self) -> None:
        self._channel.close()
        assert self._process.wait(60) == 0, self._log.read_text()


class Forks:
    """What the process itself does."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._selector = selectors.EpollSelector()
        self._selector.register(channel, selectors.EVENT_READ)
        self._statuses: dict[int, int] = {}

    def serve(self) -> None:
        """Fork engines, and tell of their ends, until nobody can want another one."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is not self._channel:
                    self._ended(key.fd, key.data)
                elif not self._fork():
                    return

    def _fork(self) -> bool:
        message, descriptors, *_ = socket.recv_fds(self._channel, MESSAGE_BYTES, 4)
        if not message:
            return False
        arguments, environment = json.loads(message)
        threads = os.listdir("/proc/self/task")
        assert len(threads) == 1, f"a process with {len(threads)} threads cannot be forked safely"
        if not (pid := os.fork()):
            self._be_engine(arguments, environment, descriptors)
        *others, status = descriptors
        for descriptor in others:
            os.close(descriptor)
        pidfd = os.pidfd_open(pid)
        self._statuses[pidfd] = status
        self._selector.register(pidfd, selectors.EVENT_READ, pid)
        return True

    def _be_engine(self, arguments: list[str], environment: dict[str, str], descriptors: list[int]) -> None:
        code = 1
        try:
            os.setsid()
            os.write(descriptors[-1], b"%d\n" % os.getpid())
            for number, descriptor in zip(STANDARD, descriptors, strict=False):
                os.dup2(descriptor, number)
            for descriptor in (*descriptors, *self._statuses, *self._statuses.values(), self._selector.fileno()):
                os.close(descriptor)
            os.environ.clear()
            os.environ.update(environment)
            from vllm_engine import main as run

            code = run(*arguments)
        except BaseException:  # noqa: BLE001 - it must not go on as a zygote
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def _ended(self, pidfd: int, pid: int) -> None:
        _, status = os.waitpid(pid, 0)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        descriptor = self._statuses.pop(pidfd)
        with contextlib.suppress(BrokenPipeError):
            os.write(descriptor, b"%d\n" % os.waitstatus_to_exitcode(status))
        os.close(descriptor)


def main() -> None:
    channel = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    import vllm_engine

    vllm_engine.load()
    sys.stdout.flush()
    sys.stderr.flush()
    Forks(channel).serve()


if __name__ == "__main__":
    main()
    os._exit(0)
