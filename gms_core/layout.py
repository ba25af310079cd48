"""What a published pool holds: identity, ordered allocations and the tensor manifest. Pure data, shared by client and server."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from gms_core.errors import ManifestError

WHERE_IT_CAME_FROM = frozenset({"model", "revision"})
"""Fields that name the place of the bytes. They are compared only when the content digest of one side is unknown."""


class Identity(msgspec.Struct, frozen=True):
    """What the published bytes are.

    Attributes:
        fields: Name to value. ``content`` is the digest of the checkpoint's bytes, or empty when the side that attaches cannot read them;
            ``model`` and ``revision`` say where they came from; the engine's adapter adds what alters the layout of the weights.
    """

    fields: dict[str, str] = {}

    def differences(self, published: Identity) -> dict[str, str]:
        """Fields in which ``published`` is not what this identity expects, each as ``expected != published``."""
        known = bool(self.fields.get("content")) and bool(published.fields.get("content"))
        ignored = WHERE_IT_CAME_FROM if known else frozenset({"content"})
        names = sorted((self.fields.keys() | published.fields.keys()) - ignored)
        pairs = ((name, self.fields.get(name, ""), published.fields.get(name, "")) for name in names)
        return {name: f"{expected!r} != {found!r}" for name, expected, found in pairs if expected != found}


class Allocation(msgspec.Struct, frozen=True, array_like=True):
    """One allocation of a layout.

    Attributes:
        id: The server's number, unique in its lifetime.
        offset: Bytes from the arena's base at which it is mapped.
        size: Bytes.
    """

    id: int
    offset: int
    size: int


class Layout(msgspec.Struct, frozen=True):
    """An immutable, committed layout of a published pool.

    Attributes:
        generation: Integer of the pool, +1 with each commit.
        identity: What the bytes are.
        allocations: In arena order; they do not overlap.
        manifest: The tensor manifest, opaque to server and client.
        digest: Over all of the above but the generation and the allocations' ids.
    """

    generation: int
    identity: Identity
    allocations: tuple[Allocation, ...]
    manifest: bytes
    digest: str

    @property
    def size(self) -> int:
        """Bytes of physical memory."""
        return sum(allocation.size for allocation in self.allocations)

    @property
    def extent(self) -> int:
        """Bytes of the arena, from its base to the end of the last allocation."""
        return max((allocation.offset + allocation.size for allocation in self.allocations), default=0)


def layout_digest(identity: Identity, allocations: Sequence[Allocation], manifest: bytes) -> str:
    """A digest that is equal for equal layouts, whatever the allocations' ids are."""
    hasher = hashlib.blake2b(digest_size=16)
    hasher.update(msgspec.msgpack.encode(sorted(identity.fields.items())))
    hasher.update(msgspec.msgpack.encode([(allocation.offset, allocation.size) for allocation in allocations]))
    hasher.update(manifest)
    return hasher.hexdigest()


def check_allocations(allocations: Sequence[Allocation]) -> None:
    """Raise `ManifestError` unless the allocations are in arena order and do not overlap."""
    end = 0
    for allocation in allocations:
        if allocation.size <= 0 or allocation.offset < end:
            raise ManifestError(f"allocation {allocation.id} at offset {allocation.offset} overlaps its predecessor, or is empty")
        end = allocation.offset + allocation.size
