"""The figures of groups as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

_SHOWN = {
    "write_lease": "leases to write",
    "read_lease": "leases to read",
    "attach": "attached",
    "noticed": "a rank killed, until the shadow group is elected",
    "failover": "elected, until all ranks have their KV memory",
    "gone": "a rank killed, until its whole group is gone",
}


def draw(figures: Sequence[Any], path: Path) -> None:
    """Draw them; the file's name says in which format.

    Raises:
        OSError: The file cannot be written.
    """
    ranks = [one.ranks for one in figures]
    with rc_context({"font.size": 9, "svg.fonttype": "none"}):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, label in _SHOWN.items():
            axes.plot(ranks, [1000 * getattr(one, name) for one in figures], marker="o", markersize=3, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ranks, [str(number) for number in ranks])
        axes.set_xlabel("ranks of a group")
        axes.set_ylabel("milliseconds")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
        figure.savefig(path)
