"""Fixtures of the PyTorch tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gms_core.vmm.host import HostDriver
from tests.unit.pytorch.arenas import MIB, Memory


@pytest.fixture
def memory() -> Iterator[Memory]:
    """Real memory in slabs of 1 MiB."""
    made = Memory(HostDriver(), MIB)
    yield made
    made.close()
