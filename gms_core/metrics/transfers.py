"""What a save or a restore of a snapshot tells Prometheus; in a file, since the command has ended before anybody could ask it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from gms_core.snapshot.orders import Done


@dataclass(frozen=True, slots=True)
class TransferMetric:
    """One metric.

    Attributes:
        help: What it says, in a sentence.
        labels: Besides ``action`` and ``name``, which all have.
    """

    help: str
    labels: tuple[str, ...] = ()


TRANSFER_METRICS = {
    "gms_snapshot_success": TransferMetric("Whether the last command has done what it should: 1 or 0; then only its time is beside it."),
    "gms_snapshot_end_time_seconds": TransferMetric("When it ended, in seconds since 1970."),
    "gms_snapshot_version": TransferMetric("The version that was saved or restored."),
    "gms_snapshot_image_bytes": TransferMetric("Bytes of an image that were moved.", ("image",)),
    "gms_snapshot_image_kept_bytes": TransferMetric("Bytes of an image that a save which was resumed found written.", ("image",)),
    "gms_snapshot_image_seconds": TransferMetric("Seconds from an image's first read to its last copy.", ("image",)),
    "gms_snapshot_step_seconds": TransferMetric("Seconds of a step before, after or beside the transfer of an image.", ("image", "step")),
    "gms_snapshot_threads_seconds": TransferMetric("Seconds of a phase of an image's transfer, summed over its threads.", ("image", "phase")),
}
"""All are gauges. The same table is in docs/reference/metrics.md."""


class TransferSample(NamedTuple):
    """One value.

    Attributes:
        labels: Values of the metric's labels, in the order of the table, after the action and the snapshot's name.
    """

    name: str
    labels: tuple[str, ...]
    value: float


class Transfer(NamedTuple):
    """A command that has ended.

    Attributes:
        action: ``save`` or ``restore``.
        name: The snapshot's, without a version.
        ended_at: In seconds since 1970.
        version: What was saved or restored; None if it failed.
        images: What people call each image, and what was done with it; None if there was nothing to do.
    """

    action: str
    name: str
    ended_at: float
    version: int | None = None
    images: tuple[tuple[str, Done | None], ...] = ()

    def samples(self) -> Iterator[TransferSample]:
        """All values."""
        about = (self.action, self.name)
        yield TransferSample("gms_snapshot_success", about, float(self.version is not None))
        yield TransferSample("gms_snapshot_end_time_seconds", about, self.ended_at)
        if self.version is not None:
            yield TransferSample("gms_snapshot_version", about, self.version)
        for image, done in self.images:
            if done is None:
                continue
            of = (*about, image)
            yield TransferSample("gms_snapshot_image_bytes", of, done.figures.bytes)
            yield TransferSample("gms_snapshot_image_kept_bytes", of, done.figures.kept_bytes)
            yield TransferSample("gms_snapshot_image_seconds", of, done.figures.seconds)
            for step, seconds in done.figures.around.items():
                yield TransferSample("gms_snapshot_step_seconds", (*of, step), seconds)
            for phase, seconds in done.figures.threads.items():
                yield TransferSample("gms_snapshot_threads_seconds", (*of, phase), seconds)
