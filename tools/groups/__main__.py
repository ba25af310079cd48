"""``python -m tools.groups``: see ``make groups``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from tools.groups.engine import Engine
from tools.groups.servers import running_servers

SCHEMA = "gms-groups/1"


class Figures(msgspec.Struct, frozen=True):
    """What one number of ranks took, in seconds.

    Attributes:
        ranks: How many.
        write_lease: Until all ranks of the first group had the right to write.
        read_lease: Until all ranks of a second group had the right to read.
        attach: Until all of those had mapped their weights.
        stand_by: Until all of those had their KV memory on scratch.
        noticed: From a SIGKILL of one rank of the first group until the second group was elected.
        failover: From then until all of its ranks held and had mapped their KV memory.
        gone: From the same instant until no process of the first group was left.
    """

    ranks: int
    write_lease: float
    read_lease: float
    attach: float
    stand_by: float
    noticed: float
    failover: float
    gone: float


class Document(msgspec.Struct, frozen=True):
    """What is written."""

    schema: str
    servers: int
    figures: list[Figures]


def measure(ranks: int, sockets: Sequence[Path], tag: str) -> Figures:
    """Two groups of so many ranks: the first writes and serves, the second reads, stands by, and serves once a rank of the first was killed."""
    first = Engine("first", tag, ranks, sockets)
    second = None
    try:
        first.ask("connect")
        granted, write_lease = first.ask("lease")
        if {*granted} != {"rw"}:
            raise AssertionError(f"a first group has the leases {sorted({*granted})}")
        first.ask("publish")
        first.ask("attach")
        first.ask("stand_by")
        term, *_ = first.ask("serve")
        second = Engine("second", tag, ranks, sockets)
        second.ask("connect")
        read, read_lease = second.ask("lease")
        if {*read} != {"ro"}:
            raise AssertionError(f"a second group has the leases {sorted({*read})}")
        _, attach = second.ask("attach")
        _, stand_by = second.ask("stand_by")
        second.tell("serve")
        killed = first.kill_rank(ranks // 2)
        gone = first.until_gone()
        next_term, elected, promoted, epochs = second.answer()
        if next_term <= term or len({*epochs}) != 1:
            raise AssertionError(f"term {next_term} after {term}, epochs {sorted({*epochs})}")
        return Figures(ranks, write_lease, read_lease, attach, stand_by, elected - killed, promoted - elected, gone - killed)
    finally:
        for engine in filter(None, (first, second)):
            engine.end()


def median(rounds: Sequence[Figures]) -> Figures:
    """Of each figure."""
    return Figures(*(statistics.median(getattr(one, field) for one in rounds) for field in Figures.__struct_fields__))


@click.command()
@click.option("--ranks", "sizes", default="2,4,8,16,32,64,128,256", show_default=True, help="Numbers of ranks of a group.")
@click.option("--servers", type=click.IntRange(1, 64), default=32, show_default=True, help="Device servers that the ranks are spread over.")
@click.option("--repeat", type=click.IntRange(1, 20), default=3, show_default=True, help="Groups of each size; the medians are told.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("build/groups.json"), show_default=True)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the figures: a file that ends with .svg or .png.")
def main(sizes: str, servers: int, repeat: int, out: Path, plot: Path | None) -> None:
    """Measure groups of ranks on host memory, without an engine."""
    figures = []
    with running_servers(servers) as sockets:
        for ranks in map(int, sizes.split(",")):
            figures.append(median([measure(ranks, sockets, f"{ranks}-{turn}") for turn in range(repeat)]))
            told = " ".join(f"{name} {1000 * getattr(figures[-1], name):.0f}" for name in Figures.__struct_fields__[1:])
            click.echo(f"{ranks} ranks, milliseconds: {told}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(msgspec.json.format(msgspec.json.encode(Document(SCHEMA, servers, figures)), indent=2) + b"\n")
    if plot is not None:
        from tools.groups.plot import draw

        draw(figures, plot)


if __name__ == "__main__":
    main()
