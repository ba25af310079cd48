"""Fixtures of the unit tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

InstallPlugin = Callable[[str, str], Path]


@pytest.fixture
def install_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InstallPlugin]:
    """Installs a plugin as a package manager does, metadata and all: ``install_plugin(name, source)`` returns the folder."""

    def install(name: str, source: str) -> Path:
        site = tmp_path / "site"
        metadata = site / f"{name}_plugin-1.dist-info"
        metadata.mkdir(parents=True)
        (site / f"{name}_plugin.py").write_text(source)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1\n")
        (metadata / "entry_points.txt").write_text(f"[gms]\n{name} = {name}_plugin\n")
        monkeypatch.syspath_prepend(str(site))
        installed.append(f"{name}_plugin")
        return site

    installed: list[str] = []
    yield install
    for module in installed:
        sys.modules.pop(module, None)
