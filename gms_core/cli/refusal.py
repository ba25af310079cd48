"""How an error reaches the user: one line and a hint on standard error, or JSON, and the exit code of the table."""

from __future__ import annotations

import json
import sys
import traceback
from typing import IO, Any

import click

from gms_core.cli.exit_codes import for_error
from gms_core.errors import GmsError


class Refusal(click.ClickException):
    """A `GmsError` on its way out.

    Args:
        error: What happened.
        as_json: Whether the command was asked for JSON.
        debug: Whether to show the traceback as well.
    """

    def __init__(self, error: GmsError, *, as_json: bool, debug: bool) -> None:
        super().__init__(error.message)
        self.error = error
        self.exit_code = for_error(error)  # type: ignore[misc]  # each error has its own; click reads it from the instance
        self.as_json = as_json
        self.debug = debug

    def show(self, file: IO[Any] | None = None) -> None:
        """Write it to standard error."""
        stream = file or sys.stderr
        if self.debug:
            click.echo("".join(traceback.format_exception(self.error)), file=stream, nl=False)
        click.echo(json.dumps({"error": as_dict(self.error)}) if self.as_json else as_text(self.error), file=stream)


def as_dict(error: GmsError) -> dict[str, object]:
    """The form of an error in JSON output."""
    return {
        "code": error.code,
        "message": error.message,
        "hint": error.hint,
        "retryable": error.retryable,
        "details": error.details,
        "exit_code": int(for_error(error)),
    }


def as_text(error: GmsError) -> str:
    """The form of an error for people."""
    return f"gms: {error.message}" + (f"\nhint: {error.hint}" if error.hint else "")
