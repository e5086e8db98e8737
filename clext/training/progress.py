"""What a run says while it works, on stderr: a bar for a person, a line per task in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm.auto import tqdm

from clext.core.console import say, shows_bars

_LONGEST_SILENCE = 60.0  # seconds of a log
_WIDEST_WORDS = len(" loss 00.000 acc 0.000")


class Progress:
    """Progress of one run: `step()` in the loop, `epoch_start` and `epoch_end` around it.

    A terminal or a notebook gets one bar for the whole run, redrawn at most ten times a second, so
    that a step pays well under a microsecond. Anything else (a log, CI) gets a line when a task
    ends, and in a long task one after an epoch once a minute.

    Args:
        label: what runs.
        tasks: number of tasks.
        epochs: of each task.
        show: False for no sign of life.
    """

    def __init__(self, label: str, tasks: int, epochs: int, *, show: bool) -> None:
        self._label, self._tasks, self._epochs = label, tasks, epochs
        self._steps = [0] * tasks  # of an epoch of each
        self._lines = show and not shows_bars()
        self._start = self._said = time.perf_counter()
        self._figures = ""  # of the task at hand
        self._bar = tqdm(
            total=0,
            desc=label,
            # What follows the bar is of one width, so the bar is; all fits 80 columns.
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            file=sys.stderr,
            disable=not show or self._lines,
            dynamic_ncols=True,
            smoothing=0.1,
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

    def task_start(self, task: int, steps: int, done: int = 0) -> None:
        """An epoch of `task` has so many steps, now that it is known what it trains on.

        Until more is known, those of the tasks to come are expected to have as many, and those
        before it had. `done`: steps of the task in an earlier run.
        """
        self._steps[task:] = [steps] * (self._tasks - task)
        self._steps[:task] = [before or steps for before in self._steps[:task]]
        self._bar.total = self._epochs * sum(self._steps)
        self._bar.n = self._bar.initial = self._epochs * sum(self._steps[:task]) + done

    def epoch_start(self, task: int, epoch: int) -> None:
        """Show which task and epoch (both counted from 0) the coming steps belong to."""
        self._figures = self._figures if epoch else ""
        self._show(task, epoch, self._figures)

    def epoch_end(self, task: int, epoch: int, loss: float, accuracy: float) -> None:
        """Show the mean loss of the epoch and the average accuracy over the tasks seen."""
        self._figures = f" loss {loss:.3f} acc {accuracy:.3f}"
        self._show(task, epoch, self._figures)
        now = time.perf_counter()
        due = epoch == self._epochs - 1 or now - self._said > _LONGEST_SILENCE
        if self._lines and due:
            self._said, after = now, f"after {now - self._start:.1f} s"
            figures = f"loss {loss:.4f}, accuracy {accuracy:.4f}"
            say(f"{self._label}: {self._place(task, epoch)}, {figures}, {after}")

    def task_end(self, task: int) -> None:
        """Show that the task is being consolidated, which can take as long as an epoch."""
        self._show(task, self._epochs - 1, " consolidating")

    def _show(self, task: int, epoch: int, words: str) -> None:
        last = len(self._place(self._tasks - 1, self._epochs - 1))
        self._bar.set_postfix_str(f"{self._place(task, epoch):<{last}}{words:<{_WIDEST_WORDS}}")

    def _place(self, task: int, epoch: int) -> str:
        return f"task {task + 1}/{self._tasks} epoch {epoch + 1}/{self._epochs}"
