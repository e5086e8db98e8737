"""What a sweep leaves behind: results by method, strength and seed, and what they say together."""

from __future__ import annotations

import math
import os
from collections.abc import ItemsView
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from clext.core.checks import choice, unknown_name
from clext.training import tables
from clext.training.chance import shared_chance
from clext.training.metrics import Summary, summary
from clext.training.outcome import Outcome, Section, settings_of
from clext.training.result import Result
from clext.training.shape import check_sweep
from clext.training.storage import (
    PICTURE_NAME,
    RESULT_NAME,
    SWEEP_NAME,
    read_json,
    writable_folder,
    write_json,
)
from clext.training.tables import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

_KIND = "sweep"
_LEFT = ("method", "accuracy", "forgetting")
_LEGEND = {
    "accuracy       ": "mean over the tasks, after the last of them",
    "forgetting     ": "drop from the best accuracy, mean of the earlier tasks",
    "± [low, high]  ": "standard deviation over the seeds, 95 % interval of the mean",
}


class Cell(NamedTuple):
    """A method with a strength, None for its own: what runs of several seeds have in common."""

    method: str
    strength: float | None

    @property
    def label(self) -> str:
        """As in the picture."""
        return self.method if self.strength is None else f"{self.method} ({_short(self.strength)})"

    def __str__(self) -> str:
        return self.method if self.strength is None else f"{self.method}-{_short(self.strength)}"


class Run(NamedTuple):
    """One run of a sweep; `str` is its folder."""

    method: str
    strength: float | None
    seed: int

    @property
    def cell(self) -> Cell:
        """What it has in common with the runs of other seeds."""
        return Cell(self.method, self.strength)

    def __str__(self) -> str:
        return f"{self.cell}/seed-{self.seed}"


@dataclass(eq=False, repr=False)
class Sweep(Outcome):
    """The outcome of `clext.sweep`.

    Attributes:
        runs: (method, strength, seed) of all runs of the plan, in its order; the strength is None
            where none was asked for.
        results: those of the runs that are complete, such as `results["ewc", 100, 0]`.
        failed: for each of the others why it failed, or that it is not finished.
    """

    runs: list[Run]
    results: dict[Run, Result]
    failed: dict[Run, str]

    def __getitem__(self, run: tuple[str, float | None, int]) -> Result:
        if run not in self.results:
            raise unknown_name("result", run, [str(run) for run in self.results])
        return self.results[Run(*run)]

    def items(self) -> ItemsView[Run, Result]:
        """(method, strength, seed) and the result of each run that is complete."""
        return self.results.items()

    @property
    def complete(self) -> bool:
        """Whether every run of the plan is."""
        return not self.failed

    @property
    def cells(self) -> list[Cell]:
        """Each method with each strength, in the order of the plan."""
        return [*dict.fromkeys(run.cell for run in self.runs)]

    def of(self, method: str, strength: float | None = None) -> list[Result]:
        """The results of a method with a strength, a seed each."""
        return [r for run, r in self.results.items() if run.cell == (method, strength)]

    def summary(self, metric: str, method: str, strength: float | None = None) -> Summary:
        """Mean, standard deviation and 95 % confidence interval of a metric over the seeds.

        Metrics are "accuracy" (average, after the last task) and the other summaries of `Result`,
        "forgetting" to "worst_accuracy".
        """
        if metric not in METRICS:
            raise unknown_name("metric", metric, METRICS)
        if (method, strength) not in self.cells:
            known = [f"{cell.method}, {cell.strength}" for cell in self.cells]
            raise unknown_name("method and strength", f"{method}, {strength}", known)
        return summary(METRICS[metric](result) for result in self.of(method, strength))

    def best(self, method: str) -> float | None:
        """The strength of the method's highest mean accuracy, which is that on the test data."""
        means = {
            cell.strength: self.summary("accuracy", *cell).mean
            for cell in self.cells
            if cell.method == method
        }
        if not means:
            raise unknown_name("method of the sweep", method, {run.method for run in self.runs})
        return max(means, key=lambda strength: (math.isfinite(means[strength]), means[strength]))

    def table(self, format: str = "text") -> str:  # noqa: A002
        """A row for each method and strength.

        "text" is for a terminal and says what failed; "markdown" and "latex" (with booktabs) are
        for papers; "csv" has all metrics in full precision and no times, so that it is the same
        for the same results.
        """
        choice("Sweep.table", "format", format, [*tables.FORMATS, "csv"])
        if format == "csv":
            return tables.comma_separated([self._record(cell) for cell in self.cells])
        lines = tables.FORMATS[format]([self._row(cell) for cell in self.cells], _LEFT)
        if format == "text":
            lines += ["", *self._notes()]
        return "\n".join(lines)

    def _notes(self) -> list[str]:
        legend = [tables.hanging(title, meaning) for title, meaning in _LEGEND.items()]
        return [*legend, *(tables.hanging(f"{run}: ", why) for run, why in self.failed.items())]

    def _row(self, cell: Cell) -> dict[str, str]:
        results = self.of(*cell)
        strengths = [cell.strength] if cell.strength is not None else []
        if results:
            strengths = [*results[0].strengths]
        planned = sum(run.cell == cell for run in self.runs)
        part = "" if len(results) == planned else f" of {planned}"
        return {
            "method": cell.method,
            "strength": ", ".join(map(_short, strengths)) or "-",
            "seeds": f"{len(results)}{part}",
            "accuracy": _words(self.summary("accuracy", *cell)),
            "forgetting": _words(self.summary("forgetting", *cell)),
            "time": tables.seconds(fmean(r.seconds for r in results)) if results else "-",
        }

    def _record(self, cell: Cell) -> dict[str, Any]:
        failed = sum(run.cell == cell for run in self.failed)
        values = {
            f"{metric}_{part}": value
            for metric in METRICS
            for part, value in self.summary(metric, *cell)._asdict().items()
        }
        return {**cell._asdict(), "seeds": len(self.of(*cell)), "failed": failed, **values}

    def to_dataframe(self) -> DataFrame:
        """A row for each run: its cell and seed, its metrics, its seconds and why it failed.

        Needs pandas (`pip install "clext[tables]"`).
        """
        from pandas import DataFrame

        rows: list[dict[str, Any]] = []
        for run in self.runs:
            row = {**run._asdict(), "failed": self.failed.get(run)}
            if (result := self.results.get(run)) is not None:
                row |= {name: metric(result) for name, metric in METRICS.items()}
                row["seconds"] = result.seconds
            rows.append(row)
        names = [*Run._fields, *METRICS, "seconds", "failed"]
        return DataFrame(rows, columns=names)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw mean accuracy against epoch, its confidence interval shaded; save it at `path`.

        A line for each method with its best strength; of one method alone one for each strength.
        """
        from clext.training.plots import plot_curves

        if not self.results:
            raise ValueError("Sweep.plot: no run has finished, so there is nothing to draw")
        methods = dict.fromkeys(run.method for run in self.runs)
        chosen = [Cell(method, self.best(method)) for method in methods]
        curves, bands = {}, {}
        for cell in self.cells if len(methods) == 1 else chosen:
            epochs = zip(*(result.curve for result in self.of(*cell)), strict=True)
            drawn = [summary(accuracies) for accuracies in epochs]
            curves[cell.label] = [epoch.mean for epoch in drawn]
            if len(self.of(*cell)) > 1:
                bands[cell.label] = [e.low for e in drawn], [e.high for e in drawn]
        first = next(iter(self.results.values()))
        tasks, epochs_each = len(first.accuracy), first.config["epochs"]
        chance = shared_chance(self.results.values())
        return plot_curves(
            curves, tasks, epochs_each, first.title, path, chance=chance, bands=bands
        )

    def _repr_png_(self) -> bytes | None:
        return super()._repr_png_() if self.results else None

    @property
    def files(self) -> list[str]:
        """The names of the files that `save` writes beside those of the runs."""
        return [SWEEP_NAME, PICTURE_NAME] if self.results else [SWEEP_NAME]

    def section(self) -> Section:
        """Of a page: the table, the picture, and what all runs have in common."""
        results = [*self.results.values()]
        title = results[0].title if results else "no run has finished"
        return Section(
            f"{title}: {len(self.cells)} methods and strengths, {len(self.runs)} runs",
            notes=self._notes(),
            tables=[[self._row(cell) for cell in self.cells]],
            pictures=[self.plot] if results else [],
            settings=settings_of([result.config for result in results]) if results else {},
        )

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `sweep.json`, `result.json` of each run and the picture `accuracy.png`."""
        target = writable_folder(folder, "save")
        for run, result in self.results.items():
            result.save(target / str(run), picture=False)
        self.save_plan(target)
        if self.results:
            self.plot(target / PICTURE_NAME)
        return target

    def save_plan(self, folder: Path) -> None:
        """Write `sweep.json` alone: which runs there are, and what failed."""
        failed = {str(run): problem for run, problem in self.failed.items()}
        write_json(folder / SWEEP_NAME, _KIND, {"runs": self.runs, "failed": failed})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a sweep, also one that is not finished, from its folder or its `sweep.json`."""
        file, content = read_json(path, _KIND, SWEEP_NAME)
        try:
            check_sweep(content)
        except KeyError as error:
            raise ValueError(f"{file}: not a complete sweep: {error} is missing") from error
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{file}: not a valid sweep: {error}") from error
        loaded, problems = (
            cls([Run(*entry) for entry in content["runs"]], {}, {}),
            content["failed"],
        )
        for run in loaded.runs:
            place = file.parent / str(run) / RESULT_NAME
            result = Result.load(place) if place.exists() else None
            if result is not None and result.complete:
                loaded.results[run] = result
            else:
                loaded.failed[run] = problems.get(str(run), "not finished")
        sizes = {
            (len(r.accuracy), r.config["epochs"], len(r.curve)) for r in loaded.results.values()
        }
        if len(sizes) > 1:
            raise ValueError(f"{file}: not a valid sweep: its runs differ in tasks or epochs")
        return loaded

    def __str__(self) -> str:
        return self.table()


def _short(strength: float) -> str:
    """A strength in few digits, but in so many that no other one is written alike."""
    short = f"{strength:g}"
    return short if float(short) == strength else repr(strength)


def _words(summarised: Summary) -> str:
    mean, std, low, high = summarised
    if math.isnan(std):
        return tables.number(mean, ".4f")
    return f"{mean:.4f} ± {std:.4f} [{low:.4f}, {high:.4f}]"
