"""Options and parameter types that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from gms_core.config import settings
from gms_core.snapshot.objects.urls import is_url, root_url

Command = TypeVar("Command", bound=Callable[..., object])

OUTPUT = "gms.output"
"""Key of a context's ``meta`` under which the chosen output format is kept."""

_SIZE = re.compile(r"\A\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?)?B?\s*\Z", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Bytes of ``8GiB``, ``512MiB``, ``1.5G`` or ``4096``.

    Raises:
        ValueError: It is no size, or not a positive whole number of bytes.
    """
    match = _SIZE.match(text)
    if match is None:
        raise ValueError(f"{text!r} is no size; write it as 8GiB, 512MiB or a number of bytes")
    size = float(match[1]) * _UNITS[(match[2] or "").lower()] if "." in match[1] else int(match[1]) * _UNITS[(match[2] or "").lower()]
    if size < 1 or size != int(size):
        raise ValueError(f"{text!r} is not a positive whole number of bytes")
    return int(size)


def format_size(size: int) -> str:
    """Bytes for people, in the largest binary unit that leaves at least 1."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f}".removesuffix(".0") + f" {unit}"
    return f"{size} B"


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it must be."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def age(seconds: float) -> str:
    """A span of time for people, in the largest unit that leaves at least 1."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


class Size(click.ParamType):  # type: ignore[type-arg]  # generic in new releases of click only
    """A number of bytes."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse what the user wrote."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Root(click.ParamType):  # type: ignore[type-arg]  # generic in new releases of click only
    """Where snapshots lie: a directory, as an absolute path, or the URL of a place in an object store."""

    name = "directory|url"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        """Parse what the user wrote.

        Raises:
            InvalidArgument: It is a URL that cannot be used.
        """
        text = str(value)
        if is_url(text):
            return root_url(text)
        if not text or "\0" in text:
            self.fail("it is no path", param, ctx)
        return Path(text).absolute()


def _keep_output(ctx: click.Context, _: click.Parameter, value: str) -> str:
    ctx.meta[OUTPUT] = value
    return value


def _directory(_: click.Context, __: click.Parameter, value: Path | None) -> Path:
    chosen = settings()  # whatever is wrong in the environment is told here, where the format of errors is known
    return value.absolute() if value is not None else chosen.runtime_dir


def output_option(*formats: str) -> Callable[[Command], Command]:
    """``-o``; the first format is the default. Errors follow it too: they are JSON where the output is."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(formats),
        default=formats[0],
        show_default=True,
        is_eager=True,
        callback=_keep_output,
        help="Format of the output, and of errors.",
    )


RUNTIME_DIR = click.Path(path_type=Path, readable=False)
"""Type of a runtime directory: one that cannot be used is refused by what uses it, in the same words wherever its name comes from."""

runtime_dir_option = click.option(
    "--runtime-dir",
    type=RUNTIME_DIR,
    callback=_directory,
    help="Directory of the servers' sockets.  [default: GMS_RUNTIME_DIR, else $XDG_RUNTIME_DIR/gms, /run/gms for root, /tmp/gms-UID]",
)

device_option = click.option(
    "--device", "devices", multiple=True, metavar="UUID|host", help="Only this device. Can be given several times.  [default: all that have the pool]"
)

ranks_option = click.option("--ranks", is_flag=True, help="On the device host: the pools of an engine's further ranks too: POOL.1, POOL.2 and so on.")
