"""The ``gms`` command: the only place that exits, prints or configures logging."""

from __future__ import annotations

import logging

import click

from gms_core import __version__
from gms_core.cli.group import GmsGroup
from gms_core.cli.output import drop_what_cannot_be_written
from gms_core.plugins.loading import is_traced


@click.group(cls=GmsGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="gms")
@click.option("--debug", is_flag=True, help="Show the traceback of an error, and log more.")
def gms(debug: bool) -> None:
    """GPU Memory Service: a server owns the weights, inference engines map them."""
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if is_traced():
        logging.getLogger("gms_core.plugins").setLevel(logging.INFO)


def main() -> None:
    """Entry point of the console script."""
    try:
        gms(prog_name="gms")
    finally:
        drop_what_cannot_be_written()
