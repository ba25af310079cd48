"""What a service and systemd tell each other: that it is ready or stopping, and descriptors that systemd keeps and passes to the next start.

This is the protocol of sd_notify(3) and sd_listen_fds(3), which are a few datagrams and variables; libsystemd is not needed for it.
"""

from __future__ import annotations

import array
import logging
import os
import select
import socket
import time
from collections.abc import Iterable, Sequence

from gms_core.config import take_from_manager
from gms_core.protocol.framing import close_descriptors

log = logging.getLogger(__name__)

FIRST_DESCRIPTOR = 3
"""SD_LISTEN_FDS_START of sd_listen_fds(3)."""
WAIT_S = 8.0
"""Seconds in which messages must be sent and looked at. It is less than a keeper's answer may take."""

TELL_S = 0.1
"""Seconds in which there must be room for what is only told."""

Note = tuple[str, Sequence[int]]
"""One message: assignments, one a line, and descriptors that go with it."""


class ServiceManager:
    """The service manager that has started this process, or none.

    Attributes:
        told: What it has told this process.
        listens: Whether it hears what this process says, as far as can be known.
        passed: Names and descriptors that it had kept and has passed to this start; whoever takes them out owns them.
    """

    def __init__(self) -> None:
        self.told = take_from_manager()
        address = self.told.socket
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.listens = self.told.main is not False and self._address[:1] in ("/", "\0")
        self.passed = [(name, FIRST_DESCRIPTOR + index) for index, name in enumerate(self.told.names)]
        for _, number in self.passed:
            os.set_inheritable(number, False)

    def tell(self, note: str) -> bool:
        """Tell it something, such as ``READY=1``, without waiting for long. Never raises.

        Returns:
            Whether it is on its way, or there is nobody to tell.
        """
        try:
            if self.listens:
                self._send([(note, ())], time.monotonic() + TELL_S)
        except OSError as error:
            log.warning("systemd cannot be told %s: %s", note, error)
            return False
        return True

    def deliver(self, notes: Iterable[Note], deadline: float | None = None) -> None:
        """Tell it something, and wait until it has looked at all of it, in this order. Several threads may do so at once.

        Args:
            notes: What to tell.
            deadline: Until when, on the monotonic clock; None for as long as anything may take.

        Raises:
            OSError: It does not look in time, or cannot be reached. Some of it may have arrived, or may yet arrive.
        """
        deadline = time.monotonic() + WAIT_S if deadline is None else deadline
        reading, writing = os.pipe()
        try:
            try:
                # The manager closes the end of the pipe that comes with a barrier once it has looked at everything before.
                self._send([*notes, ("BARRIER=1", (writing,))], deadline)
            finally:
                os.close(writing)
            poll = select.poll()
            poll.register(reading, 0)  # its end is reported in any case
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError("systemd has not looked at it in time")
        finally:
            os.close(reading)

    def _send(self, notes: Iterable[Note], deadline: float) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            connection.connect(self._address)  # so that a full queue can be waited for
            for text, descriptors in notes:
                connection.settimeout(max(0.001, deadline - time.monotonic()))
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
                connection.sendmsg([text.encode()], rights)

    def discard(self, names: Iterable[str]) -> bool:
        """Close what was passed under these names, and have the manager close it. Never raises; returns whether it is known to have done so."""
        unwanted = set(names)
        close_descriptors(number for name, number in self.passed if name in unwanted)
        self.passed = [(name, number) for name, number in self.passed if name not in unwanted]
        if self.listens and (named := sorted(unwanted - {""})):
            try:
                self.deliver((remove_note(name), ()) for name in named)
            except OSError as error:
                log.warning("systemd may still have %d descriptors that nobody wants: %s", len(named), error)
                return False
        return self.listens and "" not in unwanted


def store_note(name: str) -> str:
    """What has the descriptor which comes with it kept under a name, whatever happens at its other end."""
    return f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0"


def remove_note(name: str) -> str:
    """What has everything of a name closed."""
    return f"FDSTOREREMOVE=1\nFDNAME={name}"
