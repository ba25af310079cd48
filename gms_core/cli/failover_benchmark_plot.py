"""The timeline of a failover as a picture. The one module that imports matplotlib."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from gms_core.cli.failover_benchmark_result import Failover, bars, moments

_COLOURS = ("#9aa5b1", "#c44e52", "#dd8452", "#4c72b0", "#8172b3", "#55a868", "#c9a0a2", "#64b5cd")
_LANE = 0.6
_MARKED = ("killed", "listening", "first_token", "gone")


def draw(failover: Failover, path: Path) -> None:
    """Draw it; the file's name says in which format.

    Args:
        failover: Which.
        path: Ends with ``.svg`` or ``.png``.

    Raises:
        OSError: The file cannot be written.
    """
    shown = bars(failover)
    lanes = list(dict.fromkeys(bar.lane for bar in shown))
    with rc_context({"font.size": 9, "svg.fonttype": "none"}):
        figure = Figure(figsize=(10, 1.2 + 0.9 * len(lanes)), layout="constrained")
        axes = figure.subplots()
        for place, bar in enumerate(shown):
            colour = _COLOURS[place % len(_COLOURS)]
            axes.barh(
                lanes.index(bar.lane), bar.end_ms - bar.start_ms, left=bar.start_ms, height=_LANE, color=colour, label=f"{bar.lane}: {bar.label}"
            )
        for moment in moments(failover):
            if moment.name in _MARKED:
                axes.axvline(moment.after_ms, color="black", linewidth=0.6, linestyle=":")
        axes.set_yticks(range(len(lanes)), lanes)
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds after the kill")
        first_ms = 1000 * failover.events["first_token"]
        axes.set_title(f"{failover.kind} of {failover.engine} killed, {failover.successor} takes over: first token after {first_ms:.0f} ms")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
        figure.savefig(path)
