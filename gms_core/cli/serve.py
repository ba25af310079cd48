"""``gms serve``: run the device servers in the foreground."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gms_core.cli.metrics import HostPort, endpoint_of, serving_metrics
from gms_core.cli.options import Size, parse_size, runtime_dir_option
from gms_core.errors import DeviceNotFound, DriverUnavailable, InvalidArgument, PermissionRefused, ServerUnavailable, VersionMismatch

if TYPE_CHECKING:
    from gms_core.devices import DeviceId

ALL = "all"
TAKE_OVER_S = 120.0
"""Seconds that a server has to end once it has handed over."""
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
@click.option(
    "--keep",
    "keep_s",
    type=click.FloatRange(min=0.0),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a device's memory is kept while it has no server, because that was killed.",
)
@click.option(
    "--allow",
    multiple=True,
    metavar="USER|:GROUP",
    help="Who may use the servers besides this user and root, by name or number. Can be given several times; one group at most.",
)
@click.option(
    "--quota",
    "quotas",
    multiple=True,
    metavar="user=UID,bytes=SIZE,...",
    help="What a user or a pool may have on each device: user=NAME or pool=NAME (* for each), then bytes, allocations, metadata or sessions. "
    "Can be given several times.",
)
@click.option(
    "--keeper",
    type=click.Choice(["process", "systemd"]),
    default="process",
    show_default=True,
    help="What has the memory while a device has no server: a process for each device, or the descriptor store of the systemd unit that this is.",
)
@click.option("--replace", is_flag=True, help="Take over the devices of servers that run there already, such as those of an older version.")
@click.option("--metrics", type=HostPort(), metavar="HOST:PORT", help="Where Prometheus finds metrics, at /metrics.  [default: nowhere]")
def serve(
    names: tuple[str, ...],
    runtime_dir: Path,
    host_memory: int | None,
    keep_s: float,
    allow: tuple[str, ...],
    quotas: tuple[str, ...],
    keeper: str,
    replace: bool,
    metrics: tuple[str, int] | None,
) -> None:
    """Run one device server per device, until SIGTERM or SIGINT.

    Prints a line on standard output for each device once engines can connect to it. A server that is killed is started again and goes on with
    all that there was: memory, what is published, who reads and who holds what. To end by SIGTERM or SIGINT gives the memory up; with --keeper
    systemd that is left to systemd, which closes it when the unit is stopped, and passes it on when the unit is restarted.
    """
    from gms_core.allowed import allowed
    from gms_core.devices import HOST
    from gms_core.keeper.store import check as check_store
    from gms_core.quotas import parse_quotas
    from gms_core.server.supervisor import serve as supervise
    from gms_core.service_manager import ServiceManager

    manager, stored = ServiceManager(), keeper == "systemd"
    if stored:
        check_store(manager)
    if host_memory is not None and HOST not in names:
        raise InvalidArgument("--host-memory has no meaning without --device host")
    devices = resolve(names)
    logging.getLogger("gms_core").setLevel(min(logging.INFO, logging.getLogger().level))
    if not math.isfinite(keep_s):
        raise InvalidArgument(f"--keep {keep_s} is no finite number of seconds")
    # Whatever is wrong with the options is told before anybody is asked to leave.
    admitted, limited = allowed(allow), parse_quotas(quotas, parse_size)
    endpoint = endpoint_of(metrics, devices, runtime_dir)
    replaced = False
    if replace:
        for check in (True, False):  # none is asked to leave before all are known to be able to
            for device in devices:
                replaced |= take_over(device, runtime_dir, only_check=check)
    with serving_metrics(endpoint, replaced=replaced):
        code = supervise(
            devices, runtime_dir, host_memory, _announce, keep_s=keep_s, allow=admitted.words, quotas=limited, manager=manager, stored=stored
        )
    raise click.exceptions.Exit(code)


def take_over(device: DeviceId, runtime_dir: Path, *, only_check: bool) -> bool:
    """Have the server that a device has, if it has one, leave everything to the next, and wait until it has gone.

    Args:
        device: Whose server.
        runtime_dir: Where it has its socket.
        only_check: Whether to see only that it could do so.

    Returns:
        Whether there is, or was, one.

    Raises:
        GmsError: It does not want to, or does not go.
    """
    from gms_core.client import connect
    from gms_core.protocol.messages import STAYS, HandOver
    from gms_core.runtime_dir import lock_path, socket_path

    path = socket_path(device, runtime_dir)
    if not _is_locked(lock_path(path)):
        return False
    try:
        with connect(device, socket_path=path, client="gms serve --replace") as session:
            if session.welcome.version < 2:
                raise VersionMismatch(
                    f"the server at {path} (gms {session.welcome.server}) is too old to hand anything over", hint="Stop it, and the engines with it."
                )
            if STAYS in session.welcome.features:
                raise InvalidArgument(
                    f"the server at {path} hands nothing over: systemd starts the next one", hint="Run systemctl restart with the name of its unit."
                )
            if only_check:
                return True
            session.perform(HandOver())
    except ServerUnavailable:
        return False  # there is none, or it has just ended
    deadline = time.monotonic() + TAKE_OVER_S
    while _is_locked(lock_path(path)):
        if time.monotonic() > deadline:
            raise ServerUnavailable(f"the server at {path} was asked to leave, and is still there after {TAKE_OVER_S:g} s")
        time.sleep(0.01)
    return True


def _is_locked(path: Path) -> bool:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise PermissionRefused(f"the lock {path} cannot be looked at: {error.strerror}", hint="Remove it if no server runs.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


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
