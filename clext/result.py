"""What a run leaves behind: numbers, settings, a table, a picture and a file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypedDict

import numpy as np

from clext import metrics
from clext.storage import read_json, writable_folder, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE_NAME = "result.json"
PICTURE_NAME = "accuracy.png"

_KIND = "result"
_WIDEST_TABLE = 10


class Step(TypedDict):
    """Accuracies taken within a task: which task and how many of its steps, on tasks 0..task."""

    task: int
    step: int
    accuracy: list[float]


@dataclass(eq=False, repr=False)
class Result:
    """The outcome of `clext.train`. Accuracies are fractions between 0 and 1.

    Attributes:
        accuracy: float64 [T, T]; [k, j] is the accuracy on task j after learning task k, both
            counted from 0. NaN for j > k and for tasks that were not finished.
        curve: average accuracy over the tasks seen so far, one entry per epoch.
        before: float64 [T]; accuracy on each task just before it was learned, NaN where it was not
            begun.
        untrained: float64 [T]; accuracy on each task of the model as it was given.
        steps: accuracies on the tasks seen taken every `evaluate_every` steps, if that was asked.
        config: every setting, the data set really used, seeds, device, threads and versions.
        timings: the seconds spent on "training", "evaluation" and "consolidation".
        stopped: why the run ended early, or None.
    """

    accuracy: metrics.Matrix
    curve: list[float]
    config: dict[str, Any]
    before: metrics.Vector
    untrained: metrics.Vector
    steps: list[Step] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    stopped: str | None = None

    @classmethod
    def empty(cls, tasks: int, config: dict[str, Any]) -> Self:
        """A result in which nothing has been learned yet."""
        unknown = np.full(tasks, np.nan)
        return cls(np.full((tasks, tasks), np.nan), [], config, unknown, unknown.copy())

    @property
    def complete(self) -> bool:
        """Whether all tasks were learned."""
        return metrics.tasks_learned(self.accuracy) == len(self.accuracy)

    @property
    def seconds(self) -> float:
        """Time of the run, without loading the data and saving."""
        return sum(self.timings.values())

    @property
    def average_accuracy(self) -> list[float]:
        """Entry k: mean accuracy over tasks 0..k after learning task k."""
        return metrics.average_accuracy(self.accuracy)

    @property
    def forgetting(self) -> float:
        """Mean drop of the earlier tasks from their best accuracy (Chaudhry et al. 2018)."""
        return metrics.forgetting(self.accuracy)

    @property
    def backward_transfer(self) -> float:
        """Mean change of the earlier tasks since they were learned (Lopez-Paz & Ranzato 2017)."""
        return metrics.backward_transfer(self.accuracy)

    @property
    def label(self) -> str:
        """The method's name, as in pictures and tables."""
        return str(self.config["method"])

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the average accuracy over the tasks seen against the epoch; save it at `path`.

        The suffix of `path` chooses the format (png, pdf, svg). No display is needed.
        """
        from clext.plotting import plot_curves

        return plot_curves({self.label: self}, path)

    def save(self, folder: str | os.PathLike[str], *, picture: bool = True) -> Path:
        """Write `result.json`, and the picture `accuracy.png`, to `folder`; replaces older ones."""
        target = writable_folder(folder, "save")
        write_json(target / FILE_NAME, _KIND, self.to_json())
        if picture:
            self.plot(target / PICTURE_NAME)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a result from its folder or its JSON file; ValueError if it is not a result."""
        file, content = read_json(path, _KIND, FILE_NAME)
        return cls.from_json(content, str(file))

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values; the summary is written for readers and ignored by `load`."""
        return {
            "summary": {
                "average_accuracy": self.average_accuracy,
                "forgetting": self.forgetting,
                "backward_transfer": self.backward_transfer,
                "seconds": self.seconds,
            },
            "stopped": self.stopped,
            "timings": self.timings,
            "accuracy": self.accuracy.tolist(),
            "before": self.before.tolist(),
            "untrained": self.untrained.tolist(),
            "curve": self.curve,
            "steps": self.steps,
            "config": self.config,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any], origin: str) -> Self:
        """The result that `to_json` described; `origin` is named in errors."""
        try:
            accuracy = np.array(content["accuracy"], dtype=np.float64)
            curve = [float(value) for value in content["curve"]]
            result = cls(
                accuracy,
                curve,
                dict(content["config"]),
                np.array(content["before"], dtype=np.float64),
                np.array(content["untrained"], dtype=np.float64),
                list(content["steps"]),
                dict(content["timings"]),
                content["stopped"],
            )
            tasks = int(result.config["tasks"])
            if accuracy.shape != (tasks, tasks):
                raise ValueError(f"accuracy has shape {list(accuracy.shape)}, not {[tasks, tasks]}")
            if not {"method", "epochs"} <= result.config.keys():
                raise ValueError("config lacks the method or the epochs")
        except KeyError as error:
            raise ValueError(f"{origin}: not a complete result: {error} is missing") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{origin}: not a valid result: {error}") from error
        return result

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        lines = [self._headline()]
        if self.average_accuracy:
            lines += ["", *self._table(), "", self._footer()]
        if self.stopped:
            lines += [f"stopped early: {self.stopped}"]
        return "\n".join(lines)

    def _headline(self) -> str:
        config, average = self.config, self.average_accuracy
        data = config.get("data", {}).get("name", config.get("dataset", ""))
        what = f"{self.label} on {config.get('scenario', '')} {data}"
        if config.get("precision", "fp32") != "fp32":
            what += f" in {config['precision']}"
        epochs = f"{config['epochs']} epoch{'s' if config['epochs'] != 1 else ''} each"
        done = f"after {len(average)} of {config['tasks']} tasks, {epochs}"
        value = f"average accuracy {average[-1]:.4f} {done}" if average else "no task finished"
        return f"{what}: {value}"

    def _table(self) -> list[str]:
        tasks = len(self.average_accuracy)
        columns = tasks if tasks <= _WIDEST_TABLE else 0
        names = [f"task {j + 1}" for j in range(columns)]
        rows = [f"{'accuracy on':<14}" + "".join(f"{name:>9}" for name in [*names, "average"])]
        for k, average in enumerate(self.average_accuracy):
            cells = [f"{a:9.4f}" if j <= k else " " * 9 for j, a in enumerate(self.accuracy[k])]
            rows.append(f"{f'after task {k + 1}':<14}{''.join(cells[:columns])}{average:9.4f}")
        return rows

    def _footer(self) -> str:
        parts = [f"{self.seconds:.1f} s"]
        if len(self.average_accuracy) > 1:
            parts = [
                f"forgetting {self.forgetting:.4f}",
                f"backward transfer {self.backward_transfer:+.4f}",
                *parts,
            ]
        if self.timings:
            spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.timings.items())
            parts[-1] += f" ({spent})"
        return ", ".join(parts)
