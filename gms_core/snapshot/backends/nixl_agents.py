"""NIXL, loaded when it is wanted: the one module that imports it. Agents with one plugin each, and errors that can be told apart.

NIXL prints, starts threads and takes a third of a second to load: it belongs into a process that does nothing but transfer. Which wheel is there
depends on the CUDA that it was built for; each one also has the plugins that need no GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import secrets
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gms_core.errors import BackendUnavailable

log = logging.getLogger(__name__)

Operation = Literal["READ", "WRITE"]
Segment = Literal["DRAM", "VRAM", "FILE"]

EXTRA = "Install it with: pip install 'gms[nixl]'."
_one_at_a_time = threading.Lock()
"""Held while an agent is made: plugins look at the machine's devices then, and not all of them can do that in two threads at once."""
_WHEELS = ("nixl_cu13", "nixl_cu12", "nixl_rocm")


class NixlError(Exception):
    """NIXL has refused something, or could not do it. It does not say which file or why; its messages on standard error say more."""


class StillUnderWay(NixlError):
    """NIXL may still read or write what it was told to, and cannot be made to stop: nothing that it has may be given up."""


class Handle:
    """What an agent has begun. The agent keeps it until it has ended.

    Args:
        found: NIXL's own; it goes when the agent is done with it, since it keeps NIXL's agent.
    """

    __slots__ = ("__weakref__", "found")

    def __init__(self, found: Any) -> None:
        self.found = found


class Library(NamedTuple):
    """NIXL's Python bindings.

    Attributes:
        module: As it was imported.
        version: Such as ``1.5.1``.
    """

    module: Any
    version: str


class Range(NamedTuple):
    """Bytes that NIXL may move from or to.

    Attributes:
        begin: Address, or position in a file.
        size: Bytes.
        device: Number of the GPU, descriptor of the file, or 0.
    """

    begin: int
    size: int
    device: int


@functools.cache
def library() -> Library:
    """Import NIXL.

    Raises:
        BackendUnavailable: It is not installed, or cannot be loaded; the message says which.
    """
    there = [name for name in _in_order() if importlib.util.find_spec(name) is not None]
    if not there:
        raise BackendUnavailable("the library NIXL is not installed", hint=EXTRA)
    reasons = []
    for name in there:
        try:
            _leave_logging_alone(name)
            module = importlib.import_module(name)
        except ImportError as error:
            reasons.append(f"{name}: {error}")
            continue
        return Library(module, importlib.metadata.version(name.replace("_", "-")))
    raise BackendUnavailable(f"the library NIXL cannot be loaded: {'; '.join(reasons)}", hint=EXTRA)


def _in_order() -> list[str]:
    """The wheels, the one for this environment's CUDA first: NIXL's own choice would import torch to learn which that is."""
    try:
        mine = f"nixl_cu{importlib.metadata.version('cuda-bindings').split('.')[0]}"
    except importlib.metadata.PackageNotFoundError:
        mine = ""
    return sorted(_WHEELS, key=lambda name: name != mine)


def _leave_logging_alone(name: str) -> None:
    """Tell NIXL that logging is set up: when it is imported, it would close all handlers of this process, and print to standard output."""
    package = importlib.util.find_spec(name)
    source = Path(package.origin).with_name("logging.py") if package is not None and package.origin is not None else None
    if source is None or not source.exists() or f"{name}.logging" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(f"{name}.logging", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._logging_configured = True  # type: ignore[attr-defined]  # noqa: SLF001 - there is no other way, and a version without it takes no harm
    sys.modules[f"{name}.logging"] = module


class Agent:
    """One NIXL agent with one plugin.

    Attributes:
        drains: See below.

    Args:
        plugin: Such as ``POSIX``.
        options: The plugin's own.
        shared: Whether several threads use it.
        serves: Whether others read from it: it needs a thread of its own for that.
        drains: Whether the plugin waits, when it is destroyed, for all that it has begun, whatever it has said of that.

    Raises:
        BackendUnavailable: NIXL, or the plugin, cannot be loaded here.
    """

    def __init__(self, plugin: str, options: Mapping[str, str], *, shared: bool = False, serves: bool = False, drains: bool = False) -> None:
        module = library().module
        self._plugin = plugin
        self.drains = drains
        self._name = f"gms-{secrets.token_hex(8)}"  # two that meet must not have one name
        self._agent: Any = None
        sync = module.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT if shared else module.nixl_thread_sync_t.NIXL_THREAD_SYNC_NONE
        try:
            with _one_at_a_time:
                self._agent = module.nixl_agent(self._name, module.nixl_agent_config(enable_prog_thread=serves, backends=[], sync_mode=sync))
                self._agent.create_backend(plugin, dict(options))
        except Exception as error:
            _forget_frames(error)
            self._agent = None
            raise BackendUnavailable(
                f"NIXL {library().version} cannot load its plugin {plugin}: {error}", hint="NIXL says more on standard error."
            ) from error
        self._registered: list[Any] = []
        self._under_way: set[Handle] = set()
        self._failed: set[Handle] = set()

    def register(self, segment: Segment, ranges: Sequence[Range]) -> None:
        """Let it move bytes from and to these.

        Raises:
            NixlError: It cannot.
        """
        try:
            self._registered.append(self._agent.register_memory([(*one, "") for one in ranges], segment, backends=[self._plugin]))
        except Exception as error:
            _forget_frames(error)
            raise NixlError(f"{segment} cannot be registered: {error}") from error

    def begin(self, operation: Operation, segment: Segment, memory: Range, file: Range) -> Handle:
        """Begin to read a file into memory, or to write it from there. Both are registered.

        Raises:
            NixlError: It was not begun, or has failed at once. Parts of it may be under way until the agent is closed.
        """
        return self._begun(operation, (segment, [memory]), ("FILE", [file]), self._name)

    def begin_from(self, peer: str, memory: Sequence[Range], segment: Segment, there: Sequence[Range]) -> Handle:
        """Begin to read from a peer's memory into that of the host.

        Args:
            peer: As `meet` called it.
            memory: Registered here.
            segment: Of the peer's memory.
            there: Registered by the peer; each as long as its counterpart.

        Raises:
            NixlError: See `begin`.
        """
        return self._begun("READ", ("DRAM", memory), (segment, there), peer)

    def metadata(self) -> bytes:
        """What a peer has to know to read what is registered here."""
        return bytes(self._agent.get_agent_metadata())

    def meet(self, metadata: bytes) -> str:
        """Get to know a peer by its metadata; returns its name.

        Raises:
            NixlError: It is no such metadata.
        """
        try:
            found = self._agent.add_remote_agent(metadata)
        except Exception as error:
            _forget_frames(error)
            raise NixlError(str(error)) from error
        return found.decode() if isinstance(found, bytes) else str(found)

    def has_ended(self, handle: Handle) -> bool:
        """Whether what was begun has ended well; never waits. A handle that has ended is used up.

        Raises:
            NixlError: It is said to have failed. A plugin may say so of one request when it means another, or its queue: this one may be under way
                until the agent is closed.
        """
        try:
            state = self._agent.check_xfer_state(handle.found)
            if state == "PROC":
                return False
            if state == "DONE":
                self._agent.release_xfer_handle(handle.found)
        except Exception as error:
            _forget_frames(error)
            self._has_failed(handle)
            raise NixlError(str(error)) from error
        if state != "DONE":
            self._has_failed(handle)
            raise NixlError(f"its state is {state}")
        self._under_way.discard(handle)
        handle.found = None
        return True

    def close(self) -> None:
        """Destroy it. Nothing that it has begun is under way when this returns. Idempotent.

        Raises:
            StillUnderWay: Something is, or may be; the agent is as it was, and has to be kept.
        """
        if self._agent is None:
            return
        if self._under_way or (self._failed and not self.drains):
            raise StillUnderWay(f"{len(self._under_way) + len(self._failed)} requests have not ended")
        for handle in list(self._failed):
            try:
                self._agent.release_xfer_handle(handle.found)
            except Exception as error:
                _forget_frames(error)
                raise StillUnderWay(f"a request that has failed cannot be given up: {error}") from error
            self._failed.discard(handle)
            handle.found = None
        while self._registered:
            try:
                self._agent.deregister_memory(self._registered.pop(), [self._plugin])
            except Exception as error:  # noqa: BLE001 - the plugin forgets it when it is destroyed
                log.warning("NIXL: memory cannot be deregistered: %s", error)
        gone = weakref.ref(self._agent)
        self._agent = None  # the last reference: the plugin is destroyed here
        if gone() is not None:
            self._agent = gone()
            raise StillUnderWay("somebody else keeps NIXL's agent")

    def _has_failed(self, handle: Handle) -> None:
        self._under_way.discard(handle)
        self._failed.add(handle)

    def _begun(self, operation: Operation, here: tuple[Segment, Sequence[Range]], there: tuple[Segment, Sequence[Range]], peer: str) -> Handle:
        try:
            descriptions = [self._agent.get_xfer_descs([tuple(one) for one in ranges], segment) for segment, ranges in (here, there)]
            handle = Handle(self._agent.initialize_xfer(operation, *descriptions, peer, b"", [self._plugin]))
        except Exception as error:
            _forget_frames(error)
            raise NixlError(str(error)) from error
        self._under_way.add(handle)
        try:
            self._agent.transfer(handle.found)
        except Exception as error:
            _forget_frames(error)
            self._has_failed(handle)
            raise NixlError(str(error)) from error
        return handle


def _forget_frames(error: Exception) -> None:
    """Drop those that an error of NIXL's came through: they keep NIXL's agent."""
    error.__traceback__ = None
