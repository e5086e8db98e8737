"""What a comparison leaves behind: the results of several methods, and what they say together."""

from __future__ import annotations

import math
import os
from collections.abc import ItemsView
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from clext.core.checks import choice, unknown_name
from clext.training import tables
from clext.training.chance import shared_chance
from clext.training.outcome import Outcome, Section, settings_of
from clext.training.result import Result
from clext.training.storage import (
    COMPARISON_NAME,
    PICTURE_NAME,
    read_json,
    writable_folder,
    write_json,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

_KIND = "comparison"
# What the titles of the table mean.
_LEGEND = {
    "accuracy": "mean over the tasks learned, after the last of them",
    "forget": "forgetting: drop from the best accuracy, mean of the earlier tasks",
    "BWT": "backward transfer: change since learned, mean of the earlier tasks",
    "FWT": "forward transfer: accuracy before learning, minus the untrained model's",
    "LA": "learning accuracy: on each task just after learning it",
    "min-ACC": "minimum accuracy: lowest since learned, mean of the earlier tasks",
    "intr.": "intransigence: what joint does better just after learning",
}
_LEFT = ("method", "accuracy")
# What methods are that are not meant to be used, but compared with.
_BOUNDS = {
    "joint": "the upper bound: learns from the data of all tasks so far",
    "baseline": "the lower bound: nothing is done against forgetting",
}


@dataclass(eq=False, repr=False)
class Comparison(Outcome):
    """The results of several methods on the same number of tasks and epochs, by label."""

    results: dict[str, Result]

    def __post_init__(self) -> None:
        sizes = {(r.config["tasks"], r.config["epochs"]) for r in self.results.values()}
        if len(sizes) > 1:
            listed = ", ".join(
                f"{label}: {r.config['tasks']} tasks of {r.config['epochs']} epochs"
                for label, r in self.results.items()
            )
            raise ValueError(
                f"Comparison: expected results with the same tasks and epochs, got {listed}"
            )

    def __getitem__(self, label: str) -> Result:
        if label not in self.results:
            raise unknown_name("result", label, self.results)
        return self.results[label]

    def items(self) -> ItemsView[str, Result]:
        """The label and the result of each method."""
        return self.results.items()

    @property
    def complete(self) -> bool:
        """Whether every method has learned all tasks."""
        return all(result.complete for result in self.results.values())

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw average accuracy against epoch, a line per method; save it at `path` if given."""
        from clext.training.plots import plot_curves

        label, first = next(iter(self.results.items()))
        title = first.title if len(self.results) > 1 else f"{label}: {first.title}"
        curves = {label: result.curve for label, result in self.results.items()}
        tasks, epochs = len(first.accuracy), first.config["epochs"]
        chance = shared_chance(self.results.values())
        return plot_curves(curves, tasks, epochs, title, path, chance=chance)

    @property
    def files(self) -> list[str]:
        """The names of the files that `save` writes."""
        return [COMPARISON_NAME, PICTURE_NAME]

    def section(self) -> Section:
        """Of a page: the table, the picture, what all runs have in common, and each run."""
        rows = self._rows()
        return Section(
            f"{next(iter(self.results.values())).title}: {len(rows)} methods",
            notes=self._notes(rows),
            tables=[rows],
            pictures=[self.plot],
            settings=settings_of([result.config for result in self.results.values()]),
            parts=[replace(result.section(), title=label) for label, result in self.items()],
        )

    def save(self, folder: str | os.PathLike[str], *, picture: bool = True) -> Path:
        """Write `comparison.json`, and the picture `accuracy.png`, to `folder`."""
        target = writable_folder(folder, "save")
        content = {label: result.to_json() for label, result in self.results.items()}
        write_json(target / COMPARISON_NAME, _KIND, {"results": content})
        if picture:
            self.plot(target / PICTURE_NAME)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a comparison from its folder or its JSON file; ValueError if it is not one."""
        file, content = read_json(path, _KIND, COMPARISON_NAME)
        results = content.get("results")
        if not isinstance(results, dict) or not results:
            raise ValueError(f"{file}: not a valid comparison: it holds no results")
        return cls(
            {
                label: Result.from_json(entry, f"{file}, results[{label!r}]")
                for label, entry in results.items()
            }
        )

    def table(self, format: str = "text") -> str:  # noqa: A002
        """Final accuracy, the metrics of `Result` and the time of each method, the best first.

        Intransigence is among them where one of the results is of method "joint". "text" is for a
        terminal and says what was stopped; "markdown" and "latex" (with booktabs) are for papers;
        "csv" has all metrics in full precision and no times.
        """
        choice("Comparison.table", "format", format, [*tables.FORMATS, "csv"])
        if format == "csv":
            return tables.comma_separated(self._records())
        rows = self._rows()
        lines = tables.FORMATS[format](rows, _LEFT)
        if format == "text":
            lines += ["", *self._notes(rows)]
        return "\n".join(lines)

    def to_dataframe(self) -> DataFrame:
        """A row for each method: strength, tasks learned, metrics, why it stopped, seconds.

        Needs pandas (`pip install "clext[tables]"`).
        """
        from pandas import DataFrame

        seconds = [result.seconds for _, result in self._ranked()]
        return DataFrame(self._records()).assign(seconds=seconds)

    def _ranked(self) -> list[tuple[str, Result]]:
        """The best first, the unfinished last."""
        return sorted(
            self.items(),
            key=lambda item: (item[1].complete, item[1].average_accuracy[-1:]),
            reverse=True,
        )

    @property
    def _joint(self) -> Result | None:
        return next((r for r in self.results.values() if r.config["method"] == "joint"), None)

    def _rows(self) -> list[dict[str, str]]:
        return [_cells(label, result, self._joint) for label, result in self._ranked()]

    def _records(self) -> list[dict[str, Any]]:
        joint, records = self._joint, []
        for label, result in self._ranked():
            strength, tasks = result.config.get("strength"), len(result.average_accuracy)
            values = {name: metric(result) for name, metric in tables.METRICS.items()}
            if joint is not None:
                values["intransigence"] = _mean_intransigence(result, joint)
            head = {"method": label, "strength": strength, "tasks": tasks}
            records.append({**head, **values, "stopped": result.stopped})
        return records

    def _notes(self, rows: list[dict[str, str]]) -> list[str]:
        """What was stopped, and a line for each title and bound."""
        meanings = {title: _LEGEND[title] for row in rows[:1] for title in row if title in _LEGEND}
        for result in self.results.values():
            learned, tasks = len(result.average_accuracy), len(result.accuracy)
            if learned < tasks:
                meanings["accuracy"] = (
                    f"{_LEGEND['accuracy']}; ({learned} of {tasks}): tasks learned"
                )
            if result.config.get("incremental") == "class":
                meanings["FWT"] = f"{_LEGEND['FWT']}; none with class-incremental tasks"
        kinds = {label: result.config["method"] for label, result in self._ranked()}
        meanings |= {label: _BOUNDS[kind] for label, kind in kinds.items() if kind in _BOUNDS}
        width = max(map(len, meanings), default=0)
        heads = {f"{title:<{width}}  ": meaning for title, meaning in meanings.items()}
        stops = {f"{label} stopped early: ": result.stopped for label, result in self._ranked()}
        notes = {head: reason for head, reason in stops.items() if reason} | heads
        return [tables.hanging(head, words) for head, words in notes.items()]

    def __str__(self) -> str:
        return self.table()


def _cells(label: str, result: Result, joint: Result | None) -> dict[str, str]:
    """The row of a result: what stands under each title of the table."""
    average, tasks = result.average_accuracy, len(result.accuracy)
    part = "" if result.complete else f" ({len(average)} of {tasks})"
    cells = {
        "method": label,
        "strength": ", ".join(f"{strength:g}" for strength in result.strengths) or "-",
        "accuracy": (f"{average[-1]:.4f}" if average else "-") + part,
        "forget": tables.number(result.forgetting, ".4f"),
        "BWT": tables.number(result.backward_transfer, "+.4f"),
        "FWT": tables.number(result.forward_transfer, "+.4f"),
        "LA": tables.number(result.learning_accuracy, ".4f"),
        "min-ACC": tables.number(result.worst_accuracy, ".4f"),
    }
    if joint is not None:
        cells["intr."] = tables.number(_mean_intransigence(result, joint), "+.4f")
    return {**cells, "time": tables.seconds(result.seconds)}


def _mean_intransigence(result: Result, joint: Result) -> float:
    """NaN if no task was learned by both, or the runs are of other tasks."""
    try:
        missed = result.intransigence(joint)
    except ValueError:
        return math.nan
    missed = missed[np.isfinite(missed)]
    return float(missed.mean()) if len(missed) else math.nan
