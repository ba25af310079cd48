"""The ``gms`` command group: commands come from plugins, and `GmsError` ends in one line and an exit code."""

from __future__ import annotations

import contextlib
import errno
import importlib
from collections.abc import Iterator

import click

from gms_core.cli.exit_codes import ExitCode
from gms_core.cli.options import OUTPUT
from gms_core.cli.output import is_of_the_output
from gms_core.cli.refusal import Refusal, as_text
from gms_core.errors import GmsError
from gms_core.plugins.loading import Plugins, load_built_in, load_installed


class GmsGroup(click.Group):
    """Finds its commands through the hook ``gms_commands``: those of installed plugins only when no built-in has the name."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]  # click's own parameters, handed through
        self._lazy: dict[str, str] = {}
        self._plugins: Plugins | None = None
        self._complete = False

    def add_lazy(self, name: str, target: str) -> None:
        """Add a command whose module is imported when it is used.

        Args:
            name: Of the command.
            target: ``module:attribute`` of the click command.
        """
        self._lazy[name] = target

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command by its name."""
        self._load(installed=False)
        if cmd_name not in self._lazy and cmd_name not in self.commands:
            self._load(installed=True)
        if cmd_name in self._lazy:
            module, _, attribute = self._lazy.pop(cmd_name).partition(":")
            self.add_command(getattr(importlib.import_module(module), attribute), cmd_name)
        return super().get_command(ctx, cmd_name)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Names of all commands."""
        self._load(installed=True)
        return sorted({*self._lazy, *self.commands})

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the options before the command; ``--help`` is carried out here."""
        with _refusing(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Run a command."""
        with _refusing(ctx):
            return super().invoke(ctx)

    def _load(self, *, installed: bool) -> None:
        if self._plugins is None:
            self._plugins = load_built_in()
            self._plugins.notify("gms_commands", group=self)
        if installed and not self._complete:
            self._complete = True
            built_in = self._plugins.manager.get_plugins()
            load_installed(self._plugins)
            self._plugins.notify("gms_commands", skip=built_in, group=self)
            for broken in self._plugins.broken:
                click.echo(as_text(broken), err=True)


@contextlib.contextmanager
def _refusing(ctx: click.Context) -> Iterator[None]:
    """Turn a `GmsError`, or an output that cannot be written, into a `Refusal`, which has an exit code."""
    try:
        yield
    except GmsError as error:
        raise _refusal(error, ctx) from error
    except OSError as error:
        if error.errno == errno.EPIPE or not is_of_the_output(error):  # a reader that has gone is click's
            raise
        raise _refusal(GmsError(f"the output cannot be written: {error.strerror}"), ctx) from error
    except KeyboardInterrupt:
        raise click.exceptions.Exit(ExitCode.INTERRUPTED) from None


def _refusal(error: GmsError, ctx: click.Context) -> Refusal:
    return Refusal(error, as_json=ctx.meta.get(OUTPUT) == "json", debug=bool(ctx.params.get("debug")))
