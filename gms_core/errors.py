"""The one tree of errors. Each class has a stable ``code`` that is the same on the wire, in logs and in ``-o json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class GmsError(Exception):
    """Base of every error that GMS raises.

    Attributes:
        code: Stable identifier, the same on the wire and in machine-readable output.
        retryable: Whether the same call can succeed later without a change by the caller.
        hint: What the reader of the message can do about it; empty when there is nothing to add.
        details: Facts behind the message, as strings, for logs and JSON output.
    """

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "", details: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = dict(details or {})

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message

    def add_hint(self, sentence: str) -> None:
        """Add a sentence to the hint."""
        stop = "" if not self.hint or self.hint.endswith((".", "?", "!")) else "."
        self.hint = f"{self.hint}{stop} {sentence}".strip()


class InvalidArgument(GmsError):
    """A value that can never be right: a negative size, an empty pool name, an unknown mode."""

    code = "invalid_argument"


class ConfigurationError(GmsError):
    """A setting, an environment variable or an engine's option is unknown or has a wrong value."""

    code = "configuration"


class PluginError(GmsError):
    """A plugin cannot be loaded, or one of its hooks failed. The message names the plugin."""

    code = "plugin"


class DriverError(GmsError):
    """A call of the memory driver failed. The message names the call and the result in words."""

    code = "driver"


class DriverUnavailable(DriverError):
    """The driver, its bindings or a capability that GMS needs is missing on this machine."""

    code = "driver_unavailable"


class OutOfMemory(DriverError):
    """The device has no room for the requested bytes, or waiting for room took too long."""

    code = "out_of_memory"
    retryable = True


class AllocationTooLarge(OutOfMemory):
    """The requested bytes exceed what the device has in all: waiting cannot help."""

    code = "allocation_too_large"
    retryable = False


class DeviceNotFound(GmsError):
    """No device of that name is on this machine or visible to this process."""

    code = "device_not_found"


class ProtocolError(GmsError):
    """The peer sent something that is not the GMS protocol, or broke its limits."""

    code = "protocol"


class VersionMismatch(ProtocolError):
    """Client and server speak protocol versions that have no overlap, or the server is too old for what is asked of it or was left to it."""

    code = "version_mismatch"


class PermissionRefused(GmsError):
    """Owner, mode or user of a socket, a directory or a peer is not what the policy allows."""

    code = "permission"


class ServerUnavailable(GmsError):
    """No server answers on the socket."""

    code = "server_unavailable"
    retryable = True


class ConnectionLost(GmsError):
    """The connection ended while a reply was due. What the server had committed is untouched."""

    code = "connection_lost"
    retryable = True


class SessionClosed(GmsError):
    """The session, lease or arena was closed by this process and cannot be used any more."""

    code = "session_closed"


class ForkedSession(GmsError):
    """A forked child used what belongs to its parent's session."""

    code = "forked_session"


class WrongDevice(GmsError):
    """The server answers for another device than the caller asked for."""

    code = "wrong_device"


class PoolNotFound(GmsError):
    """The server has no pool of that name."""

    code = "pool_not_found"


class LeaseConflict(GmsError):
    """The request needs a lease that this session lacks, or has one that forbids it."""

    code = "lease_conflict"


class AcquireTimeout(GmsError):
    """What was waited for (a lease, a role, an engine) did not come in time."""

    code = "acquire_timeout"
    retryable = True


class IdentityMismatch(GmsError):
    """What is published is not what the caller expects. ``details`` maps each differing field to ``expected != published``."""

    code = "identity_mismatch"


class GenerationConflict(GmsError):
    """The pool's current generation is not the one that the caller named."""

    code = "generation_conflict"


class GenerationNotFound(GmsError):
    """The pool has no such generation, or has it no more: nothing kept it."""

    code = "generation_not_found"


class ArenaTooSmall(GmsError):
    """A generation does not fit into the addresses that this process has reserved for the one that it reads."""

    code = "arena_too_small"


class CohortFenced(GmsError):
    """The server is ending this engine: one of its processes died, was silent for too long, or was ended by an operator."""

    code = "cohort_fenced"


class FenceFailed(GmsError):
    """A process of the engine that held the memory before could not be ended, so the memory cannot be granted to anybody."""

    code = "fence_failed"


class NotPromoted(GmsError):
    """The engine is a shadow: its KV memory is scratch, and a request would be answered with nonsense."""

    code = "not_promoted"


class LockStoreUnavailable(GmsError):
    """The store of a lock that several nodes share does not answer."""

    code = "lock_store_unavailable"
    retryable = True


class RoleConflict(GmsError):
    """What was asked of an engine cannot be, in the role that it has."""

    code = "role_conflict"


class PromotionFailed(GmsError):
    """The engine was elected, but could not become the primary. It has ended, and the next shadow takes its turn."""

    code = "promotion_failed"


class QuotaExceeded(GmsError):
    """A limit of the server (bytes, allocations, metadata, sessions) was reached."""

    code = "quota"


class KeeperLost(GmsError):
    """What keeps a device's memory while its server is restarted does not answer, or cannot be started."""

    code = "keeper_lost"
    retryable = True


class JournalUnavailable(GmsError):
    """The server cannot write down what it is about to grant, such as when the disk of its runtime directory is full."""

    code = "journal_unavailable"
    retryable = True


class JournalDamaged(GmsError):
    """What a device server wrote down cannot be read any more."""

    code = "journal_damaged"


class ManifestError(GmsError):
    """A tensor manifest cannot be built, read, or installed into this module."""

    code = "manifest"


class UnpopulatedModule(ManifestError):
    """Tensors are still on ``meta``, or nothing was loaded: such a module is never committed and never served."""

    code = "unpopulated_module"


class EngineUnsupported(GmsError):
    """The engine's version, model or option is not supported (yet). The message says which, and what to do."""

    code = "engine_unsupported"


class EngineAsleep(GmsError):
    """The engine sleeps: its weights or its KV memory are not mapped."""

    code = "engine_asleep"
    retryable = True


class EngineBusy(GmsError):
    """The engine has requests under way, and what was asked of it needs it idle."""

    code = "engine_busy"
    retryable = True


class EngineNotFound(GmsError):
    """No engine of that name, or of that role, has joined a server."""

    code = "engine_not_found"


class EngineFailed(GmsError):
    """An engine's process cannot be started, or engines end again and again before any of them serves."""

    code = "engine_failed"


class CheckpointNotFound(GmsError):
    """The checkpoint that the writer has to load is not there."""

    code = "checkpoint_not_found"


class SnapshotError(GmsError):
    """A snapshot cannot be saved, found, read or used."""

    code = "snapshot"


class SnapshotNotFound(SnapshotError):
    """There is no snapshot of that name or version, or one of its roots or files is not there."""

    code = "snapshot_not_found"


class SnapshotDamaged(SnapshotError):
    """A snapshot's manifest contradicts itself, or its files do not hold the bytes that were saved. Nothing of it is published."""

    code = "snapshot_damaged"


class SnapshotMismatch(SnapshotError):
    """A snapshot is sound, but of another format, model or kind of memory than what is wanted here."""

    code = "snapshot_mismatch"


class SnapshotBusy(SnapshotError):
    """Another process is saving under that name, or removing what is there."""

    code = "snapshot_busy"
    retryable = True


class TransferFailed(GmsError):
    """Bytes could not be read or written: a full disk, a broken one, or an object store that does not answer. The message names the file."""

    code = "transfer_failed"


class TransferCancelled(TransferFailed):
    """A transfer was ended early, by a signal or because another part of the same job has failed."""

    code = "transfer_cancelled"


class BackendUnavailable(GmsError):
    """A transfer backend cannot be used on this machine, or not for this job. The message says what it lacks."""

    code = "backend_unavailable"


def _tree(root: type[GmsError]) -> list[type[GmsError]]:
    return [root, *(found for child in root.__subclasses__() for found in _tree(child))]


def error_types() -> dict[str, type[GmsError]]:
    """Every error class by its code."""
    return {kind.code: kind for kind in _tree(GmsError)}


def rebuild(code: str, message: str, hint: str, details: Mapping[str, str]) -> GmsError:
    """Make the error that a peer named. An unknown code, from a newer peer, becomes a plain `GmsError`."""
    return error_types().get(code, GmsError)(message, hint=hint, details=details)
