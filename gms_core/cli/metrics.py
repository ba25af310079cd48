"""``gms metrics``, and the address of the metrics that ``gms serve`` has."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gms_core.cli.options import runtime_dir_option
from gms_core.errors import ConfigurationError, ServerUnavailable

if TYPE_CHECKING:
    from types import ModuleType

    from gms_core.devices import DeviceId
    from gms_core.metrics.endpoint import Endpoint

log = logging.getLogger(__name__)

PATIENCE_S = 2.0
"""Seconds that a `gms serve` which was replaced may take to leave its address."""


class HostPort(click.ParamType):  # type: ignore[type-arg]  # generic in new releases of click only
    """``HOST:PORT``; an IPv6 address in brackets."""

    name = "host:port"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """Parse what the user wrote."""
        if isinstance(value, tuple):
            return value
        host, _, port = str(value).rpartition(":")
        host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if not host or not port.isdecimal() or int(port) > 65535:
            self.fail(f"{value!r} is not HOST:PORT, such as 127.0.0.1:9464", param, ctx)
        return host, int(port)


@click.command(short_help="Print the metrics of all servers once.")
@click.option(
    "--device", "devices", multiple=True, metavar="UUID|host", help="Only this device. Can be given several times.  [default: all that have a socket]"
)
@runtime_dir_option
def metrics(devices: tuple[str, ...], runtime_dir: Path) -> None:
    """Print the metrics in Prometheus' text format, such as for the textfile collector of its node exporter.

    A server that does not answer within 2 seconds has gms_up 0, and is no error.
    """
    from gms_core.metrics.scrape import scrape
    from gms_core.runtime_dir import sockets

    prometheus = exposition("gms metrics")
    paths = sockets(runtime_dir, devices)
    if not paths:
        raise ServerUnavailable(f"no server has a socket in {runtime_dir}", hint="Start one with: gms serve (without a GPU: gms serve --device host)")
    click.echo(prometheus.as_text(lambda: scrape(paths)), nl=False)


def endpoint_of(address: tuple[str, int] | None, devices: Sequence[DeviceId], runtime_dir: Path) -> Endpoint | None:
    """Where the metrics of these devices are to be served, if anywhere. Nothing listens yet.

    Raises:
        ConfigurationError: prometheus_client is missing.
        InvalidArgument: The host is unknown.
    """
    if address is None:
        return None
    prometheus = exposition("--metrics")
    from gms_core.metrics.endpoint import Endpoint
    from gms_core.metrics.scrape import scrape
    from gms_core.runtime_dir import socket_path

    paths = [socket_path(device, runtime_dir) for device in devices]
    return Endpoint(*address, prometheus.as_application(lambda: scrape(paths)))


@contextlib.contextmanager
def serving_metrics(endpoint: Endpoint | None, *, replaced: bool) -> Iterator[None]:
    """Answer Prometheus, if that is wanted, and say where; until the context ends.

    Args:
        endpoint: Where.
        replaced: Whether devices were taken over. Whoever had them may be about to leave that address; if it does not, there are no metrics, but
            servers all the same, since their clients wait for them.

    Raises:
        ConfigurationError: The address cannot be had.
    """
    with contextlib.ExitStack() as stack:
        if endpoint is not None:
            try:
                url = stack.enter_context(endpoint.listening(PATIENCE_S if replaced else 0.0))
            except ConfigurationError as error:
                if not replaced:
                    raise
                log.error("%s", error)
            else:
                with contextlib.suppress(OSError):  # as for the devices' lines
                    click.echo(f"metrics at {url}")
        yield


def exposition(what: str) -> ModuleType:
    """The module that knows Prometheus.

    Args:
        what: Needs it.

    Raises:
        ConfigurationError: prometheus_client is missing.
    """
    try:
        from gms_core.metrics import exposition as module
    except ImportError as error:
        raise ConfigurationError(f"{what} needs prometheus_client, which is not installed", hint="Install it: pip install 'gms[metrics]'") from error
    return module
