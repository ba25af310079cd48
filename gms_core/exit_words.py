"""How a process has ended, in words."""

from __future__ import annotations

import signal


def how(code: int) -> str:
    """An exit code, as `subprocess` counts, in words."""
    if code >= 0:
        return f"exited with code {code}"
    return f"was ended by signal {signal.Signals(-code).name if -code in set(signal.Signals) else -code}"
