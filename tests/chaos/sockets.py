"""Which sockets listen on a port, asked of the kernel by sock_diag(7): at one instant, and a thousand times faster than /proc/net/tcp can be read."""

from __future__ import annotations

import socket
import struct
from typing import Self

_SOCK_DIAG = 4  # NETLINK_SOCK_DIAG
_BY_FAMILY = 20  # SOCK_DIAG_BY_FAMILY
_REQUEST_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_ERROR, _DONE = 2, 3
_LISTENING = 1 << 10  # TCP_LISTEN, as a bit
_HEADER = struct.Struct("=IHHII")
_PORT, _INODE = 4, 68  # where they are in a struct inet_diag_msg


class Listeners:
    """A question to the kernel that can be asked again and again.

    Args:
        port: Of IPv4.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        kind = struct.pack("=BBBxI", socket.AF_INET, socket.IPPROTO_TCP, 0, _LISTENING)
        body = kind + struct.pack(">HH", port, 0) + bytes(32) + struct.pack("=III", 0, 2**32 - 1, 2**32 - 1)
        self._question = _HEADER.pack(_HEADER.size + len(body), _BY_FAMILY, _REQUEST_DUMP, 1, 0) + body
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _SOCK_DIAG)

    def inodes(self) -> list[int]:
        """The sockets, by the number that /proc/PID/fd shows too.

        Raises:
            OSError: The kernel does not answer such questions.
        """
        self._socket.send(self._question)
        found = []
        while True:
            data = self._socket.recv(65536)
            while data:
                size, kind, *_ = _HEADER.unpack_from(data)
                if kind == _DONE:
                    return found
                if kind == _ERROR:
                    raise OSError(-struct.unpack_from("=i", data, _HEADER.size)[0], "sock_diag")
                if struct.unpack_from(">H", data, _HEADER.size + _PORT)[0] == self._port:
                    found.append(struct.unpack_from("=I", data, _HEADER.size + _INODE)[0])
                data = data[(size + 3) & ~3 :]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
