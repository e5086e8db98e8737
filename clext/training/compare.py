"""Several methods on the same tasks: one table, one picture, one file."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from torch import nn

from clext.core.checks import unknown_name
from clext.core.names import DEFAULT_METHODS, METHOD_OPTIONS, part_names
from clext.core.seeding import Seeds
from clext.training import tables
from clext.training.loader_steps import check_tasks
from clext.training.loop import NonFiniteLossError
from clext.training.machine import resolve_device
from clext.training.result import Result
from clext.training.settings import NAMES, Settings, shows_settings
from clext.training.spec import MethodSpec
from clext.training.storage import (
    COMPARISON_NAME,
    PICTURE_NAME,
    check_free,
    claimed_folder,
    clear,
    keep,
    read_json,
    writable_folder,
    write_json,
)
from clext.training.train import load_scenario, run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KIND = "comparison"
# What the titles of the table mean.
_LEGEND = {
    "accuracy": "mean over the tasks learned, after the last of them",
    "forgetting": "drop from the best accuracy, mean of the earlier tasks; lower is better",
    "BWT": "backward transfer: change since it was learned, mean of the earlier tasks",
    "FWT": "forward transfer: accuracy before a task was learned, minus the untrained model's",
    "LA": "learning accuracy: on each task just after learning it",
    "min-ACC": "minimum accuracy: lowest since learned, mean of the earlier tasks",
    "intr.": "intransigence: what joint does better just after learning; lower is better",
}
_LEFT = ("method", "accuracy")


@dataclass(eq=False, repr=False)
class Comparison:
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

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw average accuracy against epoch, a line per method; save it at `path` if given."""
        from clext.training.plots import plot_curves

        label, first = next(iter(self.results.items()))
        title = first.title if len(self.results) > 1 else f"{label}: {first.title}"
        curves = {label: result.curve for label, result in self.results.items()}
        return plot_curves(curves, len(first.accuracy), first.config["epochs"], title, path)

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

    def table(self) -> str:
        """Final accuracy, the metrics of `Result` and the time of each method, the best first.

        Intransigence is among them where one of the results is of method "joint".
        """
        joint = next((r for r in self.results.values() if r.config["method"] == "joint"), None)
        ranked = sorted(
            self.results.items(),
            key=lambda item: (item[1].complete, item[1].average_accuracy[-1:]),
            reverse=True,
        )
        rows = [_cells(label, result, joint) for label, result in ranked]
        lines = tables.text(rows, _LEFT)
        for number, (_, result) in enumerate(ranked, 1):
            lines[number] += f"  stopped early: {result.stopped}" if result.stopped else ""
        return "\n".join([*lines, "", *self._legend(rows)])

    def _legend(self, rows: list[dict[str, str]]) -> list[str]:
        """A line for each title that needs one."""
        meanings = {title: _LEGEND[title] for row in rows[:1] for title in row if title in _LEGEND}
        for result in self.results.values():
            learned, tasks = len(result.average_accuracy), len(result.accuracy)
            if learned < tasks:
                meanings["accuracy"] = (
                    f"{_LEGEND['accuracy']}; ({learned} of {tasks}): tasks learned"
                )
            if result.config.get("incremental") == "class":
                meanings["FWT"] = f"{_LEGEND['FWT']}; none with class-incremental tasks"
        return [f"{title:<11} {meaning}" for title, meaning in meanings.items()]

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return self.table()


@shows_settings
def compare(
    methods: str | Sequence[str | Sequence[str]] | None = None,
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    model: nn.Module | str | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    **settings: object,
) -> Comparison:
    """Run several methods on the same tasks, from the same initial weights, in the same order.

    A method whose loss becomes NaN or infinite, or that cannot work on the data of a task, is
    stopped with a warning and keeps what it did; the others go on.

    Args:
        methods: names in `clext.METHODS`, as a list or "ewc, si", or two of them to combine
            ("ewc+replay", or a list of the two in the list); by default the six that only protect:
            baseline, ewc, mas, si, rwalk, scp.
        options: for a method's name its options, such as `{"ewc": {"strength": 100.0}}` or
            `{"ewc+replay": {"replay.strength": 3.0}}`.
        model: as in `clext.train`; each method trains a copy of a given one.
        out: folder for `comparison.json` (also written after each task) and the picture.
        overwrite: remove what another run has left in `out`, which is refused else.
        **settings: all other settings of `clext.train`, from `scenario` to `progress`.

    Returns:
        The result of each method, see `Comparison`.

    Raises:
        ValueError: an argument is wrong; nothing was done.
        DataError: the data set cannot be had, or its files are damaged.
        OSError: `out` cannot be written, or holds another run; nothing was done.
    """
    taken = Settings.taken_from(settings)
    if settings:
        own = ["options", "model", "out", "overwrite", *NAMES]
        raise unknown_name("option of compare", next(iter(settings)), own)
    resolve_device(taken.device)
    seeds = Seeds.derive(taken.seed)
    specs = method_specs("compare", methods, model, {} if options is None else options)
    for spec in specs.values():
        spec.build(seeds, taken.own_scenario)  # before any work: it knows its options
    with claimed_folder(out, "compare: out") as folder:
        if folder is not None:
            check_free(folder, "compare: out", overwrite=overwrite)
        scenario = load_scenario(taken)
        for spec in specs.values():
            check_tasks(spec.build(seeds, scenario), scenario, taken)
    if folder is not None and overwrite:
        clear(folder)
    comparison = Comparison({})
    for label, spec in specs.items():

        def save(result: Result, label: str = label) -> Path | None:
            comparison.results[label] = result
            return None if folder is None else comparison.save(folder, picture=False)

        try:
            # Copied only now, so that no more than one model is held beside the given one; and with
            # it the modules among the options (a generator), which are trained too.
            copied = replace(spec, model=copy.deepcopy(model), options=copy.deepcopy(spec.options))
            method = copied.build(seeds, scenario)
            run(method, scenario, taken, save, draws=not spec.makes_model)
        except (NonFiniteLossError, ValueError) as error:
            if label not in comparison.results:
                raise  # before anything was done
            warnings.warn(str(error), stacklevel=2)
    if folder is not None:
        keep(lambda: comparison.save(folder))
    return comparison


def method_specs(
    owner: str,
    methods: str | Sequence[str | Sequence[str]] | None,
    model: nn.Module | str | None,
    options: Mapping[str, Mapping[str, Any]],
) -> dict[str, MethodSpec]:
    """Each method by its label; ValueError by `owner` for what is none, or options of none."""
    parts = _parts_by_label(owner, methods)
    options = {str(label).lower(): given for label, given in options.items()}
    for label, given in options.items():
        if label not in parts:
            raise unknown_name("method in options", label, parts)
        if not isinstance(given, Mapping):
            raise ValueError(
                f"{owner}: options of {label!r} must be a dict, such as {{'strength': 100.0}}, got "
                f"{given!r}"
            )
    specs = {}
    for label, names in parts.items():
        own = dict(options.get(label, {}))
        specs[label] = MethodSpec(names, model, own.pop("strength", None), own)
    return specs


def _parts_by_label(
    owner: str,
    methods: str | Sequence[str | Sequence[str]] | None,
) -> dict[str, list[str]]:
    """The names in each entry of `methods`; ValueError for what has none."""
    if isinstance(methods, str):
        methods = methods.split(",")
    elif not isinstance(methods, Iterable):
        methods = DEFAULT_METHODS if methods is None else [methods]
    parts: dict[str, list[str]] = {}
    for entry in methods:
        if not isinstance(entry, str | Sequence):
            raise ValueError(
                f"{owner}: methods must be a list of names, such as ['ewc', 'si'], got {entry!r}; "
                "pass the settings of a method in options"
            )
        names = part_names(entry)
        label = entry.strip().lower() if isinstance(entry, str) else "+".join(names)
        if label in parts:
            raise ValueError(f"{owner}: method {label!r} is given twice; name each method once")
        parts[label] = names
    if not parts:
        raise ValueError(
            f"{owner}: expected at least one method, got none; choose from {[*METHOD_OPTIONS]}"
        )
    return parts


def _cells(label: str, result: Result, joint: Result | None) -> dict[str, str]:
    """The row of a result: what stands under each title of the table."""
    average, tasks = result.average_accuracy, len(result.accuracy)
    part = "" if result.complete else f" ({len(average)} of {tasks})"
    cells = {
        "method": label,
        "strength": ", ".join(f"{strength:g}" for strength in result.strengths) or "-",
        "accuracy": (f"{average[-1]:.4f}" if average else "-") + part,
        "forgetting": tables.number(result.forgetting, ".4f"),
        "BWT": tables.number(result.backward_transfer, "+.4f"),
        "FWT": tables.number(result.forward_transfer, "+.4f"),
        "LA": tables.number(result.learning_accuracy, ".4f"),
        "min-ACC": tables.number(result.worst_accuracy, ".4f"),
    }
    if joint is not None:
        cells["intr."] = tables.number(_mean_intransigence(result, joint), "+.4f")
    return {**cells, "time": f"{result.seconds:.1f} s"}


def _mean_intransigence(result: Result, joint: Result) -> float:
    """NaN if no task was learned by both, or the runs are of other tasks."""
    try:
        missed = result.intransigence(joint)
    except ValueError:
        return math.nan
    missed = missed[np.isfinite(missed)]
    return float(missed.mean()) if len(missed) else math.nan
