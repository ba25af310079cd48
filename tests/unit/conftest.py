"""Fixtures of the unit tests."""

from __future__ import annotations

import gc
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.unit.object_stores import Proxy

_BUCKETS = itertools.count(1)

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


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A server that speaks S3, for all tests."""
    from tests.unit.object_stores import s3_server

    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before that server, which the environment names, and a bucket ``bucket-N``, whose URL it has."""
    from tests.unit.object_stores import KEY, SECRET, make_bucket, no_connections_left, proxy_before

    with no_connections_left(), proxy_before(s3_endpoint) as proxy:
        for name in [name for name in os.environ if name.startswith("AWS_") or name.upper().endswith("_PROXY")]:
            monkeypatch.delenv(name)
        proxy.bucket = f"bucket-{next(_BUCKETS)}"
        make_bucket(s3_endpoint, proxy.bucket)
        for name, value in {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": proxy.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        yield proxy
        gc.collect()  # the library's stores, and their connections with them
