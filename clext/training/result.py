"""What a run leaves behind: numbers, settings, a table, pictures and a file."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike

from clext.core.names import TITLES
from clext.training import metrics
from clext.training.outcome import Outcome, Section, settings_of
from clext.training.result_text import accuracy_rows, footer, headline, result_text
from clext.training.shape import check_result
from clext.training.storage import (
    MATRIX_NAME,
    PICTURE_NAME,
    RESULT_NAME,
    TASKS_NAME,
    read_json,
    writable_folder,
    write_json,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn


_KIND = "result"


@dataclass(eq=False, repr=False)
class Result(Outcome):
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
        timings: the seconds spent on "training", "evaluation" and "consolidation", where known.
        stopped: why the run ended early, or None.
        task_curve: accuracies on each of the tasks seen so far, a list per epoch; `curve` has their
            means. Empty in results of older versions.
        chance: entry k is what always giving the most frequent class would give on average over
            tasks 0..k; empty where that is not known.
        model: what was trained, by `clext.train`, in the mode it was given in (made by name: in
            train mode); it is not part of the file.
    """

    accuracy: metrics.Matrix
    curve: list[float]
    config: dict[str, Any]
    before: metrics.Vector
    untrained: metrics.Vector
    steps: list[metrics.Step] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    stopped: str | None = None
    task_curve: list[list[float]] = field(default_factory=list)
    chance: list[float] = field(default_factory=list)
    model: nn.Module | None = None

    @classmethod
    def empty(cls, tasks: int, config: dict[str, Any]) -> Self:
        """A result in which nothing has been learned yet."""
        unknown = np.full(tasks, np.nan)
        return cls(np.full((tasks, tasks), np.nan), [], config, unknown, unknown.copy())

    @classmethod
    def from_accuracy(
        cls,
        accuracy: ArrayLike,
        *,
        method: str = "own loop",
        scenario: str = "own tasks",
        incremental: str = "domain",
    ) -> Self:
        """A result of accuracies that were measured elsewhere, for metrics, table and pictures.

        Args:
            accuracy: [T, T] fractions; [k, j] is the accuracy on task j after learning task k. What
                is above the diagonal does not count; rows of tasks not learned yet are NaN.
            method: as in pictures and tables.
            scenario: as in titles.
            incremental: see `clext.Scenario`.
        """
        matrix = metrics.measured(accuracy)
        config = {"method": method, "scenario": scenario, "incremental": incremental}
        result = cls.empty(len(matrix), {**config, "tasks": len(matrix), "epochs": 1})
        result.accuracy[:] = matrix
        result.curve[:] = result.average_accuracy  # one entry for each task
        return result

    @property
    def complete(self) -> bool:
        """Whether all tasks were learned."""
        return metrics.tasks_learned(self.accuracy) == len(self.accuracy)

    @property
    def seconds(self) -> float:
        """Time of the run, without loading the data and saving the result."""
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
    def forward_transfer(self) -> float:
        """Mean gain on later tasks before they were learned (Lopez-Paz & Ranzato 2017).

        NaN in a class-incremental run: a class that no task has shown cannot be the answer.
        """
        if self.config.get("incremental") == "class":
            return math.nan
        return metrics.forward_transfer(self.before, self.untrained)

    @property
    def learning_accuracy(self) -> float:
        """Mean accuracy on each task just after learning it (Riemer et al. 2019)."""
        return metrics.learning_accuracy(self.accuracy)

    @property
    def worst_accuracy(self) -> float:
        """Minimum accuracy (min-ACC): how low the earlier tasks fell (De Lange et al. 2023).

        The lowest accuracy found on each task since it was learned, mean over all tasks but the
        last; the value just after learning it does not count. Within tasks it is looked for in
        `steps`, which `evaluate_every` fills.
        """
        return metrics.worst_accuracy(self.accuracy, self.steps)

    def intransigence(self, joint: Result) -> metrics.Vector:
        """What a joint run does better on each task just after learning it (Chaudhry et al. 2018).

        Seeds may differ, so that one joint run can serve several: another seed draws other weights
        and permutations, and tasks that are as hard. With one seed for both the chance is less.

        Args:
            joint: the result of method "joint" on the same tasks.

        Returns:
            float64 [T], NaN for tasks that either has not learned; its mean is the intransigence
            of the run.

        Raises:
            ValueError: `joint` is of another method, or of other tasks.
        """
        if "joint" not in joint.label.split("+"):
            raise ValueError(
                f'intransigence: expected a run of "joint", got one of {joint.label!r}'
            )
        for (what, ours), (_, theirs) in zip(self._learned(), joint._learned(), strict=True):
            if theirs != ours:
                raise ValueError(
                    f"intransigence: expected a joint run with {what} {ours!r}, got {what} "
                    f"{theirs!r}; both must have learned the same tasks"
                )
        return metrics.intransigence(self.accuracy, joint.accuracy)

    def _learned(self) -> list[tuple[str, object]]:
        """What a run was about, as far as that is recorded."""
        data = self.config.get("data", {})
        return [
            ("tasks", len(self.accuracy)),
            ("scenario", self.config.get("scenario")),
            ("incremental", self.config.get("incremental", "domain")),
            ("data set", self.data_name),
            ("training examples", data.get("train")),
            ("test examples", data.get("test")),
        ]

    @property
    def label(self) -> str:
        """The method's name, as in pictures and tables."""
        return str(self.config["method"])

    @property
    def strengths(self) -> list[float]:
        """The strength of the method, or of each part of a combination; none without one."""
        options, names = self.config.get("method_options", {}), self.label.split("+")
        parts = [options.get(name, {}) for name in names] if len(names) > 1 else []
        found = [part["strength"] for part in parts if "strength" in part]
        strength = self.config.get("strength")
        return found or ([] if strength is None else [strength])

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the average accuracy over the tasks seen against the epoch; save it at `path`.

        The suffix of `path` chooses the format (png, pdf, svg). No display is needed.
        """
        from clext.training.plots import plot_curves

        curves, title = {self.label: self.curve}, f"{self.label}: {self.title}"
        tasks, epochs = len(self.accuracy), self.config["epochs"]
        return plot_curves(curves, tasks, epochs, title, path, chance=self.chance)

    def plot_tasks(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the accuracy on each task against the epoch, a line per task; save it at `path`.

        Of results that lack `task_curve` only the ends of the tasks are drawn.
        """
        from clext.training.plots import plot_tasks

        tasks, epochs = len(self.accuracy), self.config["epochs"]
        ends = [self.accuracy[k, : k + 1].tolist() for k in range(len(self.average_accuracy))]
        every = 1 if self.task_curve else epochs
        taken = {every * count: row for count, row in enumerate(self.task_curve or ends, 1)}
        title = f"{self.label}: {self.title}"
        return plot_tasks(taken, tasks, epochs, title, path, chance=self.chance)

    def plot_matrix(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the accuracy on each task after each task as a heat map; save it at `path`.

        Up to ten tasks the accuracies are written into the cells.
        """
        from clext.training.heat_map import plot_matrix

        return plot_matrix(self.accuracy, f"{self.label}\n{self.title}", path)

    def _pictures(self) -> dict[str, Callable[..., Figure]]:
        """What draws each picture, by its name; of a single task one alone says all."""
        drawn: dict[str, Callable[..., Figure]] = {PICTURE_NAME: self.plot}
        if len(self.accuracy) > 1:
            drawn |= {TASKS_NAME: self.plot_tasks, MATRIX_NAME: self.plot_matrix}
        return drawn

    @property
    def files(self) -> list[str]:
        """The names of the files that `save` writes."""
        return [RESULT_NAME, *self._pictures()]

    def section(self) -> Section:
        """Of a page: the table, the pictures and all settings."""
        stopped = [f"stopped early: {self.stopped}"] if self.stopped else []
        return Section(
            f"{self.label}: {self.title}",
            notes=[headline(self), *footer(self), *stopped],
            tables=[accuracy_rows(self)] if self.average_accuracy else [],
            pictures=[*self._pictures().values()],
            settings=settings_of([self.config]),
        )

    def save(self, folder: str | os.PathLike[str], *, picture: bool = True) -> Path:
        """Write `result.json` to `folder` and the pictures, in the place of older ones.

        They are `accuracy.png`, and for more than one task `tasks.png` and `matrix.png`.
        """
        target = writable_folder(folder, "save")
        write_json(target / RESULT_NAME, _KIND, self.to_json())
        if picture:
            for name in (TASKS_NAME, MATRIX_NAME):  # those of an older result are not this one's
                (target / name).unlink(missing_ok=True)
            for name, draw in self._pictures().items():
                draw(target / name)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a result from its folder or its JSON file; ValueError if it is not a result."""
        file, content = read_json(path, _KIND, RESULT_NAME)
        return cls.from_json(content, str(file))

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values; the summary is written for readers and ignored by `load`."""
        summary = (
            *("average_accuracy", "forgetting", "backward_transfer", "forward_transfer"),
            *("learning_accuracy", "worst_accuracy", "seconds"),
        )
        return {
            "summary": {name: getattr(self, name) for name in summary},
            "stopped": self.stopped,
            "timings": self.timings,
            "accuracy": self.accuracy.tolist(),
            "before": self.before.tolist(),
            "untrained": self.untrained.tolist(),
            "curve": self.curve,
            "task_curve": self.task_curve,
            "chance": self.chance,
            "steps": self.steps,
            "config": self.config,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any], origin: str) -> Self:
        """The result that `to_json` described; `origin` is named in errors.

        What older versions did not record is NaN, or an empty list.
        """
        try:
            check_result(content)
            tasks = content["config"]["tasks"]
            unknown = [None] * tasks
            return cls(
                metrics.array_of("accuracy", content["accuracy"], (tasks, tasks)),
                content["curve"],
                content["config"],
                metrics.array_of("before", content.get("before", unknown), (tasks,)),
                metrics.array_of("untrained", content.get("untrained", unknown), (tasks,)),
                content.get("steps", []),
                content["timings"],
                content["stopped"],
                content.get("task_curve", []),
                content.get("chance", []),
            )
        except KeyError as error:
            raise ValueError(f"{origin}: not a complete result: {error} is missing") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{origin}: not a valid result: {error}") from error

    def __str__(self) -> str:
        """A headline, the table and the metrics; it fits a terminal, also with many tasks."""
        return result_text(self)

    @property
    def data_name(self) -> str:
        """The data set that was really used; older results know only the one asked for."""
        return str(self.config.get("data", {}).get("name", self.config.get("dataset", "")))

    @property
    def setting(self) -> str:
        """For titles: ", class-incremental", say; nothing for a domain-incremental run."""
        incremental = self.config.get("incremental", "domain")
        return "" if incremental == "domain" else f", {incremental}-incremental"

    @property
    def title(self) -> str:
        """What was learned, such as "Split MNIST, class-incremental"."""
        scenario = str(self.config.get("scenario", ""))
        data = TITLES.get(self.data_name, self.data_name)
        return f"{scenario[:1].upper()}{scenario[1:]} {data}".rstrip() + self.setting
