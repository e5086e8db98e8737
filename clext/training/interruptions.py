"""Ctrl-C and SIGTERM in a run that can go on later: they wait until its state is whole."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interruptions:
    """Inside, the first of the two signals is noted, and delivered when `deliver` is called.

    A second one is delivered at once, and one that was only noted when the context ends: to
    whatever handled them before. Python lets only its main thread handle signals; in another one,
    nothing is changed.
    """

    def __init__(self) -> None:
        self.noted: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruptions:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:  # of a job in the background
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()
        if error[0] is None:
            self.deliver()

    def deliver(self) -> None:
        """Let a signal that was noted do what it does: KeyboardInterrupt, or the process ends."""
        if self.noted is not None:
            number, self.noted = self.noted, None
            self._restore()
            signal.raise_signal(number)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.deliver()
        self.noted = number

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
