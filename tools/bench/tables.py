"""The document for people."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from rich.console import RenderableType
from rich.table import Table

from gms_core.cli import attach_benchmark, server_benchmark, snapshot_benchmark
from gms_core.cli.bench import table as attach_table
from gms_core.cli.console import plain
from gms_core.cli.options import count, format_size
from gms_core.cli.server_benchmark_table import tables as server_tables
from gms_core.cli.snapshot_benchmark_command import table as snapshot_table
from tools.bench.document import COMMANDS, Document, Limit, Loading, Measurement


def lines(document: Document) -> Iterator[RenderableType]:
    """Everything, in the order of the document."""
    yield _machine(document)
    for name in COMMANDS:
        section = getattr(document, name)
        if section is not None and "error" in section:
            yield f"\n{name}: {plain(section['error'])}"
    if document.attach is not None and "error" not in document.attach:
        yield ""
        yield attach_table(msgspec.convert(document.attach, attach_benchmark.Result))
    if document.server is not None and "error" not in document.server:
        for table in server_tables(msgspec.convert(document.server, server_benchmark.Result)):
            yield ""
            yield table
    if document.snapshot is not None and "error" not in document.snapshot:
        yield ""
        yield snapshot_table(msgspec.convert(document.snapshot, snapshot_benchmark.Result))
    if document.loading_error:
        yield f"\nloading: {plain(document.loading_error)}"
    if document.loading is not None:
        yield ""
        yield from _loading(document.loading)


def _machine(document: Document) -> str:
    found = document.machine
    gpus = ", ".join(gpu.name for gpu in found.gpus) + f", driver {found.driver}" if found.gpus else "no GPU"
    kinds = ", ".join(f"{name} {system.type}" for name, system in found.file_systems.items())
    commit = f" ({found.commit[:12]}{', modified' if found.modified else ''})" if found.commit else ""
    return (
        f"{document.date}, {document.duration_s:.0f} s\n"
        f"{found.cpu}, {count(found.cores, 'core')}, {format_size(found.memory_bytes)}, {gpus}, Linux {found.kernel}, {kinds}\n"
        f"gms {found.gms}{commit}, Python {found.python}; {found.load} processes wanted to run in the minute before"
    )


def _loading(loading: Loading) -> Iterator[RenderableType]:
    title = f"loading {format_size(loading.bytes)} to {loading.device}, {count(loading.tensors, 'tensor')}, median of {loading.repeat}"
    shown = Table(title=title, title_justify="left", box=None)
    for column in ("from", "loader"):
        shown.add_column(column)
    for column in ("GB/s", "s", "min", "max", "of copies", "of the disk", "from start, s"):
        shown.add_column(column, justify="right")
    shown.add_column("")
    versions = {loader.name: loader.version for loader in loading.loaders}
    before = ""
    for one in loading.measurements:
        shown.add_row(one.source if one.source != before else "", f"{one.loader} {versions.get(one.loader, '')}".strip(), *_cells(one))
        before = one.source
    yield shown
    if loading.interrupted:
        yield "the run was ended early: some figures have fewer processes, or none"
    yield f"copies: {_limit(loading.copy)}"
    yield f"the disk: {_limit(loading.disk)}"


def _cells(one: Measurement) -> list[str]:
    if one.seconds is None or one.from_start is None:
        return ["-"] * 7 + [plain(one.error)]
    seconds = [f"{value:.3f}" for value in (one.seconds.median, one.seconds.min, one.seconds.max)]
    return [f"{one.rate / 1e9:.2f}", *seconds, _share(one.of_copy), _share(one.of_disk), f"{one.from_start.median:.2f}", _notes(one)]


def _notes(one: Measurement) -> str:
    found = list(dict.fromkeys(note for sample in one.samples for note in sample.notes))
    least, most = min(sample.cached for sample in one.samples), max(sample.cached for sample in one.samples)
    if one.source == "disk" and most:
        found.append(f"{most:.2%} of the files could not be dropped from the page cache")
    if one.source != "disk" and least < 1:
        found.append(f"{1 - least:.2%} of the files were not in memory")
    return plain("; ".join(found))


def _share(value: float) -> str:
    return f"{value:.0%}" if value else "-"


def _limit(limit: Limit) -> str:
    return f"{limit.rate / 1e9:.2f} GB/s, {limit.what}" if limit.rate else plain(limit.error)
