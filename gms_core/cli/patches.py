"""``gms patches check``: verdicts on an engine's source, installed or in a wheel, without importing it and without a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import click

from gms_core.cli.exit_codes import ExitCode
from gms_core.cli.options import output_option
from gms_core.cli.refusal import as_text
from gms_core.errors import EngineUnsupported, PluginError
from gms_core.plugins.engines import EngineAdapter, EngineSource, find_installed, open_wheel
from gms_core.plugins.findings import Status, Verdict
from gms_core.plugins.loading import Plugins, load

SCHEMA = "gms-patches/1"


@click.group()
def patches() -> None:
    """The changes that GMS makes to engines at run time."""


@patches.command()
@click.option("--engine", metavar="NAME", help="Only this engine, such as vllm.  [default: all that have an adapter]")
@click.option("--wheel", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Check this wheel instead of what is installed.")
@click.option("-v", "--verbose", is_flag=True, help="Show the good verdicts too.")
@output_option("text", "json")
def check(engine: str | None, wheel: Path | None, verbose: bool, output: str) -> None:
    """Check every symbol and patch that an adapter needs against an engine's source.

    Nothing of the engine is imported. The exit code is 3 when a verdict fails.
    """
    results = list(_judge(_adapters(engine), wheel))
    if not results:
        what = (
            f"{wheel} is a wheel of no engine that has an adapter"
            if wheel
            else f"{engine or 'no engine'} is {'not ' if engine else ''}installed here"
        )
        raise EngineUnsupported(what, hint="Install the engine in this environment, or name a wheel with --wheel.")
    if output == "json":
        engines = [
            {"engine": adapter.name, "version": version, "where": where, "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts]}
            for adapter, version, where, verdicts in results
        ]
        click.echo(json.dumps({"schema": SCHEMA, "engines": engines}, indent=2))
    else:
        for adapter, version, where, verdicts in results:
            _show(adapter, version, where, verdicts, verbose=verbose)
    if any(verdict.status is Status.FAIL for *_, verdicts in results for verdict in verdicts):
        raise click.exceptions.Exit(ExitCode.FINDINGS)


def _adapters(engine: str | None) -> list[EngineAdapter]:
    plugins = load()
    adapters = plugins.collect("gms_engines", EngineAdapter)
    chosen = [adapter for adapter in adapters if engine in (None, adapter.name)]
    if chosen:
        for error in plugins.broken:
            click.echo(as_text(error), err=True)
        return chosen
    raise _no_adapter(engine, adapters, plugins)


def _no_adapter(engine: str | None, adapters: list[EngineAdapter], plugins: Plugins) -> EngineUnsupported | PluginError:
    if plugins.broken:
        return plugins.broken[0]
    names = ", ".join(adapter.name for adapter in adapters) or "none; is GMS_PLUGINS set?"
    return EngineUnsupported(f"no plugin has an adapter for {engine or 'any engine'}", hint=f"Engines with an adapter: {names}.")


def _judge(adapters: list[EngineAdapter], wheel: Path | None) -> Iterator[tuple[EngineAdapter, str, str, list[Verdict]]]:
    for adapter in adapters:
        with contextlib.ExitStack() as stack:
            source: EngineSource | None
            if wheel is None:
                source = find_installed(adapter)
            else:
                try:
                    source = stack.enter_context(open_wheel(adapter, wheel))
                except EngineUnsupported:
                    if len(adapters) == 1:
                        raise
                    continue
            if source is not None:
                yield adapter, source.version, source.where, adapter.check(source)


def _show(adapter: EngineAdapter, version: str, where: str, verdicts: list[Verdict], *, verbose: bool) -> None:
    click.secho(f"{adapter.name} {version}", bold=True, nl=False)
    click.echo(f"  {where}")
    colours = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "red"}
    for verdict in verdicts:
        if verdict.status is Status.OK and not verbose:
            continue
        click.echo(f"  {click.style(f'{verdict.status:<4}', fg=colours[verdict.status])}  {verdict.target}: {verdict.evidence}")
        if verdict.fix:
            click.echo(f"        fix: {verdict.fix}")
    counts = {status: sum(verdict.status is status for verdict in verdicts) for status in Status}
    click.echo(f"  {counts[Status.OK]} ok, {counts[Status.WARN]} warn, {counts[Status.FAIL]} fail")
