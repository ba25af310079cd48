"""``gms-saver`` and ``gms-loader``: `gms snapshot save` and `restore` for containers, which are told everything by their environment."""

from __future__ import annotations

import sys

import click

from gms_core.cli import gms
from gms_core.cli.exit_codes import for_error
from gms_core.cli.output import drop_what_cannot_be_written
from gms_core.cli.refusal import as_text
from gms_core.config import snapshot_environment
from gms_core.errors import ConfigurationError


def saver() -> None:
    """Entry point of ``gms-saver``: save as the next version of GMS_SNAPSHOT."""
    _run("gms-saver", "save")


def loader() -> None:
    """Entry point of ``gms-loader``: publish GMS_SNAPSHOT, unless that was done already: a Job may be run again."""
    _run("gms-loader", "restore", "--if-missing")


def words(program: str, *command: str) -> list[str]:
    """The words of the command that the environment asks for.

    Raises:
        ConfigurationError: It does not say which snapshot.
    """
    environment = snapshot_environment()
    if "GMS_SNAPSHOT" not in environment:
        raise ConfigurationError(
            f"{program} needs GMS_SNAPSHOT, the snapshot's name", hint=f"All it can be told is in gms snapshot {command[0]} --help."
        )
    pool = [f"--pool={environment['GMS_POOL']}"] if "GMS_POOL" in environment else []
    devices = [f"--device={device}" for part in environment.get("GMS_DEVICES", "").split(",") if (device := part.strip())]
    return ["snapshot", *command, *pool, *devices, *sys.argv[1:], "--", environment["GMS_SNAPSHOT"]]


def _run(program: str, *command: str) -> None:
    try:
        found = words(program, *command)
    except ConfigurationError as error:
        click.echo(as_text(error), err=True)
        sys.exit(for_error(error))
    try:
        gms(found, prog_name=program)
    finally:
        drop_what_cannot_be_written()
