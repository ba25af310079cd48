"""Which pools of which servers a snapshot is saved from, or restored to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gms_core.cli.servers import all_reports, is_meant
from gms_core.devices import HOST, DeviceId, list_gpus
from gms_core.errors import GenerationNotFound, GmsError, InvalidArgument, PoolNotFound, ServerUnavailable
from gms_core.protocol.messages import StatusReport
from gms_core.runtime_dir import socket_path
from gms_core.snapshot.manifest import Image
from gms_core.snapshot.matching import check_alike, destinations, rank
from gms_core.snapshot.whole import Place

CLIENT = "gms snapshot"


def sources(runtime_dir: Path, name: str, devices: Sequence[str], *, ranks: bool) -> list[Place]:
    """The pools of a name, in the order in which their images are saved: that of the devices as they were named, or else of the ranks.

    Raises:
        InvalidArgument: A device is named twice.
        ServerUnavailable: Not all of the servers answer.
        PoolNotFound: No device has the pool, or one that is named has not.
        GenerationNotFound: Nothing is committed there.
        SnapshotMismatch: The pools are not of one engine.
    """
    _check_once(devices)
    found = [
        (report, status)
        for report in all_reports(runtime_dir, CLIENT, tuple(devices))
        for status in report.pools
        if is_meant(status.name, report.device, name, ranks=ranks)
    ]
    if lacking := [device for device in devices if device not in {report.device for report, _ in found}]:
        raise PoolNotFound(f"{', '.join(lacking)} has no pool {name!r}", hint="gms pool list shows them.")
    if not found:
        raise PoolNotFound(f"no server has a pool {name!r}", hint="gms pool list shows them.")
    for report, status in found:
        if not status.generation:
            raise GenerationNotFound(f"pool {status.name!r} on {report.device} has no committed generation", hint="Save it once it is published.")
    check_alike([(f"{status.name} on {report.device}", status.identity) for report, status in found])
    order = {device: number for number, device in enumerate(devices)}
    found.sort(key=lambda pair: (order.get(pair[0].device, 0), rank(pair[1].identity, pair[1].name), pair[0].device))
    return [Place(DeviceId(report.device), socket_path(DeviceId(report.device), runtime_dir), status.name, status.digest) for report, status in found]


def targets(images: Sequence[Image], runtime_dir: Path, devices: Sequence[str], pool: str) -> list[Place]:
    """Where the images of a snapshot go.

    Raises:
        InvalidArgument: There are too few devices, or too many were named.
        ServerUnavailable: The server of one of them does not answer.
    """
    _check_once(devices)
    reports = {report.device: report for report in all_reports(runtime_dir, CLIENT, tuple(devices))}
    chosen = destinations(images, devices, _in_order(reports), pool)
    if lacking := sorted({one.device for one in chosen} - reports.keys()):
        raise ServerUnavailable(f"no server answers in {runtime_dir} for {', '.join(lacking)}", hint="Start it with gms serve.")
    return [
        Place(DeviceId(one.device), socket_path(DeviceId(one.device), runtime_dir), one.pool, _digest(reports[one.device], one.pool))
        for one in chosen
    ]


def _check_once(devices: Sequence[str]) -> None:
    if len(set(devices)) < len(devices):
        raise InvalidArgument("a device is named twice", hint="Name each one once.")


def _digest(report: StatusReport, pool: str) -> str:
    return next((status.digest for status in report.pools if status.name == pool and status.generation), "")


def _in_order(reports: dict[str, StatusReport]) -> list[str]:
    """Devices in the order in which an engine counts them: that of the bus, as far as it can be known."""
    gpus = sorted(device for device in reports if device != HOST)
    if len(gpus) > 1:
        try:
            known = [str(device.id) for device in list_gpus()]
        except GmsError:
            known = []
        gpus.sort(key=lambda device: known.index(device) if device in known else len(known))
    return [*gpus, *(device for device in reports if device == HOST)]
