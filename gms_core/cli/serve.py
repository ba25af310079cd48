"""``gms serve``: run the device servers in the foreground."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gms_core.cli.options import Size, runtime_dir_option
from gms_core.errors import DeviceNotFound, DriverUnavailable, InvalidArgument

if TYPE_CHECKING:
    from gms_core.devices import DeviceId

ALL = "all"
HOST_HINT = "To serve host memory to engines that run on CPU: gms serve --device host"


@click.command(short_help="Run the device servers in the foreground.")
@click.option(
    "--device",
    "names",
    multiple=True,
    default=(ALL,),
    metavar="UUID|host|all",
    help="Device to serve: a GPU's UUID, host, or all for every GPU. Can be given several times.  [default: all]",
)
@runtime_dir_option
@click.option(
    "--host-memory", type=Size(), metavar="SIZE", help="Bytes that the host device offers, such as 8GiB.  [default: all that the machine has]"
)
def serve(names: tuple[str, ...], runtime_dir: Path, host_memory: int | None) -> None:
    """Run one device server per device, until SIGTERM or SIGINT.

    Prints a line on standard output for each device once engines can connect to it.
    """
    from gms_core.devices import HOST
    from gms_core.server.supervisor import serve as supervise

    if host_memory is not None and HOST not in names:
        raise InvalidArgument("--host-memory has no meaning without --device host")
    devices = resolve(names)
    logging.getLogger("gms_core").setLevel(min(logging.INFO, logging.getLogger().level))
    raise click.exceptions.Exit(supervise(devices, runtime_dir, host_memory, _announce))


def resolve(names: tuple[str, ...], host_hint: str = HOST_HINT) -> list[DeviceId]:
    """The devices that the user means, each once.

    Args:
        names: What the user wrote.
        host_hint: What to do where there is no GPU.

    Raises:
        InvalidArgument: No device can have one of the names.
        DeviceNotFound: There is no such GPU, or no GPU at all.
    """
    from gms_core.devices import HOST, list_gpus

    devices = [HOST] if HOST in names else []
    wanted = [name if name == ALL else _checked(name) for name in names if name != HOST]
    if not wanted:
        return devices
    try:
        gpus = list_gpus()
    except DriverUnavailable as error:
        refusal = DeviceNotFound(f"no GPU can be served: {error.message}", hint=error.hint)
        refusal.add_hint(host_hint)
        raise refusal from error
    if not gpus:
        raise DeviceNotFound("this machine has no GPU", hint=host_hint)
    known = {gpu.id for gpu in gpus}
    for name in wanted:
        if name != ALL and name not in known:
            raise DeviceNotFound(f"there is no device {name!r} on this machine", hint=f"The devices are: {', '.join(sorted(known))}, host.")
    return devices + [gpu.id for gpu in gpus if ALL in wanted or gpu.id in wanted]


def _checked(name: str) -> str:
    from gms_core.devices import device_id

    try:
        return device_id(name)
    except InvalidArgument as error:
        error.add_hint("Or all, for every GPU.")
        raise


def _announce(device: DeviceId, path: Path) -> None:
    with contextlib.suppress(OSError):  # nobody reads any more, or the disk is full: that is no reason to end servers
        click.echo(f"{device} ready at {path}")
