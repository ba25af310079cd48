"""A machine that serves its published memory, as one that pulls it sees it: like a snapshot that is open for reading."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from gms_core.errors import GmsError, InvalidArgument, SnapshotDamaged, TransferFailed
from gms_core.snapshot.manifest import Image
from gms_core.snapshot.peers.handshake import PATIENCE_S, Address, ask
from gms_core.snapshot.peers.offers import understood
from gms_core.snapshot.transfer import File

REACH = "Does gms snapshot serve still run there, can this machine reach all its ports, is NIXL of the same version? What it has printed says more."
"""What to look at when a peer's memory cannot be read."""


class Peer:
    """A connection to it. As long as it is there, the peer knows that it is read.

    Attributes:
        objects: Whether its images lie in an object store: they do not.
        where: Its address.
        here: The address of this machine that reaches it.
        manifest: Of what it serves.
        offer: All that it has told.

    Args:
        where: Its address.
        secret: That both have.

    Raises:
        PermissionRefused: It has another secret.
        TransferFailed: It does not answer.
        SnapshotMismatch: It is of another version of GMS.
        SnapshotDamaged: It contradicts itself.
    """

    objects = False

    def __init__(self, where: Address, secret: bytes) -> None:
        self.where = where
        self.here = ""
        try:
            self._connection = socket.create_connection(where, timeout=PATIENCE_S)
        except (OSError, UnicodeError) as error:  # a name that cannot be one
            raise TransferFailed(f"{where} cannot be reached: {error}", hint="gms snapshot serve has to run there.") from error
        try:
            self.here = str(self._connection.getsockname()[0])
            self.offer, self.manifest = understood(ask(self._connection, secret, str(where)), str(where))
        except BaseException:
            self.close()
            raise

    def image(self, index: int) -> Image:
        """One of its images.

        Raises:
            InvalidArgument: It has no such image.
        """
        if not 0 <= index < len(self.manifest.images):
            raise InvalidArgument(f"{self.where} serves no image {index}: it serves {len(self.manifest.images)}")
        return self.manifest.images[index]

    def files(self, index: int) -> list[File]:
        """What stands for the files of an image: the peer's memory."""
        image = self.image(index)
        return [File(Path(f"{self.where}/{shard.path}"), shard.root, shard.size) for shard in image.shards]

    def close(self) -> None:
        """Do not read it any more. Idempotent."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class PeerMemory:
    """See `OpenFile`: an image in a peer's memory."""

    def __init__(self, file: File) -> None:
        self.path = file.path

    def read(self, view: memoryview, position: int) -> None:
        """See `OpenFile.read`. It can only be read by NIXL."""
        raise self.failed(position, len(view), "it is no file")

    def write(self, view: memoryview, position: int) -> None:
        """See `OpenFile.write`. It cannot be written."""
        raise self.failed(position, len(view), "it is a peer's memory")

    def failed(self, position: int, size: int, why: object) -> TransferFailed:
        """A part could not be read."""
        return TransferFailed(
            f"{size} bytes at position {position} of {self.path} cannot be read: {why}",
            hint=REACH,
            details={"file": str(self.path), "position": str(position)},
        )

    def damaged(self, position: int, size: int, found: int, saved: int) -> GmsError:
        """See `OpenFile.damaged`."""
        return SnapshotDamaged(
            f"the {size} bytes at position {position} of {self.path} have arrived with the checksum {found:016x}, the peer has said {saved:016x}",
            hint="The memory there has changed since gms snapshot serve has begun (gms audit finds that), or the network has changed bytes.",
            details={"file": str(self.path), "position": str(position)},
        )


class PeerMemories:
    """See `OpenFiles`."""

    def __init__(self, files: Sequence[File]) -> None:
        self._files = [PeerMemory(file) for file in files]

    def __getitem__(self, index: int) -> PeerMemory:
        return self._files[index]

    def notes(self) -> list[str]:
        """See `OpenFiles.notes`."""
        return []

    def close(self) -> None:
        """See `OpenFiles.close`."""
