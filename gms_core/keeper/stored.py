"""A keeper that is a thread of the supervisor: it has everything open as the process would, and systemd keeps the same for the next supervisor."""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
from collections.abc import Mapping

from gms_core.errors import GmsError
from gms_core.keeper import process
from gms_core.keeper.store import DescriptorStore
from gms_core.protocol.framing import close_descriptors

log = logging.getLogger(__name__)

LABEL_BYTES = 4096


class StoredKeeper(process.Keeper):
    """The keeper of one device; it answers as `gms_core.keeper.process` says.

    It has no patience that could end: while there is no server the supervisor starts one, and without a supervisor systemd decides. Nor has it a
    process number, since nobody is to kill the supervisor because it is slow. Told to end, it gives everything up and goes on.

    Args:
        listening: Where servers connect.
        store: Keeps what this keeps.
        kept: What it begins with, by name: the descriptors become this object's, and the store has them already.
        label_file: A file of which the store has a descriptor too; what it says is the label. It becomes this object's.
    """

    def __init__(self, listening: socket.socket, store: DescriptorStore, kept: Mapping[str, int], label_file: int) -> None:
        super().__init__(listening, math.inf)
        self.pid = 0
        self.store = store
        self.kept = {name.encode(): number for name, number in kept.items()}
        self.label_file = label_file
        self.label = os.pread(label_file, LABEL_BYTES, 0)

    def start(self) -> None:
        """Answer in a thread of its own, which ends with the process."""
        threading.Thread(target=self._run, name=f"keeper-{self.store.device}", daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                self.run()
            except Exception:
                log.exception("the keeper of %s goes on", self.store.device)
                time.sleep(1.0)  # whatever it is, it may come back at once

    def introduce(self) -> bytes:
        """Say whose this is. The server asks every two seconds: that is when systemd is told again what it was told in vain."""
        self.store.try_again()
        return super().introduce()

    def be_patient(self, seconds: float) -> None:
        """Do nothing: it waits for ever."""

    def be_labelled(self, label: bytes) -> bytes:
        """Take another label."""
        write_label(self.label_file, label)
        return super().be_labelled(label)

    def keep(self, descriptors: dict[bytes, int]) -> bytes:
        """Keep descriptors once the store has them. A name that is there already is the same allocation, given once more."""
        new = {name: number for name, number in descriptors.items() if name not in self.kept}
        close_descriptors(number for name, number in descriptors.items() if name not in new)
        try:
            self.store.put({name.decode(): number for name, number in new.items()})
        except GmsError as error:
            close_descriptors(new.values())
            return process.REFUSED + "\n".join((error.code, error.message, error.hint)).encode()
        self.kept.update(new)
        return process.OK

    def drop(self, names: list[bytes]) -> None:
        """Close descriptors, here and in the store."""
        known = [name for name in names if name in self.kept]
        super().drop(known)
        if known:
            self.store.remove(name.decode() for name in known)

    def end(self, server: socket.socket) -> bool:
        """Give everything up."""
        self.drop(list(self.kept))
        self.be_labelled(b"")
        server.send(process.OK)
        return True


def label_file(label: str) -> int:
    """A new file that says a label, which nobody can find by a path."""
    number = os.memfd_create("gms-label")
    write_label(number, label.encode())
    return number


def write_label(number: int, label: bytes) -> None:
    """Have a file say a label, and nothing else."""
    os.pwrite(number, label, 0)
    os.ftruncate(number, len(label))
