"""What TensorRT-LLM calls a client: one loader's lease on the weights of its rank, and the calls by which it publishes or attaches.

A process has one client for each tag. TensorRT-LLM gives the loader of a draft model the same tag as the target's; a client whose weights are
published or attached is never handed to a second loader, for that would get the other model's memory.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from gms_core.client import ReadLease, Session, WriteLease, connect
from gms_core.engine_config import parse_block
from gms_core.errors import LeaseConflict
from gms_core.layout import Identity
from gms_core.pytorch import capture, materialise, publish
from gms_core.pytorch.cuda_pool import give_out
from gms_core.pytorch.device import free_memory
from gms_core.pytorch.population import check_populated, marking
from gms_core.ranks import all_or_none
from gms_core.sleep import WEIGHTS, Sleeper
from gms_core.weights.holdings import Holding, forget, keep
from gms_core.weights.identity import check_content
from gms_core.weights.leases import Granted, acquire
from gms_core.weights.loading import Publishing, attach_with
from gms_trtllm.cohort import join
from gms_trtllm.identity import Expected, expected
from gms_trtllm.locks import GrantedLockType, RequestedLockType
from gms_trtllm.outer_pool import outside
from gms_trtllm.place import device_id, named_socket, pool_name, torch_device
from gms_trtllm.ranks import all_ranks, rank
from gms_trtllm.slots import built_here, of_communicators

WHERE = "gms_config"

Result = TypeVar("Result")


class Mapped(NamedTuple):
    """Memory that a client has mapped.

    Attributes:
        va: The first address.
        size: Bytes.
    """

    va: int
    size: int


@dataclass(frozen=True, slots=True)
class _Asked:
    """Who asks for a client: the same one gets the same client."""

    socket: Path
    device_index: int
    mode: RequestedLockType
    tag: str


class Client:
    """One loader's lease.

    Attributes:
        tag: The user's name for the weights.
        granted_lock_type: What was granted first; a writer stays one in it when it has published.
        is_loaded: Whether its weights are published or attached.
        is_draft: Whether they are those of a draft model that has a loader of its own.
    """

    def __init__(self, asked: _Asked, session: Session, granted: Granted, holding: Holding, publishing: Publishing | None, *, is_draft: bool) -> None:
        self.asked = asked
        self.tag = asked.tag
        self.device = torch_device(asked.device_index)
        self.granted_lock_type = GrantedLockType.RW if publishing is not None else GrantedLockType.RO
        self.is_loaded = False
        self.is_draft = is_draft
        self._has_met = False
        self._sleeper = Sleeper()
        self._session = session
        self._wait_seconds = granted.wait_seconds
        self._holding = holding
        self._publishing = publishing

    @property
    def lease(self) -> WriteLease | ReadLease:
        """The right that this client has now."""
        return self._holding.lease

    @property
    def total_bytes(self) -> int:
        """Of the published weights; of a writer, of the memory that it has so far."""
        lease = self.lease
        return lease.arena.length if isinstance(lease, WriteLease) else lease.layout.size

    @property
    def _mappings(self) -> Mapping[int, Mapped]:
        """What is mapped, by its address."""
        arena = self.lease.arena
        return {arena.base: Mapped(arena.base, arena.length)} if arena is not None and arena.length else {}

    def create_mapping(self, *, size: int, tag: str) -> int:  # noqa: ARG002 - a client has one tag
        """Memory for so many bytes of weights; returns its address.

        Raises:
            LeaseConflict: This client does not write.
            OutOfMemory: The device has no room.
        """
        arena = self._write_lease("make memory").arena
        (offset,) = give_out(arena, [size])
        return arena.address(offset)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """While it lasts, what this thread allocates on the device lies in the memory that is going to be published.

        Raises:
            LeaseConflict: This client does not write.
            EngineUnsupported: There is a memory pool of TensorRT-LLM's around it that cannot be left.
        """
        lease = self._write_lease("load weights")
        with outside(), capture(lease.arena, self.device), marking(self.device):
            yield

    def publish(self, model: torch.nn.Module) -> int:
        """Publish a model, and go on as a reader of it.

        Several ranks publish once each of them can: a part of a model is of no use to the next engine.

        Returns:
            Bytes of the layout.

        Raises:
            LeaseConflict: This client does not write.
            UnpopulatedModule: Nothing was loaded into some of the parameters, here or on another rank. No rank has published.
            GmsError: It cannot be shared, or the connection was lost.
        """
        lease = self._write_lease("publish")

        def fill() -> bytes:
            check_populated(model)
            return publish(model, lease.arena, device=self.device, ignore=of_communicators(model))

        manifest = self._meet(fill)
        assert self._publishing is not None  # who has a write lease
        self._publishing.end(manifest)
        self._loaded()
        return self.total_bytes

    def attach(self, model: torch.nn.Module) -> None:
        """Let a model use what is published. Several ranks go on once each of them has attached.

        Raises:
            LeaseConflict: This client writes.
            ManifestError: What is published does not fit the model, which is as it was.
            UnpopulatedModule: Tensors would be left without content.
            GmsError: Another rank could not attach.
        """
        lease = self.lease
        if not isinstance(lease, ReadLease) or self.is_loaded:
            raise LeaseConflict(f"this process writes the weights {self.tag!r}, or has attached to them already: it cannot attach")

        def install(lease: ReadLease) -> None:
            materialise(model, lease.layout.manifest, lease.map(), device=self.device, rebuilt=built_here(model), allow_changes=True)

        self._meet(lambda: attach_with(self._holding, lease, self._wait_seconds, install))
        self._loaded()

    @property
    def is_asleep(self) -> bool:
        """Whether its weights are not mapped."""
        return bool(self._sleeper.asleep)

    def suspend(self) -> None:
        """Unmap the weights: nothing may be computed until `resume`. Their addresses and the lease stay. Idempotent."""
        self._sleeper.suspend((WEIGHTS,))

    def resume(self) -> None:
        """Map the weights at their addresses again. Idempotent.

        Raises:
            GmsError: The server has gone, and what it had with it. The call can be repeated.
        """
        self._sleeper.resume((WEIGHTS,))

    def close(self) -> None:
        """End the session, and with it the lease: what was not published is gone. Idempotent.

        What is mapped stays so, since tensors may point there. A rank that has not come to publish or attach tells the others, which wait for it.
        """
        if not self._has_met:
            with contextlib.suppress(Exception):  # this rank's own: it is raised where it happened
                self._meet(partial(_raise, sys.exception()))
        forget(self._holding)
        self._session.close()

    def _meet(self, step: Callable[[], Result]) -> Result:
        """Take the one step of a client's life for which all ranks wait."""
        self._has_met = True
        return all_or_none(all_ranks(), step)

    def _loaded(self) -> None:
        self.is_loaded = True
        self._sleeper.weights = (self._holding,)
        keep(self._holding)

    def _write_lease(self, what: str) -> WriteLease:
        lease = self.lease
        if not isinstance(lease, WriteLease):
            raise LeaseConflict(f"this process only reads the weights {self.tag!r}: it cannot {what}")
        return lease


def _raise(error: BaseException | None) -> None:
    raise error if isinstance(error, Exception) else LeaseConflict("it has given up its load")


_lock = threading.RLock()
_clients: dict[str, Client] = {}


def get_or_create(socket_path: str, device_index: int, *, mode: RequestedLockType, tag: str, wanted: Expected | None = None) -> Client:
    """The client for a tag. It waits for the lease: while another engine loads, for what that publishes.

    Args:
        socket_path: Of the device's server; see `gms_trtllm.place.named_socket`.
        device_index: Of the rank's device.
        mode: What is asked for.
        tag: The user's name for the weights.
        wanted: What is loaded; None for what was said of this process.

    Raises:
        ConfigurationError: The path or the tag is not one; or it is not known what this process loads.
        LeaseConflict: Another loader of this process has the tag.
        WrongDevice: The server has another device than this rank computes on.
        IdentityMismatch: Something else is published.
        GmsError: No server, no lease.
    """
    asked = _Asked(named_socket(socket_path, device_index, tag), device_index, mode, tag)
    with _lock:
        known = _clients.get(tag)
        if known is None:
            return _clients.setdefault(tag, _open(asked, wanted))
        if known.is_loaded or known.asked != asked:
            raise LeaseConflict(
                f"this process has loaded the weights {tag!r} already: a second model, such as a draft, would get the first one's memory",
                hint="Give it a tag of its own, or end the engine that has the first.",
            )
        return known


def _open(asked: _Asked, wanted: Expected | None) -> Client:
    """Ranks take each step together: one that cannot must not keep its mates waiting for it."""
    options = parse_block({"socket_path": asked.socket, "mode": asked.mode.value, "tag": asked.tag}, where=WHERE)
    wanted = wanted or expected(asked.tag)
    with contextlib.ExitStack() as undo:

        def connected() -> tuple[Session, Identity, list[Path]]:
            files = wanted.files()
            identity = wanted.identity(files)
            name = f"tensorrt_llm {identity.fields['engine_version']} rank {rank()}"
            session = connect(device_id(asked.device_index), socket_path=asked.socket, client=name, timeout_s=options.connect_timeout_s)
            undo.callback(session.close)
            join(asked.socket, identity, options.connect_timeout_s)
            return session, identity, files

        session, identity, files = all_or_none(all_ranks(), connected)
        before = free_memory()
        granted = acquire(session, pool_name(asked.tag, asked.device_index), identity, options, all_ranks)
        holding = Holding(session, granted.lease, neighbours=before - free_memory())

        def checked() -> Publishing | None:
            if isinstance(granted.lease, WriteLease):
                return Publishing(holding, granted.lease, granted.wait_seconds, identity, files)
            if not identity.fields.get("content"):
                check_content(files, granted.lease.layout.identity)
            return None

        client = Client(asked, session, granted, holding, all_or_none(all_ranks(), checked), is_draft=bool(wanted.draft))
        undo.pop_all()
    return client


def all_loaded() -> list[Client]:
    """The clients of this process whose weights are published or attached."""
    with _lock:
        return [client for client in _clients.values() if client.is_loaded]


def evict(client: Client) -> None:
    """Forget a client, so that its tag can be asked for again. Idempotent."""
    with _lock:
        if _clients.get(client.tag) is client:
            del _clients[client.tag]


@contextlib.contextmanager
def use_mem_pool(tag: str, device: torch.device) -> Iterator[None]:  # noqa: ARG001 - the client's own
    """Allocate in the memory that is going to be published under a tag; see `Client.writing`.

    Raises:
        LeaseConflict: No client of this process writes it.
    """
    with _lock:
        client = _clients.get(tag)
    if client is None:
        raise LeaseConflict(f"no loader of this process has asked for the weights {tag!r}")
    with client.writing():
        yield


def finalise_write(client: Client, model: torch.nn.Module) -> int:
    """Publish a model; see `Client.publish`."""
    return client.publish(model)


def materialise_module(client: Client, model: torch.nn.Module, *, device_index: int) -> None:  # noqa: ARG001 - the client's own
    """Let a model use what is published; see `Client.attach`."""
    client.attach(model)


def nothing_to_patch() -> None:
    """TensorRT-LLM asks for ``torch.cuda.empty_cache`` to be patched; memory that PyTorch frees goes back to the arena by itself here."""
