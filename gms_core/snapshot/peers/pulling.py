"""Publishing what another machine has published: its images, moved by a process each, with the same checks and the same commit as from a snapshot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gms_core.errors import BackendUnavailable
from gms_core.snapshot.backends.nixl_ucx import PeerBackend
from gms_core.snapshot.manifest import BLOCK_BYTES, Image
from gms_core.snapshot.matching import check_expected
from gms_core.snapshot.orders import PullOrder
from gms_core.snapshot.peers.handshake import Address, read_secret
from gms_core.snapshot.peers.peer import Peer
from gms_core.snapshot.processes import Watch
from gms_core.snapshot.transfer import Job
from gms_core.snapshot.whole import Outcome, Place, publish_together, told_to_end


def pull(
    where: Address,
    secret: Path,
    places: Callable[[Sequence[Image]], Sequence[Place]],
    watch: Watch,
    *,
    expected: Mapping[str, str] | None = None,
    if_missing: bool = False,
    replace: int | None = None,
    pin: bool = False,
    workers: int = 0,
    options: Mapping[str, str] | None = None,
    timeout_s: float,
    memory_timeout_s: float,
) -> Outcome:
    """Publish what a peer serves, all of its images together. For the main thread only.

    Args:
        where: Of the peer.
        secret: File of the secret that both have.
        places: Says where each image goes, once it is known which there are.
        watch: Is told how far each image is.
        expected: Fields that the identity of each image must have.
        if_missing: Leave out what is committed already.
        replace: Drop this committed generation first, once it has no readers.
        pin: Keep the generations without readers.
        workers: Threads for each image; 0 for as many as suit.
        options: Of the backend ``nixl-ucx``.
        timeout_s: Seconds to wait for the right to write.
        memory_timeout_s: Seconds to wait for memory that others release.

    Raises:
        BackendUnavailable: NIXL, or its plugin, cannot be loaded.
        PermissionRefused: The peer has another secret.
        TransferFailed: The peer does not answer, or has gone.
        GmsError: As `gms_core.snapshot.restore.restore_image` says.
        KeyboardInterrupt: Nothing is published unless all images had arrived.
    """
    known = read_secret(secret)
    found = PeerBackend().probe()
    if not found.usable:
        raise BackendUnavailable(f"nothing can be pulled here: {found.reason}")
    with told_to_end() as too_late, Peer(where, known) as peer:
        manifest = peer.manifest
        PeerBackend(peer.offer).check(Job("restore", (), (), (), BLOCK_BYTES, workers, options or {}))
        check_expected(manifest.images, expected or {})

        def order(index: int, place: Place) -> PullOrder:
            return PullOrder(
                index=index,
                backend=PeerBackend.name,
                workers=workers,
                options=dict(options or {}),
                socket=str(place.socket),
                pool=place.pool,
                peer=str(where),
                secret=str(secret),
                id=manifest.id,
                timeout_s=timeout_s,
                memory_timeout_s=memory_timeout_s,
                replace=replace,
                pin=pin,
            )

        images = publish_together(manifest.images, places(manifest.images), order, watch, if_missing=if_missing)
        too_late()
        return Outcome(manifest, images)
