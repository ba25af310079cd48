"""The keeper: it holds descriptors under names for whoever owns the directory of its socket, and does nothing else.

It is run by path, alone, in an interpreter without site packages, so that nothing it needs can be changed or removed while it runs. It knows no
CUDA and maps nothing: that it has an exported descriptor open is what keeps the memory.

    python -I -S process.py LISTENING_DESCRIPTOR SOCKET_PATH PATIENCE_S

Each message is one datagram of a SOCK_SEQPACKET connection: a verb of one byte, and names that are separated by newlines.

    I                 whose are you        -> i PID newline LABEL; PID is 0 if it is no process of its own, and cannot be ended as one
    B label           be labelled so       -> .
    T seconds         have this patience   -> .
    K names + descriptors, keep these      -> .  or ! and, from one that is no process of its own, why it cannot
    D names           drop these           -> .
    L                 all that you keep    -> k names + descriptors, as often as needed, then .
    E                 end                  -> .  and it ends; the descriptors are closed

Who said something last is the server; a connection that was the server's before is closed. One that says nothing only sees that there is a keeper.
Without a server for PATIENCE_S seconds it ends by itself, so that memory which nobody comes back for is given up.
"""

from __future__ import annotations

import array
import os
import resource
import select
import socket
import struct
import sys
import time

MOST_DESCRIPTORS = 253
MESSAGE_BYTES = 128 * 1024
FIRST_S = 30.0
"""Seconds for the first server to say something."""
MOST_NEWCOMERS = 16
OK, REFUSED = b".", b"!"


class Keeper:
    """What is kept, and for whom."""

    def __init__(self, listening: socket.socket, patience_s: float) -> None:
        self.listening = listening
        self.patience_s = patience_s
        self.pid = os.getpid()
        self.label = b""
        self.kept: dict[bytes, int] = {}
        self.server: socket.socket | None = None
        self.newcomers: list[socket.socket] = []
        self.alone_until = time.monotonic() + max(FIRST_S, patience_s)

    def run(self) -> None:
        while True:
            poll = select.poll()
            for one in (self.listening, *self.newcomers, *([self.server] if self.server is not None else [])):
                poll.register(one, select.POLLIN)
            wait_ms: int | None = None
            if self.server is None:
                rest = self.alone_until - time.monotonic()
                if rest <= 0:
                    return
                wait_ms = int(min(rest, 3600.0) * 1000) + 1
            ready = {number for number, _ in poll.poll(wait_ms)}
            if self.server is not None and self.server.fileno() in ready and not self.answer(self.server):
                return
            for newcomer in [one for one in self.newcomers if one.fileno() in ready]:
                self.hear(newcomer)
            if self.listening.fileno() in ready:
                self.accept()

    def accept(self) -> None:
        try:
            connection, _ = self.listening.accept()
        except OSError:  # whoever connected has gone, or too many files are open: what is kept is what counts
            time.sleep(0.1)
            return
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, uid, _ = struct.unpack("3i", credentials)
        if uid not in (os.getuid(), 0):
            connection.close()
            return
        connection.settimeout(30)
        self.newcomers.append(connection)
        if len(self.newcomers) > MOST_NEWCOMERS:
            self.newcomers.pop(0).close()

    def hear(self, newcomer: socket.socket) -> None:
        """See whether a newcomer says something, which makes it the server, or has gone."""
        self.newcomers.remove(newcomer)
        try:
            if newcomer.recv(1, socket.MSG_PEEK):
                if self.server is not None:
                    self.server.close()
                self.server = newcomer
                return
        except OSError:
            pass
        newcomer.close()

    def lose(self) -> None:
        if self.server is not None:
            self.server.close()
        self.server = None
        self.alone_until = time.monotonic() + self.patience_s

    def answer(self, server: socket.socket) -> bool:
        """Carry out one message; false if it was the last."""
        try:
            data, received, cut = receive(server)
            if not data:
                self.lose()
                return True
            verb, names = data[:1], data[1:].split(b"\n") if len(data) > 1 else []
            if verb == b"I":
                server.send(self.introduce())
            elif verb == b"B":
                server.send(self.be_labelled(data[1:]))
            elif verb == b"T":
                self.be_patient(float(data[1:]))
                server.send(OK)
            elif verb == b"K" and not cut and len(set(names)) == len(names) == len(received):
                server.send(self.keep(dict(zip(names, received, strict=True))))
            elif verb == b"D":
                self.drop(names)
                server.send(OK)
            elif verb == b"L":
                self.tell_all(server)
            elif verb == b"E":
                return self.end(server)
            else:
                for number in received:
                    os.close(number)
                server.send(REFUSED)
        except (OSError, ValueError):  # the server has gone, takes nothing, or talks nonsense: another one may come
            self.lose()
        return True

    def introduce(self) -> bytes:
        return b"i%d\n" % self.pid + self.label

    def be_patient(self, seconds: float) -> None:
        self.patience_s = seconds

    def be_labelled(self, label: bytes) -> bytes:
        self.label = label
        return OK

    def keep(self, descriptors: dict[bytes, int]) -> bytes:
        self.drop(list(descriptors))
        self.kept.update(descriptors)
        return OK

    def drop(self, names: list[bytes]) -> None:
        for name in names:
            number = self.kept.pop(name, None)
            if number is not None:
                os.close(number)

    def end(self, server: socket.socket) -> bool:
        server.send(OK)
        return False

    def tell_all(self, server: socket.socket) -> None:
        names = list(self.kept)
        for start in range(0, len(names), MOST_DESCRIPTORS):
            piece = names[start : start + MOST_DESCRIPTORS]
            numbers = array.array("i", [self.kept[name] for name in piece])
            server.sendmsg([b"k" + b"\n".join(piece)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)])
        server.send(OK)


def receive(connection: socket.socket) -> tuple[bytes, list[int], bool]:
    """One message: its bytes, its descriptors, and whether some were lost on the way (those that were not are closed then)."""
    numbers = array.array("i")
    room = socket.CMSG_SPACE(MOST_DESCRIPTORS * numbers.itemsize)
    data, ancillary, flags, _ = connection.recvmsg(MESSAGE_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        for number in numbers:
            os.close(number)
        return data, [], True
    return data, list(numbers), False


def main() -> None:
    listening = socket.socket(fileno=int(sys.argv[1]))
    path, patience_s = sys.argv[2], float(sys.argv[3])
    os.chdir("/")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    identity = os.fstat(os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW))
    try:
        Keeper(listening, patience_s).run()
    finally:
        try:
            found = os.stat(path, follow_symlinks=False)
            if (found.st_dev, found.st_ino) == (identity.st_dev, identity.st_ino):  # not another keeper's, that has taken its place
                os.unlink(path)
        except OSError:
            pass


if __name__ == "__main__":
    main()
