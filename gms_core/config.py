"""Settings from the environment. The only module that reads ``os.environ``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gms_core.errors import ConfigurationError, InvalidArgument

SNAPSHOTS = {
    "GMS_TRANSFER_BACKEND": "What moves the bytes of snapshots.",
    "GMS_SAVE_WORKERS": "Threads that save an image of a snapshot; 0 for as many as suit the backend.",
    "GMS_LOAD_WORKERS": "Threads that restore an image of a snapshot; 0 for as many as suit the backend.",
    "GMS_SHARD_SIZE_BYTES": "Bytes of the largest file or object of a snapshot.",
    "GMS_CHECKPOINT_DIR": "The root of snapshots, a directory or a URL; with GMS_SHARDED_SSD_ROOTS, which of them gets the manifests.",
    "GMS_SHARDED_SSD_ROOTS": "Several roots of snapshots, separated by colons or commas; each image is striped over all of them.",
    "GMS_CONTROL_DIR": "Directory of the files by which an orchestrator sees how far a save or a restore is.",
    "GMS_METRICS_FILE": "File to which a save or a restore of a snapshot writes its metrics.",
    "GMS_SNAPSHOT": "For gms-saver and gms-loader: the snapshot, NAME or NAME@VERSION.",
    "GMS_POOL": "For gms-saver and gms-loader: the pool.",
    "GMS_DEVICES": "For gms-saver and gms-loader: the devices, separated by commas.",
}
"""The variables that only snapshots read: a wrong one disturbs nothing else."""

ENVIRONMENT = {
    "GMS_RUNTIME_DIR": "Directory of the servers' sockets.",
    "GMS_SERVER_USER": "A user, besides this one and root, whose servers are trusted; by name or number.",
    "GMS_PLUGINS": "Names of the installed plugins that may be loaded, separated by commas; empty for none. Unset: all.",
    "GMS_TRACE_PLUGINS": "Log every hook call and its result.",
    "GMS_ALLOW_UNTESTED_ENGINE": "Apply patches to an engine version that they were not tested with.",
    "GMS_CACHE_DIR": "Directory of files that can be made again.",
    "GMS_FAILOVER": "The failover block of engines that have none in their own configuration, as JSON.",
    "GMS_ENGINE": "What people call this engine, in status and logs.",
    "GMS_COHORT": "The cohort of an engine's processes; an engine sets it for its children, nobody else sets it.",
    **SNAPSHOTS,
}
"""Every variable of GMS, and what it does."""

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"", "0", "false", "no", "off"})


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment says.

    Attributes:
        runtime_dir: Where servers put their sockets and clients look for them.
        plugins: Names of the third-party plugins that may be loaded; None for all that are installed.
        trace_plugins: Whether hook calls are logged.
        allow_untested_engine: Whether patches may be applied to an engine version that they were not tested with.
        cache_dir: Where files are kept that can be made again.
        failover: The failover block as JSON; empty if unset.
        engine: What people call this engine; empty if unset.
        cohort: The cohort of this process; empty outside of engines that fail over.
        server_user: Number of a user, besides this one and root, whose servers are trusted; None for nobody else.
    """

    runtime_dir: Path
    plugins: tuple[str, ...] | None
    trace_plugins: bool
    allow_untested_engine: bool
    cache_dir: Path
    failover: str = ""
    engine: str = ""
    cohort: str = ""
    server_user: int | None = None


def settings() -> Settings:
    """Read the environment as it is now.

    Raises:
        ConfigurationError: A variable has a value that it cannot have; the message names it.
    """
    environment = os.environ
    return Settings(
        runtime_dir=_directory(environment, "GMS_RUNTIME_DIR") or _default_runtime_dir(environment),
        plugins=_names(environment, "GMS_PLUGINS"),
        trace_plugins=_flag(environment, "GMS_TRACE_PLUGINS"),
        allow_untested_engine=_flag(environment, "GMS_ALLOW_UNTESTED_ENGINE"),
        cache_dir=_directory(environment, "GMS_CACHE_DIR") or _default_cache_dir(environment),
        failover=environment.get("GMS_FAILOVER", ""),
        engine=environment.get("GMS_ENGINE", ""),
        cohort=environment.get("GMS_COHORT", ""),
        server_user=_user(environment, "GMS_SERVER_USER"),
    )


def snapshot_environment() -> dict[str, str]:
    """What the environment says about snapshots, by variable; `gms_core.snapshot.config` says what it means. What is empty is not set."""
    return {name: value for name in SNAPSHOTS if (value := os.environ.get(name, ""))}


def store_timeout(store: str) -> str:
    """What the environment says of the longest time of a request to an object store; the library for those reads it by itself.

    Args:
        store: ``AWS``, ``GOOGLE`` or ``AZURE``.
    """
    return os.environ.get(f"{store}_TIMEOUT", "")


def engine_variables(pattern: re.Pattern[str]) -> dict[str, str]:
    """What the environment says to an engine, in order of the names.

    Args:
        pattern: Which variables, by the beginning of their names.
    """
    return {name: value for name, value in sorted(os.environ.items()) if pattern.match(name)}


def told_to_children() -> dict[str, str]:
    """What the environment says to engines, by variable, for processes of this one that do not get its environment."""
    return {name: os.environ[name] for name in ENVIRONMENT if name in os.environ and name not in SNAPSHOTS}


def take_from_parent(told: Mapping[str, str]) -> None:
    """Let what a parent was told hold here, but for what this process was told otherwise.

    Args:
        told: By `told_to_children` in the parent.
    """
    for name, value in told.items():
        if name in ENVIRONMENT:
            os.environ.setdefault(name, value)


def export_cohort(cohort: str, engine: str) -> None:
    """Tell every process that this one starts which cohort it belongs to."""
    os.environ["GMS_COHORT"] = cohort
    os.environ["GMS_ENGINE"] = engine


def child_environment(**changes: str) -> dict[str, str]:
    """The environment for a child process: this one's, with changes."""
    return {**os.environ, **changes}


def ucx_devices(chosen: Callable[[], str]) -> str:
    """The network devices that UCX uses in this process.

    Args:
        chosen: Says which, where the environment does not; it is told to UCX then.
    """
    if not os.environ.get("UCX_NET_DEVICES"):
        os.environ["UCX_NET_DEVICES"] = chosen()
    return os.environ["UCX_NET_DEVICES"]


@dataclass(frozen=True, slots=True)
class FromManager:
    """What the service manager that has started this process told it.

    Attributes:
        socket: Where it hears of readiness and takes descriptors; empty if nowhere.
        most: How many descriptors it keeps for this service; 0 for none, or if it does not say.
        main: Whether this is the process that it has started itself: it may not listen to others. None if it does not say, as before version 248.
        names: Of the descriptors that it has passed, from number 3 on; empty for one without a name.
    """

    socket: str = ""
    most: int = 0
    main: bool | None = None
    names: tuple[str, ...] = ()


def take_from_manager() -> FromManager:
    """What the service manager has told this process, by the variables of sd_notify(3) and sd_listen_fds(3). They are removed: no child is meant."""
    taken = {name: os.environ.pop(name, "") for name in ("NOTIFY_SOCKET", "FDSTORE", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "LISTEN_PIDFDID")}
    passed = _number(taken["LISTEN_FDS"]) if taken["LISTEN_PID"] == str(os.getpid()) else 0
    names, main = taken["LISTEN_FDNAMES"].split(":"), os.environ.get("SYSTEMD_EXEC_PID")
    return FromManager(
        socket=taken["NOTIFY_SOCKET"],
        most=_number(taken["FDSTORE"]),
        main=main == str(os.getpid()) if main else None,
        names=tuple(names) if len(names) == passed else ("",) * passed,
    )


def _number(text: str) -> int:
    return int(text) if text.isdecimal() and text.isascii() else 0


def _default_runtime_dir(environment: Mapping[str, str]) -> Path:
    session = environment.get("XDG_RUNTIME_DIR", "")
    if session.startswith("/"):
        return Path(session) / "gms"
    return Path("/run/gms") if os.getuid() == 0 else Path(f"/tmp/gms-{os.getuid()}")  # noqa: S108 - made with 0700 and checked for its owner before use


def _default_cache_dir(environment: Mapping[str, str]) -> Path:
    cache = environment.get("XDG_CACHE_HOME", "")
    return Path(cache) / "gms" if cache.startswith("/") else Path("~/.cache/gms").expanduser()


def _directory(environment: Mapping[str, str], name: str) -> Path | None:
    value = environment.get(name, "")
    if not value:
        return None
    if not value.startswith("/") or "\0" in value:
        raise ConfigurationError(f"{name}={value!r} is not an absolute path", hint="Processes with different working directories must agree on it.")
    return Path(value)


def _user(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name, "")
    if not value:
        return None
    from gms_core.allowed import user_number

    try:
        return user_number(value)
    except InvalidArgument as error:
        raise ConfigurationError(f"{name}={value!r}: {error.message}", hint=error.hint) from error


def _names(environment: Mapping[str, str], name: str) -> tuple[str, ...] | None:
    if name not in environment:
        return None
    return tuple(part for piece in environment[name].split(",") if (part := piece.strip()))


def _flag(environment: Mapping[str, str], name: str) -> bool:
    value = environment.get(name, "").strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ConfigurationError(f"{name}={environment[name]!r} is neither on nor off", hint=f"Set {name}=1 or unset it.")
