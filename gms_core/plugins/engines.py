"""Engines as the checks see them: what an adapter says of itself, and an engine's source text, installed or in a wheel, without an import."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.parser import HeaderParser
from pathlib import Path
from typing import Protocol

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from gms_core.errors import EngineUnsupported, InvalidArgument
from gms_core.plugins.findings import Status, Verdict


class EngineSource(Protocol):
    """The source text of one version of an engine."""

    @property
    def version(self) -> str:
        """Version of the distribution, such as ``0.30.0``."""

    @property
    def where(self) -> str:
        """Where it was found, for people."""

    def text(self, module: str) -> str | None:
        """Source of a module, such as ``vllm.config.load``; None if it has no such module."""


USUAL_PORT = 8000
"""Where an engine's server answers if nobody says anything of it."""


@dataclass(frozen=True, slots=True)
class NodePlace:
    """Which part of an engine over several nodes is started.

    Attributes:
        nodes: How many nodes there are.
        node: The number of this one, from 0.
        host: The first node's address, for the others.
        port: Where the engine's ranks meet there.
    """

    nodes: int
    node: int
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class EngineAdapter:
    """What an adapter says of the engine that it serves.

    Attributes:
        name: Such as ``vllm``.
        package: Name under which it is imported.
        distributions: Names under which it is distributed; the first that is installed counts.
        tested: Versions that the adapter was tested with, such as ``>=0.26,<0.34``; empty where it goes by what a version offers.
        requirements: Each looks at a source and says whether one symbol, or one patch's target, is as the adapter expects.
        command: Called with a command line; returns it with what the engine needs to share weights and to fail over, or None if it does not start
            this engine. It raises `ConfigurationError` if the command line says something else.
        port: Where its server answers if the command line has no ``--port``.
        over_nodes: Called with what ``command`` has returned; returns the command that starts one node's part of the engine. It raises
            `ConfigurationError` if the command says something of that itself. None if such engines of this kind do not fail over.
    """

    name: str
    package: str
    distributions: tuple[str, ...]
    tested: str
    requirements: Sequence[Callable[[EngineSource], Verdict]] = field(default=())
    command: Callable[[Sequence[str]], list[str] | None] | None = None
    port: int = USUAL_PORT
    over_nodes: Callable[[Sequence[str], NodePlace], list[str]] | None = None

    def check(self, source: EngineSource) -> list[Verdict]:
        """Verdicts on the version, then on every requirement."""
        return [self._version(source), *(requirement(source) for requirement in self.requirements)]

    def _version(self, source: EngineSource) -> Verdict:
        target = f"{self.name} {source.version}"
        if not self.tested:
            return Verdict(target, Status.OK, "versions are told apart by what they offer")
        try:
            known = SpecifierSet(self.tested).contains(Version(source.version), prereleases=True)
        except InvalidVersion:
            known = False
        if known:
            return Verdict(target, Status.OK, f"in the tested range {self.tested}")
        fix = f"Install a version of {self.name} in that range, or set GMS_ALLOW_UNTESTED_ENGINE=1 to try this one."
        return Verdict(target, Status.FAIL, f"outside the tested range {self.tested}", fix)


@dataclass(frozen=True, slots=True)
class InstalledSource:
    """An engine that is installed in this environment."""

    version: str
    root: Path

    @property
    def where(self) -> str:
        """The package's folder."""
        return str(self.root)

    def text(self, module: str) -> str | None:
        """Source of a module; None if there is none."""
        inside = self.root.joinpath(*module.split(".")[1:])
        for path in (inside.with_suffix(".py") if inside != self.root else inside / "__init__.py", inside / "__init__.py"):
            if path.is_file():
                return path.read_text(encoding="utf-8")
        return None


@dataclass(frozen=True, slots=True)
class WheelSource:
    """An engine in a wheel file."""

    version: str
    path: Path
    archive: zipfile.ZipFile
    names: frozenset[str]

    @property
    def where(self) -> str:
        """The wheel's path."""
        return str(self.path)

    def text(self, module: str) -> str | None:
        """Source of a module; None if there is none."""
        inside = module.replace(".", "/")
        for name in (f"{inside}.py", f"{inside}/__init__.py"):
            if name in self.names:
                return self.archive.read(name).decode()
        return None


def find_installed(adapter: EngineAdapter) -> InstalledSource | None:
    """The engine in this environment, or None. Nothing of it is imported."""
    spec = importlib.util.find_spec(adapter.package)
    if spec is None or not spec.submodule_search_locations:
        return None
    for name in adapter.distributions:
        try:
            return InstalledSource(importlib.metadata.version(name), Path(next(iter(spec.submodule_search_locations))))
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@contextmanager
def open_wheel(adapter: EngineAdapter, path: Path) -> Iterator[WheelSource]:
    """The engine in a wheel file, for as long as the context lasts.

    Raises:
        InvalidArgument: It cannot be read, or is no wheel.
        EngineUnsupported: It is a wheel of something else.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise InvalidArgument(f"{path} cannot be read as a wheel: {error}") from error
    with archive:
        names = frozenset(archive.namelist())
        metadata = [name for name in names if name.count("/") == 1 and name.endswith(".dist-info/METADATA")]
        if len(metadata) != 1:
            raise InvalidArgument(f"{path} is not a wheel: it has {len(metadata)} METADATA files")
        headers = HeaderParser().parsestr(archive.read(metadata[0]).decode())
        if headers.get("Name", "") not in adapter.distributions:
            raise EngineUnsupported(f"{path} is a wheel of {headers.get('Name')!r}, not of {adapter.name}")
        yield WheelSource(str(headers.get("Version", "")), path, archive, names)
