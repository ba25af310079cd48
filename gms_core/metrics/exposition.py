"""Metrics in the formats that Prometheus reads. The one module that imports prometheus_client."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest, make_wsgi_app, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from gms_core.metrics.samples import samples
from gms_core.metrics.table import METRICS
from gms_core.metrics.transfers import TRANSFER_METRICS, Transfer
from gms_core.protocol.messages import Durations, StatusReport

Ask = Callable[[], Iterable[tuple[str, StatusReport | None]]]
"""Gives the report of each device; None for one whose server does not answer."""
_FAMILIES: dict[str, Any] = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily, "histogram": HistogramMetricFamily}


class _Devices(Collector):
    """Asks the servers each time that somebody wants the metrics."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def describe(self) -> Iterable[Family]:
        """Nothing: to be registered must ask no server."""
        return []

    def collect(self) -> Iterator[Family]:
        """All metrics of all devices."""
        families = {name: _FAMILIES[metric.kind](name, metric.help, labels=("device", *metric.labels)) for name, metric in METRICS.items()}
        for device, report in self._ask():
            for name, labels, value in samples(device, report):
                if isinstance(value, Durations):
                    families[name].add_metric(labels, buckets=_buckets(value), sum_value=value.sum_s)
                else:
                    families[name].add_metric(labels, value)
        yield from families.values()


def _buckets(durations: Durations) -> list[tuple[str, float]]:
    found, total = [], 0
    for bound, count in zip((*map(str, durations.bounds_s), "+Inf"), durations.counts, strict=True):
        total += count
        found.append((bound, float(total)))
    return found


def _registry(ask: Ask) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Devices(ask))
    return registry


def as_text(ask: Ask) -> bytes:
    """The metrics as they are now, in the text format."""
    return generate_latest(_registry(ask))


def as_application(ask: Ask) -> Any:
    """A WSGI application that answers every request with the metrics as they are then, in the format that is asked for."""
    return make_wsgi_app(_registry(ask))


class _Once(Collector):
    """Values that are known."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer

    def collect(self) -> Iterator[Family]:
        """All metrics that there are of it."""
        families: dict[str, GaugeMetricFamily] = {}
        for name, labels, value in self._transfer.samples():
            metric = TRANSFER_METRICS[name]
            if name not in families:
                families[name] = GaugeMetricFamily(name, metric.help, labels=("action", "name", *metric.labels))
            families[name].add_metric(labels, value)
        yield from families.values()


def write_transfer(transfer: Transfer, path: Path) -> None:
    """Write the metrics of a save or a restore to a file, in the place of what was there, all at once.

    Raises:
        OSError: It cannot be written.
    """
    registry = CollectorRegistry()
    registry.register(_Once(transfer))
    write_to_textfile(str(path), registry)
