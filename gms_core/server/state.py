"""The whole state of a device server as its journal tells it, for the server that takes it over."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from gms_core.errors import JournalDamaged, VersionMismatch
from gms_core.layout import Layout
from gms_core.server.effects import SessionId
from gms_core.server.journal import Values
from gms_core.server.published import PublishedPool
from gms_core.server.records import FORMATS, About, CohortRecord, OwnersRecord, PublishedRecord, RetainedRecord, SeatRecord, SessionRecord

_encoder = msgspec.msgpack.Encoder()
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
Kind = TypeVar("Kind")


@dataclass
class State:
    """What a server knew.

    Attributes:
        with_memory: Whether the memory that it speaks of is still there. If not, only the numbers count that may never come twice.
        allocations: Bytes of each allocation that something refers to.
        numbers: Of all sessions that it speaks of, whether they can come back or not.
    """

    about: About | None = None
    with_memory: bool = False
    pools: dict[str, PublishedPool] = field(default_factory=dict)
    sessions: dict[SessionId, SessionRecord] = field(default_factory=dict)
    cohorts: dict[str, CohortRecord] = field(default_factory=dict)
    locks: dict[str, SeatRecord] = field(default_factory=dict)
    retained: dict[str, RetainedRecord] = field(default_factory=dict)
    ended: tuple[str, ...] = ()
    allocations: dict[int, int] = field(default_factory=dict)
    numbers: tuple[SessionId, ...] = ()
    owners: OwnersRecord = field(default_factory=OwnersRecord)


def read(values: Values, device: str, label: str) -> State:
    """Understand what a server has written down.

    Args:
        values: Of its journal.
        device: Of the server that takes over.
        label: Of the keeper that is there now.

    Raises:
        JournalDamaged: It is of another device, or cannot be understood.
        VersionMismatch: It is in the format of a later version.
    """
    if not values:
        return State()
    if "about/" not in values:
        raise JournalDamaged("the journal does not say whose it is")
    about = decode(values["about/"], About)
    if about.format not in FORMATS:
        raise VersionMismatch(
            f"what the last server of {device} has left is in format {about.format}, and this version knows {', '.join(map(str, FORMATS))}",
            hint="Start a server of that later version; nothing was changed.",
        )
    if about.device != device:
        raise JournalDamaged(f"the journal is of {about.device}, not of {device}")
    state = State(about, with_memory=bool(label) and (about.label, about.boot) == (label, boot_id()))
    by_kind: dict[str, dict[str, bytes]] = {}
    for name, value in values.items():
        kind, _, rest = name.partition("/")
        by_kind.setdefault(kind, {})[rest] = value
    state.numbers = tuple(SessionId(int(name)) for name in by_kind.get("session", {}))
    layouts: dict[str, dict[int, Layout]] = {}
    for name, value in by_kind.get("layout", {}).items():
        pool_name, _, number = name.rpartition("/")
        layouts.setdefault(pool_name, {})[int(number)] = decode(value, Layout)
    for name, value in by_kind.get("pool", {}).items():
        record = decode(value, PublishedRecord)
        pool = state.pools[name] = PublishedPool.of(name, record, layouts.get(name, {}) if state.with_memory else {})
        if state.with_memory and record.draft is not None:
            pool.resume_draft(record.draft)
            state.allocations.update(record.draft.sizes)
        for kept in (pool.committed, *pool.generations.retired.values()):
            if kept is not None:
                state.allocations.update({allocation.id: allocation.size for allocation in kept.allocations})
    state.retained = {name: decode(value, RetainedRecord) for name, value in by_kind.get("retained", {}).items()}
    locks: dict[str, SeatRecord] = {name: decode(value, SeatRecord) for name, value in by_kind.get("lock", {}).items()}  # type: ignore[arg-type]
    if not state.with_memory:
        state.locks = {name: (number, None, "") for name, (number, _, _) in locks.items()}
        return state
    state.locks = locks
    for retained in state.retained.values():
        state.allocations.update({allocation.id: allocation.size for allocation in (*retained.allocations, *retained.spares)})
    state.sessions = {SessionId(int(name)): decode(value, SessionRecord) for name, value in by_kind.get("session", {}).items()}
    state.cohorts = {name: decode(value, CohortRecord) for name, value in by_kind.get("cohort", {}).items()}
    state.owners = decode(by_kind["owners"]["all"], OwnersRecord) if "owners" in by_kind else OwnersRecord()
    state.ended = decode(by_kind["ended"]["cohorts"], tuple[str, ...]) if "ended" in by_kind else ()
    return state


def encode(thing: object) -> bytes:
    """The value of one thing."""
    return _encoder.encode(thing)


def encode_all(things: Mapping[str, Any]) -> dict[str, bytes]:
    """The values of things by name."""
    return {name: _encoder.encode(thing) for name, thing in things.items()}


def decode(value: bytes, kind: type[Kind]) -> Kind:
    """The thing of a value.

    Raises:
        JournalDamaged: It is none of this kind.
    """
    try:
        return msgspec.msgpack.decode(value, type=kind)
    except msgspec.DecodeError as error:
        raise JournalDamaged(f"a value of the journal is no {getattr(kind, '__name__', kind)}: {error}") from error


def pool_values(name: str, pool: PublishedPool | None, written: Values) -> dict[str, bytes | None]:
    """What has changed of a published pool. A layout never changes, and is large: it is encoded once."""
    before = written.get(f"pool/{name}")
    old = decode(before, PublishedRecord) if before is not None else PublishedRecord(0)
    record = pool.record() if pool is not None and not pool.idle else None
    now = record.written if record is not None else {}
    changes: dict[str, bytes | None] = {f"pool/{name}": encode(record) if record is not None else None}
    for number in old.written.keys() - now.keys():
        changes[f"layout/{name}/{number}"] = None
    for number, generation in now.items():
        if (key := f"layout/{name}/{number}") not in written and pool is not None:
            changes[key] = encode(pool.generations.get(generation))
    return changes


@functools.cache
def boot_id() -> str:
    """The kernel's random text of this boot, and in which namespace numbers of processes count. Neither changes while a process lives."""
    return f"{_BOOT_ID.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
