"""Exit codes of the ``gms`` command, in one table."""

from __future__ import annotations

import enum
from typing import Self

from gms_core import errors


class ExitCode(enum.IntEnum):
    """What an exit code says; the same table is in docs/reference/cli.md."""

    meaning: str

    def __new__(cls, value: int, meaning: str) -> Self:
        """Make a member of its number and its meaning."""
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    OK = 0, "It worked."
    FAILURE = 1, "It failed, for a reason without a code of its own."
    USAGE = 2, "An option, an argument, a setting or an environment variable is wrong."
    FINDINGS = 3, "A check found something that fails."
    NO_SERVER = 4, "No server answers, or its connection was lost."
    PERMISSION = 5, "The owner, mode or user of a socket, a directory or a peer is not what the policy allows."
    IDENTITY = 6, "What is published, or in a snapshot, is not what was expected."
    TIMEOUT = 7, "What was waited for (a lease, a role, an engine) did not come in time."
    UNSUPPORTED = 8, "The engine, its version, the protocol's version or a transfer backend is not supported."
    NO_DEVICE = 9, "The device, its driver or the driver's bindings are not there, or the driver failed."
    NO_MEMORY = 10, "The device has no room, or a quota is used up."
    NOT_FOUND = 11, "The pool, its generation, the checkpoint, the snapshot or the engine is not there."
    FAILOVER = 12, "An engine cannot be kept alive, was ended by a server, cannot be ended, or cannot have the role that was asked for."
    SNAPSHOT = 13, "The bytes of a snapshot cannot be read or written, are not those that were saved, or another process is at work on it."
    INTERRUPTED = 130, "It was interrupted from the keyboard."


BY_ERROR: dict[type[errors.GmsError], ExitCode] = {
    errors.InvalidArgument: ExitCode.USAGE,
    errors.ConfigurationError: ExitCode.USAGE,
    errors.ServerUnavailable: ExitCode.NO_SERVER,
    errors.ConnectionLost: ExitCode.NO_SERVER,
    errors.LockStoreUnavailable: ExitCode.NO_SERVER,
    errors.PermissionRefused: ExitCode.PERMISSION,
    errors.IdentityMismatch: ExitCode.IDENTITY,
    errors.GenerationConflict: ExitCode.IDENTITY,
    errors.AcquireTimeout: ExitCode.TIMEOUT,
    errors.EngineUnsupported: ExitCode.UNSUPPORTED,
    errors.VersionMismatch: ExitCode.UNSUPPORTED,
    errors.DriverError: ExitCode.NO_DEVICE,
    errors.DeviceNotFound: ExitCode.NO_DEVICE,
    errors.WrongDevice: ExitCode.NO_DEVICE,
    errors.OutOfMemory: ExitCode.NO_MEMORY,
    errors.QuotaExceeded: ExitCode.NO_MEMORY,
    errors.PoolNotFound: ExitCode.NOT_FOUND,
    errors.GenerationNotFound: ExitCode.NOT_FOUND,
    errors.CheckpointNotFound: ExitCode.NOT_FOUND,
    errors.EngineNotFound: ExitCode.NOT_FOUND,
    errors.EngineFailed: ExitCode.FAILOVER,
    errors.CohortFenced: ExitCode.FAILOVER,
    errors.FenceFailed: ExitCode.FAILOVER,
    errors.NotPromoted: ExitCode.FAILOVER,
    errors.PromotionFailed: ExitCode.FAILOVER,
    errors.RoleConflict: ExitCode.FAILOVER,
    errors.SnapshotNotFound: ExitCode.NOT_FOUND,
    errors.SnapshotMismatch: ExitCode.IDENTITY,
    errors.SnapshotError: ExitCode.SNAPSHOT,
    errors.TransferFailed: ExitCode.SNAPSHOT,
    errors.BackendUnavailable: ExitCode.UNSUPPORTED,
    errors.GmsError: ExitCode.FAILURE,
}
"""Exit code of an error class and of its subclasses that have no entry of their own."""


def for_error(error: errors.GmsError) -> ExitCode:
    """The exit code of an error."""
    return for_type(type(error))


def for_type(kind: type[errors.GmsError]) -> ExitCode:
    """The exit code of a class of errors."""
    return next(BY_ERROR[base] for base in kind.__mro__ if base in BY_ERROR)
