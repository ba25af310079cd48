"""Whether a device does what it is given."""

from __future__ import annotations

import torch


class DeviceProgress:
    """Looks at a device again and again, and never waits for it.

    Args:
        device: Of the process's work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._given: torch.cuda.Event | None = None

    def made(self) -> bool:
        """Whether the device has done what it was given before the last call that said so; ``host`` has always."""
        if self._device.type != "cuda":
            return True
        if self._given is not None and not self._given.query():
            return False
        self._given = torch.cuda.Event()
        self._given.record(torch.cuda.current_stream(self._device))
        return True
