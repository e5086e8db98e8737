"""Seconds of each kind of work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Timer:
    """Adds up the seconds of each kind of work, including what the device still has to do."""

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self._seconds, self._device = seconds, device
        self._apart = 0.0  # seconds of what was measured inside what is being measured

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Count the time inside as `name`, without what is measured inside."""
        outer, self._apart = self._apart, 0.0
        start = time.perf_counter()
        yield
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        seconds = time.perf_counter() - start
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds - self._apart
        self._apart = outer + seconds
