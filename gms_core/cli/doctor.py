"""``gms doctor``: what works here, what does not, the evidence, and what to do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import click

from gms_core.cli.exit_codes import ExitCode
from gms_core.cli.options import output_option, runtime_dir_option
from gms_core.config import Settings, settings
from gms_core.errors import GmsError
from gms_core.plugins.engines import EngineAdapter, find_installed
from gms_core.plugins.findings import Check, Finding, Status
from gms_core.plugins.loading import Plugins, load

SCHEMA = "gms-doctor/1"
MARKS = {Status.OK: ("ok", "green"), Status.WARN: ("warn", "yellow"), Status.FAIL: ("FAIL", "red")}


@click.command(short_help="Check this machine, its servers, engines and patches.")
@runtime_dir_option
@output_option("text", "json")
def doctor(runtime_dir: Path, output: str) -> None:
    """Check driver, GPUs, limits, runtime directory, servers, engines and patches.

    Each finding comes with its evidence and, where there is one, a fix. The exit code is 3 when a check fails.
    """
    found: list[tuple[str, Finding]] = []
    for section, finding in examine(dataclasses.replace(settings(), runtime_dir=runtime_dir)):
        if output == "text":
            _show(finding, None if found and found[-1][0] == section else section)
        found.append((section, finding))
    if output == "json":
        findings = [{"check": section, **dataclasses.asdict(finding)} for section, finding in found]
        click.echo(json.dumps({"schema": SCHEMA, "findings": findings}, indent=2))
    failed = sum(finding.status is Status.FAIL for _, finding in found)
    if output == "text":
        click.echo(f"\n{failed} of {len(found)} findings fail" if failed else f"\nnone of {len(found)} findings fails")
    if failed:
        raise click.exceptions.Exit(ExitCode.FINDINGS)


def examine(chosen: Settings) -> Iterator[tuple[str, Finding]]:
    """Every finding, with the name of its check."""
    plugins = load()
    checks = plugins.collect("gms_doctor_checks", Check)
    for check in checks:
        try:
            yield from ((check.name, finding) for finding in check.run(chosen))
        except GmsError as error:
            yield check.name, Finding(Status.FAIL, error.code, error.message, error.hint)
        except Exception as error:  # noqa: BLE001 - the other checks must be heard; a check that breaks is itself a finding
            yield check.name, Finding(Status.FAIL, "the check itself", f"{type(error).__name__}: {error}", "Report it to the check's author.")
    adapters = plugins.collect("gms_engines", EngineAdapter)
    for adapter in adapters:
        yield from (("engines", finding) for finding in _engine(adapter))
    yield from (("plugins", finding) for finding in _plugins(plugins))


def _engine(adapter: EngineAdapter) -> Iterator[Finding]:
    source = find_installed(adapter)
    if source is None:
        yield Finding(Status.OK, adapter.name, "not installed in this environment")
        return
    verdicts = adapter.check(source)
    for verdict in verdicts:
        if verdict.status is not Status.OK:
            yield Finding(verdict.status, f"{adapter.name} {source.version}: {verdict.target}", verdict.evidence, verdict.fix)
    good = sum(verdict.status is Status.OK for verdict in verdicts)
    if good:
        yield Finding(
            Status.OK, f"{adapter.name} {source.version}", f"{good} of {len(verdicts)} verdicts on symbols and patches are good ({source.where})"
        )


def _plugins(plugins: Plugins) -> Iterator[Finding]:
    yield Finding(Status.OK, "loaded", ", ".join(plugins.names()))
    for error in plugins.broken:
        yield Finding(Status.FAIL, "plugin", error.message, error.hint)


def _show(finding: Finding, heading: str | None) -> None:
    if heading is not None:
        click.secho(heading, bold=True)
    mark, colour = MARKS[finding.status]
    click.echo(f"  {click.style(f'{mark:<4}', fg=colour)}  {finding.what}: {finding.evidence}")
    if finding.fix:
        click.echo(f"        fix: {finding.fix}")
