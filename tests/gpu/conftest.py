"""What all tests on a GPU need."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def opened_once() -> None:
    """NVML opens a socket for itself when a process initialises it, and keeps it: that is nothing that a test has left behind."""
    import pynvml

    pynvml.nvmlInit()
