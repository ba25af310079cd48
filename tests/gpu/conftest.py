"""What all tests on a GPU need."""

from __future__ import annotations

import pytest

from tests.gpu.story import used_gib


@pytest.fixture(scope="session", autouse=True)
def asked_once() -> None:
    """NVML opens a socket for itself when a process first asks it something, and keeps it: that is nothing that a test has left behind."""
    used_gib()
