"""A process that measures one thing, or checks one, and nothing else: ``python -m tools.bench.child``.

It reads its order from standard input and answers with one line of JSON. What it loads with may fail, and take the process with it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from gms_core.client import ReadLease, WriteLease, connect
from gms_core.client.arena import round_up
from gms_core.client.generations import PoolGenerations
from gms_core.errors import GmsError, ProtocolError, SnapshotDamaged
from gms_core.layout import Identity
from gms_core.vmm.driver import Address
from tools.bench.checkpoint import Tensor, read_list
from tools.bench.loaders import PEERS, prepare
from tools.bench.orders import Answer, Check, Copy, Failed, Load, Order, Publish

IDENTITY = Identity({"model": "make bench"})
PATIENCE_S = 60.0
PIECE_BYTES = 16 * 2**20
ROUNDS = 5
NAMED = 3
"""Tensors that a message names."""


def carry_out(order: Order) -> Answer:
    """Do what was ordered.

    Raises:
        GmsError: It cannot be done; the message is the reason.
    """
    match order:
        case Load():
            return _load(order)
        case Copy():
            return Answer(rate=_copy_to_gpu(order) if order.device != "host" else _copy_on_host(order))
        case Publish():
            return Answer(offset=_publish(order))
        case Check():
            _check(order)
            return Answer()


def _load(order: Load) -> Answer:
    """Load with a peer, and compare every tensor afterwards."""
    peer = PEERS[order.peer]
    version = prepare(peer, order.device)
    import torch

    torch.empty(1, device=order.device)  # the device's context is there before the clock starts
    checkpoint = read_list(Path(order.folder))
    files = [os.fspath(path) for path in checkpoint.files]
    began = time.monotonic()
    loaded = peer.load(files, order.device)
    if order.device != "cpu":
        torch.cuda.synchronize()
    ended = time.monotonic()
    lacking = [tensor.name for tensor in checkpoint.tensors if tensor.name not in loaded.by_name]
    _raise_if_wrong(lacking, checkpoint.tensors)
    elsewhere = sorted({str(tensor.device) for tensor in loaded.by_name.values()} - {order.device})
    if elsewhere:
        raise SnapshotDamaged(f"tensors are on {', '.join(elsewhere)} and not on {order.device}")
    digests = ((tensor, _digest_of(loaded.by_name[tensor.name])) for tensor in checkpoint.tensors)
    _raise_if_wrong([tensor.name for tensor, digest in digests if digest != tensor.digest], checkpoint.tensors)
    return Answer(seconds=ended - began, ended=ended, version=version, notes=loaded.notes)


def _digest_of(tensor: Any) -> str:
    on_host = tensor.cpu().contiguous()
    size = on_host.numel() * on_host.element_size()
    return xxhash.xxh3_64_hexdigest((ctypes.c_char * size).from_address(on_host.data_ptr()))


def _copy_on_host(order: Copy) -> float:
    """Bytes a second that all cores together copy from and to memory in huge pages that is there already: the best of several rounds."""
    from gms_core.snapshot.buffers import Ring, populate

    ring = Ring(2, order.bytes)
    try:
        populate(ring.buffers)
        source, target = (buffer.address for buffer in ring.buffers)
        cores = len(os.sched_getaffinity(0))
        pieces = [(place, min(PIECE_BYTES, order.bytes - place)) for place in range(0, order.bytes, PIECE_BYTES)]

        def copy(own: list[tuple[int, int]]) -> None:
            for place, size in own:
                ctypes.memmove(target + place, source + place, size)  # without the interpreter's lock

        with ThreadPoolExecutor(cores) as pool:
            return order.bytes / _best(lambda: list(pool.map(copy, [pieces[number::cores] for number in range(cores)])))
    finally:
        ring.close()


def _copy_to_gpu(order: Copy) -> float:
    """Bytes a second of one large asynchronous copy from pinned memory: the best of several rounds."""
    from gms_core.vmm.cuda_calls import checked, find_device

    checked("cuCtxPushCurrent", checked("cuDevicePrimaryCtxRetain", find_device(order.device)))
    source, target = checked("cuMemHostAlloc", order.bytes, 0), checked("cuMemAlloc", order.bytes)
    stream = checked("cuStreamCreate", 1)
    ctypes.memset(int(source), 1, order.bytes)

    def copy() -> None:
        checked("cuMemcpyHtoDAsync", target, int(source), order.bytes, stream)
        checked("cuStreamSynchronize", stream)

    return order.bytes / _best(copy)  # the process ends now, and all of it with it


def _best(action: Callable[[], object]) -> float:
    spent = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        action()
        spent.append(time.perf_counter() - began)
    return min(spent)


def _publish(order: Publish) -> int:
    """Publish the checkpoint's bytes, tensor after tensor. Returns where in the arena they begin."""
    checkpoint = read_list(Path(order.folder))
    with connect(socket_path=Path(order.socket), client="make bench") as session:
        lease = session.acquire(order.pool, "rw", IDENTITY, timeout_s=PATIENCE_S)
        if not isinstance(lease, WriteLease):
            raise ProtocolError("the server gave a read lease to a writer")
        with lease:
            offset = place = lease.arena.allocate(round_up(checkpoint.size, session.welcome.granularity))
            for number, path in enumerate(checkpoint.files):
                own = [tensor for tensor in checkpoint.tensors if tensor.file == number]
                with path.open("rb") as file:
                    file.seek(own[0].position)
                    left = sum(tensor.size for tensor in own)
                    while left:
                        piece = file.read(min(PIECE_BYTES, left))
                        if not piece:
                            raise SnapshotDamaged(f"{path} is too short")
                        session.driver.write(lease.arena.address(place), piece)
                        place += len(piece)
                        left -= len(piece)
            session.driver.synchronize()
            lease.commit(b"", IDENTITY).release()
    return offset


def _check(order: Check) -> None:
    """Compare what is published with the checkpoint, and free it."""
    checkpoint = read_list(Path(order.folder))
    with connect(socket_path=Path(order.socket), client="make bench") as session:
        lease = session.acquire(order.pool, "ro", IDENTITY, timeout_s=PATIENCE_S)
        if not isinstance(lease, ReadLease):
            raise ProtocolError("the server gave a write lease to a reader")
        with lease:
            place = lease.map().base + order.offset
            wrong = []
            for tensor in checkpoint.tensors:
                digest = xxhash.xxh3_64()
                for begin in range(0, tensor.size, PIECE_BYTES):
                    digest.update(session.driver.read(Address(place + begin), min(PIECE_BYTES, tensor.size - begin)))
                if digest.hexdigest() != tensor.digest:
                    wrong.append(tensor.name)
                place += tensor.size
        PoolGenerations(session, order.pool).drop(lease.layout.generation)
    _raise_if_wrong(wrong, checkpoint.tensors)


def _raise_if_wrong(wrong: list[str], tensors: Iterable[Tensor]) -> None:
    if wrong:
        more = ", …" if len(wrong) > NAMED else ""
        raise SnapshotDamaged(f"{len(wrong)} of {len(list(tensors))} tensors are not those of the checkpoint: {', '.join(wrong[:NAMED])}{more}")


def main() -> int:
    """Carry out the one order. Returns the exit code."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    answer: Answer | Failed
    try:
        answer = carry_out(msgspec.json.decode(sys.stdin.buffer.read(), type=Order))
    except GmsError as error:
        answer = Failed(error.code, error.message)
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is the reason why it has no figures
        traceback.print_exc()
        answer = Failed("failed", f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    with answers:
        answers.write(msgspec.json.encode(answer))
    return int(isinstance(answer, Failed))


if __name__ == "__main__":
    os._exit(main())  # threads that a library has left behind are not waited for
