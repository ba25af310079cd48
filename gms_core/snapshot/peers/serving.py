"""Serving what pools have committed to machines that pull it: a read lease on each for as long as that goes on, and NIXL to read the memory by.

Who pulls reads the memory by itself. This side only tells where it is, to whoever has the secret, and keeps it where it is.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import secrets
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Literal, NamedTuple, Self

import msgspec

import gms_core
from gms_core.client import ReadLease, Session, connect
from gms_core.errors import GmsError, InvalidArgument, PermissionRefused
from gms_core.layout import Layout
from gms_core.snapshot.backends.nixl_agents import Agent, NixlError, Range
from gms_core.snapshot.backends.nixl_ucx import PLUGIN
from gms_core.snapshot.committed import committed
from gms_core.snapshot.manifest import BLOCK_BYTES, FORMAT, Device, Image, Manifest, encode
from gms_core.snapshot.matching import check_alike
from gms_core.snapshot.memories import memory_for
from gms_core.snapshot.peers import offers
from gms_core.snapshot.peers.handshake import MOST_OFFER, Address, answer
from gms_core.snapshot.peers.hashing import checksums
from gms_core.snapshot.peers.offers import Offer, Reach, Span
from gms_core.snapshot.plan import STRIPE_BYTES, WeightedRoot, lay_out
from gms_core.snapshot.transfer import HOST_MEMORY
from gms_core.snapshot.whole import Place
from gms_core.stop_signals import stop_signals

log = logging.getLogger(__name__)

CLIENT = "gms snapshot serve"
_MOST_PEERS, _MOST_STRANGERS = 256, 32
_WARN_S = 1.0
"""Seconds from one warning of somebody who is refused to the next."""
_LOOK_S = 1.0
"""Seconds from one look at the leases to the next."""
_PAUSE_S = 0.2


class _Taken(NamedTuple):
    session: Session
    lease: ReadLease
    layout: Layout


class _Served(NamedTuple):
    image: Image
    reach: Reach


class Serving:
    """Published memory that can be pulled, from the begin of the block to its end.

    Attributes:
        manifest: Of it.
        offer: What is told to those that pull it.

    Args:
        places: The pools, in the order of the images.
        tell: Called with what is being done.

    Raises:
        GenerationNotFound: A pool has committed nothing.
        SnapshotMismatch: What the pools have committed is not of one engine.
        BackendUnavailable: NIXL, or its plugin, cannot be loaded, or does not register the memory.
        InvalidArgument: There is more to tell than a message takes.
        GmsError: As sessions say.
    """

    def __init__(self, places: Sequence[Place], tell: Callable[[str], None]) -> None:
        self._stack = contextlib.ExitStack()
        self._sessions: list[Session] = []
        with contextlib.ExitStack() as stack:
            agent = Agent(PLUGIN, {}, serves=True)
            # What NIXL has registered stays mapped until it is registered no more: the agent is closed before leases end.
            leases = stack.enter_context(contextlib.ExitStack())
            stack.callback(agent.close)
            # All leases first: checksums take minutes, in which a pool's newest generation may become one of another model.
            taken = [self._take(place, leases) for place in places]
            check_alike([(str(place), one.layout.identity.fields) for place, one in zip(places, taken, strict=True)])
            served = [_offered(place, one, agent, leases, tell) for place, one in zip(places, taken, strict=True)]
            now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
            first = served[0].image
            images = tuple(one.image for one in served)
            self.manifest = Manifest(FORMAT, first.pool, first.generation, secrets.token_hex(16), now, gms_core.__version__, images)
            told = Offer(offers.FORMAT, msgspec.Raw(encode(self.manifest)), agent.metadata(), tuple(one.reach for one in served))
            self.offer = msgspec.json.encode(told)
            if len(self.offer) > MOST_OFFER:
                raise InvalidArgument(f"what would have to be told to others has {len(self.offer)} bytes, and {MOST_OFFER} is the most")
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Serve no longer. Idempotent."""
        self._stack.close()

    def check(self) -> None:
        """Look whether the generations are still held.

        Raises:
            GmsError: One is not: its server has gone, and none has followed that knows of the lease.
        """
        for session in self._sessions:
            session.status()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _take(self, place: Place, stack: contextlib.ExitStack) -> _Taken:
        """Lease what a pool has committed."""
        session = stack.enter_context(connect(socket_path=place.socket, client=CLIENT))
        lease = stack.enter_context(committed(session, place.pool))
        self._sessions.append(session)
        return _Taken(session, lease, lease.layout)


def _offered(place: Place, taken: _Taken, agent: Agent, stack: contextlib.ExitStack, tell: Callable[[str], None]) -> _Served:
    """Map a pool's memory, find its checksums, and let NIXL read it."""
    tell(f"{place}: checksums")
    session, layout, arena = taken.session, taken.layout, taken.lease.map()
    memory = stack.enter_context(memory_for(session.device, [(one.offset, one.size) for one in layout.allocations]))
    memory.ready(arena.base)
    device = Device(session.welcome.device, session.welcome.driver, session.welcome.granularity)
    image = _image(place.pool, device, layout)
    image = msgspec.structs.replace(image, checksums=tuple(f"{one:016x}" for one in checksums(image, memory)))
    lane = memory.lane()
    stack.callback(lane.close)
    lane.arrive()  # NIXL registers a GPU's memory in the context of the thread that calls it
    spans = memory.places(0, image.size)
    gpu = max((span.gpu for span in spans), default=HOST_MEMORY)
    segment: Literal["DRAM", "VRAM"] = "DRAM" if gpu == HOST_MEMORY else "VRAM"
    gpu = max(gpu, 0)
    try:
        agent.register(segment, [Range(span.address, span.size, gpu) for span in spans])
    except NixlError as error:
        raise InvalidArgument(f"NIXL cannot let others read {place}: {error}", hint="What NIXL has printed may say more.") from error
    return _Served(image, Reach(segment, gpu, tuple(Span(span.address, span.size) for span in spans)))


class _Peers:
    """Who is connected."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unproven: set[socket.socket] = set()
        self._proven: set[socket.socket] = set()
        self._warned, self._unsaid = 0.0, 0

    def admit(self, peer: socket.socket) -> bool:
        """Take one in that has yet to prove that it has the secret, if there is room. Strangers do not take the places of those that have."""
        with self._lock:
            if len(self._unproven) >= _MOST_STRANGERS:
                return False
            self._unproven.add(peer)
            return True

    def prove(self, peer: socket.socket) -> bool:
        """It has the secret; returns whether there is room for it."""
        with self._lock:
            self._unproven.discard(peer)
            if len(self._proven) >= _MOST_PEERS:
                return False
            self._proven.add(peer)
            return True

    def leave(self, peer: socket.socket) -> None:
        """It is gone."""
        with self._lock:
            self._unproven.discard(peer)
            self._proven.discard(peer)

    def warn(self, where: Address, reason: str) -> None:
        """Log why one was refused; not each time, since strangers can have that as often as they like."""
        with self._lock:
            now = time.monotonic()
            if now - self._warned < _WARN_S and self._warned:
                self._unsaid += 1
                return
            self._warned, more, self._unsaid = now, self._unsaid, 0
        log.warning("%s is refused: %s%s", where, reason, f" ({more} more were since)" if more else "")

    def hang_up(self) -> None:
        """End all connections."""
        with self._lock:
            for peer in self._unproven | self._proven:
                with contextlib.suppress(OSError):
                    peer.shutdown(socket.SHUT_RDWR)


def serve(serving: Serving, listener: socket.socket, secret: bytes) -> None:
    """Answer who connects, until this process is told to end. For the main thread only.

    Args:
        serving: What to serve.
        listener: It listens.
        secret: That others must have.

    Raises:
        GmsError: The generations are not held any more.
    """
    peers = _Peers()
    lost: list[GmsError] = []
    ended = threading.Event()
    # Signals that end the process are taken from here on: before, they end it as they always do, and the leases go with it.
    with stop_signals([signal.SIGINT, signal.SIGTERM]) as told, selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        waking, sleeping = socket.socketpair()
        stack.enter_context(waking)
        stack.enter_context(sleeping)
        stack.callback(peers.hang_up)
        stack.callback(ended.set)
        threading.Thread(target=_watch, args=(serving, ended, lost, waking), daemon=True).start()
        listener.setblocking(False)  # who has connected may have gone before it is accepted
        for one in (told, sleeping, listener):
            selector.register(one, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is told:
                    return
                if key.fileobj is sleeping:
                    raise lost[0]
                _accept(serving, listener, secret, peers)


def _watch(serving: Serving, ended: threading.Event, lost: list[GmsError], waking: socket.socket) -> None:
    """Look now and then whether the leases are still there: without them, nobody knows that the memory is in use."""
    while not ended.wait(_LOOK_S):
        try:
            serving.check()
        except GmsError as error:
            lost.append(error)
            with contextlib.suppress(OSError):
                waking.send(b"x")
            return


def _accept(serving: Serving, listener: socket.socket, secret: bytes, peers: _Peers) -> None:
    try:
        peer, where = listener.accept()
    except BlockingIOError:
        return
    except OSError as error:  # such as no descriptor that is left: it stays readable meanwhile
        log.warning("nobody can be accepted: %s", error)
        time.sleep(_PAUSE_S)
        return
    address = Address(*where[:2])
    if not peers.admit(peer):
        peers.warn(address, "too many have connected, and not proved anything yet")
        peer.close()
        return
    try:
        threading.Thread(target=_attend, args=(serving.offer, peer, address, secret, peers), daemon=True).start()
    except RuntimeError as error:
        peers.leave(peer)
        peers.warn(address, str(error))
        peer.close()


def _attend(offer: bytes, peer: socket.socket, where: Address, secret: bytes, peers: _Peers) -> None:
    """Make one peer the offer, and wait until it has gone."""
    with peer:
        try:
            _notice_death(peer)
            answer(peer, secret, offer, lambda: peers.prove(peer))
            log.info("%s pulls", where)
            while peer.recv(1 << 16):
                pass
            log.info("%s has ended", where)
        except PermissionRefused as error:
            peers.warn(where, error.message)
        except OSError as error:
            log.info("%s has gone: %s", where, error)
        finally:
            peers.leave(peer)


def _notice_death(peer: socket.socket) -> None:
    """Have the kernel end a connection whose other machine has gone without a word."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3), (socket.TCP_USER_TIMEOUT, 60_000)):
        peer.setsockopt(socket.IPPROTO_TCP, option, value)


def listen(where: Address) -> socket.socket:
    """Listen at an address.

    Raises:
        InvalidArgument: That is not possible.
    """
    try:
        family = socket.getaddrinfo(*where, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server(where, family=family)
    except OSError as error:
        raise InvalidArgument(f"{where} cannot be listened at: {error}", hint="Name an address of this machine, and a port that is free.") from error


def _image(pool: str, device: Device, layout: Layout) -> Image:
    """An image of what is committed, without checksums."""
    (shards, stripes) = lay_out(
        layout.size, "memory", [WeightedRoot(secrets.token_hex(16))], stripe_bytes=STRIPE_BYTES, shard_bytes=_whole(layout.size)
    )
    allocations = tuple((one.offset, one.size) for one in layout.allocations)
    return Image(
        pool, layout.generation, device, dict(layout.identity.fields), layout.digest, allocations, layout.manifest, shards, stripes, BLOCK_BYTES, ()
    )


def _whole(size: int) -> int:
    """Bytes of a shard that has all of an image."""
    return max(1, -(-size // STRIPE_BYTES)) * STRIPE_BYTES
