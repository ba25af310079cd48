"""What ``make bench`` writes: one document, and the statistics in it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from gms_core.cli.attach_benchmark import Range
from gms_core.errors import InvalidArgument

SCHEMA = "gms-bench/1"
LOADING_SCHEMA = "gms-bench-loading/1"
COMMANDS = ("attach", "server", "snapshot")
"""Sections that a command of gms gives, each with the schema that the command names."""
SECTIONS = (*COMMANDS, "loading")


class Gpu(msgspec.Struct, frozen=True):
    """A GPU of the machine.

    Attributes:
        name: The product's.
        memory_bytes: In all.
    """

    name: str
    memory_bytes: int


class FileSystem(msgspec.Struct, frozen=True):
    """Where files were.

    Attributes:
        type: As the kernel calls it, such as ``ext4`` or ``tmpfs``.
        source: What is mounted, such as ``/dev/nvme0n1p1``.
        bytes: In all.
        free_bytes: That were free before the run.
    """

    type: str
    source: str
    bytes: int
    free_bytes: int


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What the figures hold for.

    Attributes:
        cpu: The processor's model.
        cores: Logical ones that this process may use.
        memory_bytes: Of the host.
        kernel: Its release.
        gpus: As NVML names them; none without one.
        driver: NVIDIA's, its version; empty without one.
        file_systems: By what lies there: ``disk``, ``tmpfs``.
        python: Its version.
        gms: Its version.
        commit: Of the source tree; empty if it is not known.
        modified: Whether the source tree differed from that commit.
        load: Processes that wanted to run, averaged over the minute before the run: other work disturbs every figure.
    """

    cpu: str
    cores: int
    memory_bytes: int
    kernel: str
    gpus: tuple[Gpu, ...]
    driver: str
    file_systems: dict[str, FileSystem]
    python: str
    gms: str
    commit: str
    modified: bool
    load: float


class Limit(msgspec.Struct, frozen=True):
    """What the machine can do at most.

    Attributes:
        what: How it was measured.
        rate: Bytes a second; 0 if it was not measured.
        error: Why it was not; empty if it was.
    """

    what: str
    rate: float = 0.0
    error: str = ""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement, in processes of its own.

    Attributes:
        seconds: From the first look at the files until all bytes are in the memory.
        from_start: Seconds from the start of the process until then: with Python's imports, and the device's context.
        cached: Share of the files' bytes that was in the page cache before, from 0 to 1.
        notes: What a user should know of how it went.
    """

    seconds: float
    from_start: float
    cached: float
    notes: tuple[str, ...] = ()


class Loader(msgspec.Struct, frozen=True):
    """What loads.

    Attributes:
        name: Of the loader, with what distinguishes it from the same one used otherwise.
        kind: ``gms``, or ``peer``.
        version: Of its distribution; empty if nothing was measured.
        error: Why it was not measured at all; empty if it was.
    """

    name: str
    kind: str
    version: str = ""
    error: str = ""


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """What one loader has made of one source.

    Attributes:
        source: Where the bytes were: ``page cache``, ``tmpfs`` or ``disk``.
        loader: Its name.
        seconds: See `Sample`; None if nothing was measured.
        from_start: See `Sample`; None likewise.
        rate: Bytes a second, by the median of ``seconds``; 0 if nothing was measured.
        of_copy: Share of the rate at which this machine copies; 0 if either is not known.
        of_disk: Share of the rate at which this machine reads the disk; 0 if either is not known, and where no disk is read.
        samples: In their order.
        error: Why there are no figures; empty if there are.
    """

    source: str
    loader: str
    seconds: Range | None = None
    from_start: Range | None = None
    rate: float = 0.0
    of_copy: float = 0.0
    of_disk: float = 0.0
    samples: tuple[Sample, ...] = ()
    error: str = ""


class Loading(msgspec.Struct, frozen=True, kw_only=True):
    """The same bytes, loaded into a device's memory in many ways.

    Attributes:
        schema: Of this section.
        device: Whose memory it was.
        bytes: Of the tensors.
        tensors: How many.
        files: Over which they lie.
        repeat: Processes for each figure.
        copy: The limit of whatever brings bytes from host memory into the device's.
        disk: The limit of whatever reads the disk.
        loaders: All that were wanted, those that were not measured too.
        left_out: Why there is nothing of a source, by source.
        measurements: By source, then by loader.
        interrupted: The run was ended early: some figures have fewer processes, or none.
    """

    schema: str = LOADING_SCHEMA
    device: str
    bytes: int
    tensors: int
    files: int
    repeat: int
    copy: Limit
    disk: Limit
    loaders: tuple[Loader, ...]
    left_out: dict[str, str]
    measurements: tuple[Measurement, ...]
    interrupted: bool = False


class Document(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All of one run.

    Attributes:
        schema: Of the document.
        date: When it began, UTC, as ISO 8601 has it.
        duration_s: Seconds that it took.
        machine: What the figures hold for.
        attach: What ``gms bench attach -o json`` has said, or ``schema`` and ``error``; None if it was not wanted.
        server: Of ``gms bench server``, likewise.
        snapshot: Of ``gms snapshot benchmark``, likewise.
        loading: GMS and its peers; None if it was not wanted.
        loading_error: Why there is none although it was wanted; empty otherwise.
    """

    schema: str
    date: str
    duration_s: float
    machine: Machine
    attach: dict[str, Any] | None = None
    server: dict[str, Any] | None = None
    snapshot: dict[str, Any] | None = None
    loading: Loading | None = None
    loading_error: str = ""

    def failures(self) -> list[str]:
        """What of GMS itself has failed, in one sentence each. Peers are none of it, nor is what cannot be used on this machine."""
        sections = {name: getattr(self, name) for name in COMMANDS}
        found = [f"{name}: {section['error']}" for name, section in sections.items() if section and "error" in section]
        found += [f"loading: {self.loading_error}"] if self.loading_error else []
        if self.loading is not None:
            own = {loader.name for loader in self.loading.loaders if loader.kind == "gms" and not loader.error}
            failed = [one for one in self.loading.measurements if one.error and one.loader in own and one.source not in self.loading.left_out]
            found += [f"{one.loader}, {one.source}: {one.error}" for one in failed]
        return found


def summed_up(source: str, loader: str, samples: Sequence[Sample], size: int, copy: Limit, disk: Limit, error: str = "") -> Measurement:
    """What samples say. Pure.

    Args:
        source: Where the bytes were.
        loader: Its name.
        samples: At least one, unless there is an error.
        size: Bytes that each has loaded.
        copy: The limit of copies.
        disk: The limit of the disk; one without a rate where no disk is read.
        error: Why there are no figures, or why there are fewer than wanted: then none are given.
    """
    if error or not samples:
        return Measurement(source=source, loader=loader, samples=tuple(samples), error=error or "nothing was measured")
    seconds = spread([sample.seconds for sample in samples])
    rate = size / seconds.median if seconds.median > 0 else 0.0
    return Measurement(
        source=source,
        loader=loader,
        seconds=seconds,
        from_start=spread([sample.from_start for sample in samples]),
        rate=rate,
        of_copy=rate / copy.rate if copy.rate else 0.0,
        of_disk=rate / disk.rate if disk.rate else 0.0,
        samples=tuple(samples),
    )


def spread(values: Sequence[float]) -> Range:
    """The smallest, the median and the largest of some values, at least one."""
    return Range(min(values), statistics.median(values), max(values))


def encode(document: Document) -> bytes:
    """The document as JSON for people and programs, with a line break at its end."""
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def read(path: Path) -> Document:
    """A document that a run has written.

    Raises:
        InvalidArgument: It cannot be read, or is none.
    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Document)
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise InvalidArgument(f"{path} is no document of make bench: {error}") from error
    if found.schema != SCHEMA:
        raise InvalidArgument(f"{path} has the schema {found.schema!r}, and this reads {SCHEMA!r}")
    return found
