"""What ``gms audit`` tells, as sentences or as lines of JSON."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from gms_core.cli.console import plain
from gms_core.cli.options import count, format_size
from gms_core.cli.refusal import as_dict

if TYPE_CHECKING:
    from gms_core.audit import Audited, Change, Look, Part, Tensor
    from gms_core.errors import GmsError

SCHEMA = "gms-audit/1"
SHOWN = 20
"""Changes of one look that are shown at once; the report at the end has all of them, and so has JSON."""


@dataclass
class Written:
    """What has been noticed so far about bytes that the same tensors have.

    Attributes:
        start: The first byte that has ever differed, from the arena's base.
        end: Behind the last one.
        looks: That have found a difference.
        first_s: When the first of them ended, in seconds since 1970.
        last_s: When the last one ended.
    """

    tensors: tuple[Tensor, ...]
    start: int
    end: int
    looks: int
    first_s: float
    last_s: float


class Report:
    """Tells what happens to one generation, and sums it up at the end.

    Args:
        audited: The generation.
        as_json: Whether to print lines of JSON.
    """

    def __init__(self, audited: Audited, *, as_json: bool) -> None:
        self._audited, self._as_json = audited, as_json
        self._subject = f"{audited.pool} on {audited.device}, generation {audited.layout.generation}"
        self._written: dict[tuple[Tensor, ...], Written] = {}
        self._committed = audited.layout.generation
        self._since_s = 0.0

    @property
    def found(self) -> bool:
        """Whether anything was written."""
        return bool(self._written)

    @property
    def compared(self) -> bool:
        """Whether all bytes were compared at least once."""
        return self._audited.looks > 0

    def began(self, look: Look) -> None:
        """Tell of the first look, to which the others are compared."""
        audited, self._since_s = self._audited, look.began_s
        named = audited.unreadable or count(len(audited.tensors), "tensor")
        self._tell(
            "began",
            f"{named}, {format_size(audited.layout.size)} read in {look.ended_s - look.began_s:.1f} s, compared from now on",
            look.ended_s,
            bytes=audited.layout.size,
            tensors=len(audited.tensors),
            unreadable=audited.unreadable,
            chunk_bytes=audited.chunk,
            layout=audited.layout.digest,
            content=audited.content,
        )

    def looked(self, look: Look) -> None:
        """Tell what a look has found."""
        for change in look.changes:
            known = self._written.setdefault(
                change.tensors, Written(change.tensors, change.first.offset, change.last.end, 0, look.ended_s, look.ended_s)
            )
            known.start, known.end = min(known.start, change.first.offset), max(known.end, change.last.end)
            known.looks, known.last_s = known.looks + 1, look.ended_s
        for change in look.changes if self._as_json else look.changes[:SHOWN]:
            self._change(change, look.ended_s)
        if len(look.changes) > SHOWN and not self._as_json:
            self._tell("more", f"{len(look.changes) - SHOWN} more were written; all of them are told at the end", look.ended_s)
        self._since_s = look.began_s

    def _change(self, change: Change, now_s: float) -> None:
        where = f"{change.first.size} bytes at offset {change.first.offset}"
        if change.parts > 1:
            where = f"{change.parts} parts, the first of {where}, the last of {change.last.size} bytes at offset {change.last.offset}"
        self._tell(
            "written",
            f"{_names(change.tensors)} written: {where}",
            now_s,
            after=self._since_s,
            tensors=[_fields(tensor) for tensor in change.tensors],
            first=_part(change.first),
            last=_part(change.last),
            parts=change.parts,
            bytes=change.size,
        )

    def committed(self, generation: int, now_s: float) -> None:
        """Tell once that another generation is the committed one, or that none is."""
        if generation != self._committed:
            self._committed = generation
            which = f"generation {generation} is the committed one now" if generation else "no generation is committed any more"
            self._tell("superseded", f"{which}; this one is kept as long as it is audited", now_s, committed=generation)

    def ended(self, now_s: float, lost: GmsError | None) -> None:
        """Sum up.

        Args:
            now_s: Seconds since 1970.
            lost: Why it has ended early; None if it has not.
        """
        looks = self._audited.looks
        if self._written:
            words = f"{count(len(self._written), 'place')} written to, seen in {count(looks, 'complete comparison')}"
        elif looks:
            words = f"nothing was written, seen in {count(looks, 'complete comparison')}"
        else:
            words = "not compared, the audit ended before that"
        if lost is not None:
            words += f"; it ended early: {lost.message}"
        self._tell("ended", words, now_s, looks=looks, written=[_sum(one) for one in self._written.values()], error=as_dict(lost) if lost else None)
        if not self._as_json:
            for one in self._written.values():
                times = f"at {_moment(one.first_s)}" if one.looks == 1 else f"{one.looks} times from {_moment(one.first_s)} to {_moment(one.last_s)}"
                click.echo(f"  {_names(one.tensors)}: noticed {times}, within offsets {one.start} to {one.end}")

    def _tell(self, event: str, words: str, now_s: float, **facts: object) -> None:
        if not self._as_json:
            click.echo(f"{_moment(now_s)}  {plain(self._subject)}: {words}")
            return
        audited = self._audited
        head = {"schema": SCHEMA, "event": event, "time": now_s, "device": audited.device, "pool": audited.pool}
        click.echo(json.dumps({**head, "generation": audited.layout.generation, **facts, "text": words}))


def _names(tensors: Sequence[Tensor]) -> str:
    return ", ".join(map(_name, tensors)) if tensors else "bytes that belong to no tensor"


def _name(tensor: Tensor) -> str:
    first, *others = map(plain, tensor.names)
    notes = [f"also {', '.join(others)}"] * bool(others) + ["only copied by readers when they attach"] * (not tensor.shared)
    return f"{first} ({'; '.join(notes)})" if notes else first


def _fields(tensor: Tensor) -> dict[str, object]:
    shape = {"dtype": tensor.dtype, "shape": tensor.shape, "offset": tensor.offset, "bytes": tensor.size, "shared": tensor.shared}
    return {"name": tensor.names[0], "also": tensor.names[1:], **shape}


def _part(part: Part) -> dict[str, int]:
    return {"offset": part.offset, "bytes": part.size}


def _sum(one: Written) -> dict[str, object]:
    times = {"looks": one.looks, "first_noticed": one.first_s, "last_noticed": one.last_s}
    return {"tensors": [_fields(tensor) for tensor in one.tensors], "offset": one.start, "end": one.end, **times}


def _moment(time_s: float) -> str:
    return dt.datetime.fromtimestamp(time_s).astimezone().strftime("%Y-%m-%d %H:%M:%S")
