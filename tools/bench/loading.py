"""GMS and its peers: the same bytes, loaded into a device's memory from the page cache, from a tmpfs and from the disk, by processes of their own."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gms_core import __version__
from gms_core.cli.attach_benchmark import private_server
from gms_core.cli.options import format_size
from gms_core.devices import HOST, DeviceId
from gms_core.errors import BackendUnavailable, GmsError, InvalidArgument
from tools.bench import checkpoint as checkpoints
from tools.bench import page_cache
from tools.bench.commands import gms
from tools.bench.document import Limit, Loader, Loading, Measurement, Sample, summed_up
from tools.bench.limits import Tell, copy_limit, disk_limit, fio_seconds
from tools.bench.loaders import DISK, GMS, PAGE_CACHE, TMPFS
from tools.bench.machine import file_system
from tools.bench.orders import Answer, Asked, Check, Load, Publish, ask

POOL = NAME = "bench"
ROOM = 2.1
"""Times as many bytes as the checkpoint has are needed for it and its snapshot."""


@dataclass(frozen=True)
class Wanted:
    """What is to be measured.

    Attributes:
        device: As GMS names it.
        size: Bytes of the checkpoint.
        repeat: Processes for each figure.
        disk: A directory of the disk.
        tmpfs: A directory that lies in memory.
        sources: Of `tools.bench.loaders.SOURCES`.
        loaders: By their names.
        plain_rate: Bytes a second that plain reads of the disk have reached in this run; 0 if they were not measured.
    """

    device: DeviceId
    size: int
    repeat: int
    disk: Path
    tmpfs: Path
    sources: tuple[str, ...]
    loaders: tuple[str, ...]
    plain_rate: float = 0.0


@dataclass
class Place:
    """Where a checkpoint and its snapshot are.

    Attributes:
        folder: Of the checkpoint.
        root: Of the snapshot.
        files: Of the checkpoint, with their bytes.
        shards: Of the snapshot, with their bytes.
    """

    folder: Path
    root: Path
    files: list[tuple[Path, int]] = field(default_factory=list)
    shards: list[tuple[Path, int]] = field(default_factory=list)


@dataclass
class Run:
    """What is known while it goes on.

    Attributes:
        wanted: What is to be measured.
        tell: Is told what is being done.
        socket: Of the server.
        offset: Where in the pool the bytes begin.
        versions: Of the loaders, once they have loaded anything.
        missing: Why loaders cannot be measured anywhere here.
        left_out: Why there is nothing of a source.
        samples: That were taken, by source and loader.
        errors: Why there are none, or no more, likewise.
        fio_s: Seconds that fio has needed to read the checkpoint from the disk.
        interrupted: Somebody has ended it before all samples were taken.
    """

    wanted: Wanted
    tell: Tell
    socket: Path
    offset: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)
    errors: dict[tuple[str, str], str] = field(default_factory=dict)
    fio_s: list[float] = field(default_factory=list)
    interrupted: bool = False

    @property
    def environment(self) -> Mapping[str, str]:
        """Changes for a peer's process: the only device that it sees is the server's."""
        return {} if self.wanted.device == HOST else {"CUDA_VISIBLE_DEVICES": self.wanted.device}

    @property
    def torch_device(self) -> str:
        """As torch names it in that process."""
        return "cpu" if self.wanted.device == HOST else "cuda:0"


def measure(wanted: Wanted, tell: Tell) -> Loading:
    """Measure. What is written is gone afterwards, in whatever way this ends. Who interrupts it has the samples that were taken before.

    Raises:
        GmsError: What all loaders need has failed: the checkpoint, the server, or the snapshot. A loader that fails is none of that.
    """
    _check_room(wanted.disk, wanted.size)
    with contextlib.ExitStack() as stack:
        disk = _place(stack, wanted.disk)
        tell(f"a checkpoint of {format_size(wanted.size)}")
        written = checkpoints.write(disk.folder, wanted.size)
        disk.files = written.file_sizes
        copy = copy_limit(wanted.device, wanted.size, tell)
        run = Run(wanted, tell, stack.enter_context(private_server(wanted.device)))
        tell("its snapshot")
        run.offset = ask(Publish(str(disk.folder), str(run.socket), POOL)).answer.offset
        disk.shards = _save(run, disk)
        memory = _copied(stack, run, disk) if TMPFS in wanted.sources else None
        ask(Check(str(disk.folder), str(run.socket), POOL, run.offset))  # and free it: every restore begins with an empty pool
        try:
            for source in wanted.sources:
                place = memory if source == TMPFS else disk
                if place is not None:
                    _rounds(run, source, place)
        except KeyboardInterrupt:
            run.interrupted = True
            tell("interrupted: what was measured so far is kept")
        limit = disk_limit(disk.files, run.fio_s, wanted.plain_rate)
    loaders = tuple(Loader(name, "gms" if name in GMS else "peer", run.versions.get(name, ""), run.missing.get(name, "")) for name in wanted.loaders)
    return Loading(
        device=str(wanted.device),
        bytes=written.size,
        tensors=len(written.tensors),
        files=len(written.files),
        repeat=wanted.repeat,
        copy=copy,
        disk=limit,
        loaders=loaders,
        left_out=run.left_out,
        interrupted=run.interrupted,
        measurements=_measurements(run, written.size, copy, limit),
    )


def _measurements(run: Run, size: int, copy: Limit, disk: Limit) -> tuple[Measurement, ...]:
    def one(source: str, name: str) -> Measurement:
        samples = run.samples.get((source, name), [])
        error = run.left_out.get(source, "") or run.errors.get((source, name), "")
        if run.interrupted and not samples:
            error = error or "the run was interrupted before"
        return summed_up(source, name, samples, size, copy, disk if source == DISK else Limit(""), error)

    return tuple(one(source, name) for source in run.wanted.sources for name in run.wanted.loaders)


def _rounds(run: Run, source: str, place: Place) -> None:
    """Take all samples of a source. Loaders take turns, so that what changes meanwhile on the machine changes for all of them."""
    for number in range(run.wanted.repeat):
        if source == DISK:
            run.fio_s += fio_seconds(place.files, run.tell)
        for name in run.wanted.loaders:
            run.tell(f"{source}, {number + 1} of {run.wanted.repeat}, {name}")
            _try(run, source, place, name)


def _try(run: Run, source: str, place: Place, name: str) -> None:
    """Take one sample of a loader, or note why there is none. One that has failed is not tried again with the same source."""
    key = source, name
    if name in run.missing:
        run.errors[key] = run.missing[name]
    if key in run.errors:
        return
    files = place.shards if name in GMS else place.files
    if source == DISK:
        page_cache.forget(files)
    elif source == PAGE_CACHE:
        page_cache.fill(files)
    cached = page_cache.cached_share(files)
    try:
        sample, version = _restore(run, place, name, cached) if name in GMS else _load(run, place, name, cached)
    except BackendUnavailable as error:
        run.missing[name] = run.errors[key] = error.message
    except GmsError as error:
        run.errors[key] = error.message
        run.tell(f"{name}: {error.message}")
    else:
        run.versions[name] = version
        run.samples.setdefault(key, []).append(sample)


def _load(run: Run, place: Place, name: str, cached: float) -> tuple[Sample, str]:
    asked = ask(Load(name, str(place.folder), run.torch_device), changes=run.environment)
    return sample_of(asked, cached), asked.answer.version


def sample_of(asked: Asked, cached: float) -> Sample:
    """What a peer's process has measured. Pure."""
    answer: Answer = asked.answer
    return Sample(seconds=answer.seconds, from_start=answer.ended - asked.began, cached=cached, notes=answer.notes)


def _restore(run: Run, place: Place, name: str, cached: float) -> tuple[Sample, str]:
    began = time.monotonic()
    told = gms(
        *("snapshot", "restore", NAME, "--root", str(place.root), "--backend", GMS[name]),
        *("--device", str(run.wanted.device), "--runtime-dir", str(run.socket.parent)),
    )
    ended = time.monotonic()
    ask(Check(str(place.folder), str(run.socket), POOL, run.offset))
    (image,) = told["images"]
    return Sample(seconds=restored_s(image), from_start=ended - began, cached=cached, notes=tuple(image["notes"])), __version__


def restored_s(image: Mapping[str, Any]) -> float:
    """Seconds of a restore from its plan until it is published: that of the transfer, and all that is not beside it. Pure.

    Args:
        image: What ``gms snapshot restore -o json`` says of it.
    """
    around = image["around"]
    return float(around["prepare"] + image["seconds"] + image["threads"].get("clean", 0.0) + around["commit"])


def _save(run: Run, place: Place) -> list[tuple[Path, int]]:
    """Save what is published. Returns the files that hold its bytes."""
    gms("snapshot", "save", NAME, "--root", str(place.root), "--pool", POOL, "--runtime-dir", str(run.socket.parent))
    return [(path, path.stat().st_size) for path in sorted(place.root.rglob("*.shard"))]


def _place(stack: contextlib.ExitStack, parent: Path) -> Place:
    """An empty place that is gone when the block is left."""
    inside = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gms-bench-", dir=parent)))
    place = Place(inside / "checkpoint", inside / "snapshots")
    place.folder.mkdir()
    place.root.mkdir(mode=0o700)
    return place


def _copied(stack: contextlib.ExitStack, run: Run, disk: Place) -> Place | None:
    """The same in memory; None if there is no room, which is noted."""
    parent = run.wanted.tmpfs
    if not parent.is_dir() or file_system(parent).type not in ("tmpfs", "ramfs"):
        run.left_out[TMPFS] = f"{parent} is no tmpfs"
        return None
    try:
        _check_room(parent, run.wanted.size)
    except InvalidArgument as error:
        run.left_out[TMPFS] = error.message
        return None
    place = _place(stack, parent)
    for path in disk.folder.iterdir():
        shutil.copyfile(path, place.folder / path.name)
    place.files = checkpoints.read_list(place.folder).file_sizes
    place.shards = _save(run, place)
    return place


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < ROOM * size:
        raise InvalidArgument(
            f"{folder} has {format_size(free)} left, and a checkpoint of {format_size(size)} with its snapshot needs {format_size(int(ROOM * size))}",
            hint="Choose another directory, or fewer bytes.",
        )
