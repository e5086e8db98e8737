"""What a run says while it works, on stderr: a bar on a terminal, a line per epoch in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

_TASK_AND_EPOCH = "task {task}/{tasks} epoch {epoch}/{epochs}"


def say(line: str) -> None:
    """Write one line to stderr without tearing a progress bar that is being drawn there."""
    tqdm.write(line, file=sys.stderr)


class Progress:
    """Progress of one run: `step()` in the loop, `epoch_start` and `epoch_end` around it.

    A terminal gets one bar for the whole run, redrawn at most ten times a second, so that a step
    pays well under a microsecond. Anything else (a log, CI, a notebook) gets a line per epoch.
    """

    def __init__(self, label: str, tasks: int, epochs: int, steps: int, *, show: bool) -> None:
        self._label, self._tasks, self._epochs = label, tasks, epochs
        self._lines = show and not sys.stderr.isatty()
        self._start = time.perf_counter()
        self._last = ""
        self._bar = tqdm(
            total=tasks * epochs * steps,
            desc=label,
            unit="step",
            file=sys.stderr,
            disable=not show or self._lines,
            dynamic_ncols=True,
            smoothing=0.05,
        )
        self.step = self._bar.update

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def epoch_start(self, task: int, epoch: int) -> None:
        """Show which task and epoch (both counted from 0) the coming steps belong to."""
        self._bar.set_postfix_str(f"{self._place(task, epoch)}{self._last}", refresh=False)

    def epoch_end(self, task: int, epoch: int, loss: float, accuracy: float) -> None:
        """Show the mean loss of the epoch and the average accuracy over the tasks seen."""
        self._last = f", loss {loss:.4f}, accuracy {accuracy:.4f}"
        self._bar.set_postfix_str(f"{self._place(task, epoch)}{self._last}", refresh=True)
        if self._lines:
            seconds = time.perf_counter() - self._start
            say(f"{self._label}: {self._place(task, epoch)}{self._last}, {seconds:.1f} s")

    def _place(self, task: int, epoch: int) -> str:
        return _TASK_AND_EPOCH.format(
            task=task + 1, tasks=self._tasks, epoch=epoch + 1, epochs=self._epochs
        )
