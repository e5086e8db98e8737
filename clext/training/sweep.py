"""Methods, strengths and seeds: each run once, wherever joblib runs it, and kept in a folder."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import torch
from joblib.parallel import get_active_backend
from torch import nn
from tqdm.auto import tqdm

from clext.core.checks import as_path, integer, listed, number, unknown_name
from clext.core.console import say, shows_bars
from clext.core.names import METHOD_OPTIONS, part_names
from clext.core.seeding import Seeds
from clext.data.scenario import Scenario
from clext.training.loader_steps import check_tasks
from clext.training.machine import resolve_device
from clext.training.result import Result
from clext.training.runs import load_scenario, train_method
from clext.training.settings import NAMES, Settings, check_same_run, shows_settings
from clext.training.spec import MethodSpec, describe, method_specs
from clext.training.storage import claimed_folder, keep
from clext.training.sweep_result import Cell, Run, Sweep

MOST_RUNS = 10_000

Strengths = Iterable[float] | Mapping[str, Iterable[float]]
# A run, and its result or why it failed.
Ended = tuple[Run, Result | None, str]


@shows_settings
def sweep(
    methods: str | Sequence[str | Sequence[str]] | None = None,
    *,
    out: str | os.PathLike[str],
    strengths: Strengths | None = None,
    seeds: Iterable[int] = range(5),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    model: nn.Module | str | None = None,
    n_jobs: int | None = None,
    threads: int | None = None,
    **settings: object,
) -> Sweep:
    """Train every method with every strength and every seed; mean and spread over the seeds.

    A run gives what `clext.train(method, strength=..., seed=..., ...)` gives. Its folder in `out`,
    such as `ewc-100/seed-0`, has its `result.json`. Called again with the same folder, after an
    interruption or for more methods, strengths or seeds, only what is missing there is run. A run
    that fails is reported by a warning and does not stop the others; the next call tries it again.

    joblib runs them: in processes of this machine, or where `joblib.parallel_config` says, such as
    on Ray or Dask. `out` is then a folder that all machines share, if an interrupted sweep is to
    be continued.

    Args:
        methods: as in `clext.compare`.
        out: folder for the runs, `sweep.json` and the picture `accuracy.png`.
        strengths: for all methods that have one, such as `[1, 10, 100]`, or for each method its
            own, such as `{"ewc": [10, 100], "si": [1]}`; by default each method's default.
        seeds: those of `clext.train`, one run for each.
        options: for a method's name its options, as in `clext.compare`.
        model: as in `clext.train`; each run trains a copy of a given one.
        n_jobs: how many runs at once, -1 for one on each core; by default that of an enclosing
            `joblib.parallel_config`, else 1.
        threads: of each run, on which the last bits of its matrix products may depend; by default
            the threads of this process are shared out.
        **settings: all other settings of `clext.train`, from `scenario` to `progress` (a bar over
            the runs, or a line for each where no bar can be shown).

    Returns:
        The results, a table and a picture, see `Sweep`.

    Raises:
        ValueError: an argument is wrong, or `out` has runs of other settings; nothing was done.
        DataError: the data set cannot be had, or its files are damaged.
        OSError: `out` cannot be written; nothing was done.
    """
    if "seed" in settings:
        raise ValueError("sweep: expected seeds, got seed; pass seeds=[...], a run for each")
    taken = Settings.taken_from(settings)
    if settings:
        own = ["out", "strengths", "seeds", "options", "model", "n_jobs", "threads", *NAMES]
        raise unknown_name("option of sweep", next(iter(settings)), own)
    resolve_device(taken.device)
    specs = _cells(method_specs("sweep", methods, model, options or {}), strengths)
    numbers = listed("sweep", "seeds", seeds, MOST_RUNS)
    chosen = [integer("sweep", "seeds", seed, minimum=0) for seed in numbers]
    if len(specs) * len(chosen) > MOST_RUNS:
        raise ValueError(
            f"sweep: expected at most {MOST_RUNS:,} runs, got more, of {len(specs):,} methods and "
            f"strengths and {len(chosen):,} seeds; choose fewer"
        )
    if n_jobs == 0:
        raise ValueError("sweep: n_jobs must be how many runs at once, or -1 for all cores, got 0")
    if threads is None:
        threads = max(1, torch.get_num_threads() // joblib.effective_n_jobs(n_jobs))
    integer("sweep", "threads", threads, minimum=1)
    for spec in specs.values():
        spec.build(Seeds.derive(chosen[0]), taken.own_scenario)  # before any work, as in compare
    folder = as_path(out, "sweep: out").resolve()  # workers may have another working folder
    with claimed_folder(folder, "sweep: out"):
        scenario = load_scenario(taken)
        if taken.own_scenario is None:
            # The same for all runs, wherever they are: none falls back to other data.
            taken = replace(taken, dataset=scenario.data["name"])
        plan = {Run(*cell, seed): spec for cell, spec in specs.items() for seed in chosen}
        there = {run: _finished(folder, run, spec, taken, scenario) for run, spec in plan.items()}
        results = {run: result for run, result in there.items() if result is not None}
        Sweep([*plan], results, {}).save_plan(folder)
    missing = {run: spec for run, spec in plan.items() if run not in results}
    ended = _train_all(missing, taken, folder, n_jobs, threads)
    failed = {}
    for run, result, problem in _shown(ended, len(results), len(plan), show=taken.progress):
        if result is None:
            failed[run] = problem
            warnings.warn(f"sweep: {run} failed: {problem}", stacklevel=2)
        else:
            results[run] = result
    by_plan = {run: results[run] for run in plan if run in results}
    done = Sweep([*plan], by_plan, {run: failed[run] for run in plan if run in failed})
    keep(lambda: done.save(folder))
    return done


def _cells(specs: Mapping[str, MethodSpec], strengths: Strengths | None) -> dict[Cell, MethodSpec]:
    """Each method with each of its strengths; None for the method's own, or where it has none."""
    given = strengths
    if given is None:
        given = {}
    elif not isinstance(given, Mapping):
        everywhere = listed("sweep", "strengths", given, MOST_RUNS)
        has_strength = {
            label: any("strength" in METHOD_OPTIONS[name] for name in part_names(label))
            for label in specs
        }
        given = {label: everywhere for label in specs if has_strength[label]}
    given = {str(label).lower(): own for label, own in given.items()}
    for label in given:
        if label not in specs:
            raise unknown_name("method in strengths", label, specs)
        if specs[label].strength is not None:
            raise ValueError(
                f"sweep: the strength of {label!r} is given in options and in strengths; leave out "
                "one of them"
            )
    cells = {}
    for label, spec in specs.items():
        if label not in given:
            cells[Cell(label, None)] = spec
            continue
        for value in listed("sweep", f"strengths of {label!r}", given[label], MOST_RUNS):
            strength = number("sweep", "strengths", value)
            cells[Cell(label, strength)] = replace(spec, strength=strength)
    return cells


def _finished(
    folder: Path, run: Run, spec: MethodSpec, settings: Settings, scenario: Scenario
) -> Result | None:
    """The result of the run if the folder has it; ValueError if it has one of other settings."""
    try:
        result = Result.load(folder / str(run))
    except (OSError, ValueError):
        return None  # none, or not a whole one
    if not result.complete:
        return None
    planned = {
        **replace(settings, seed=run.seed).describe(),
        **describe(spec.build(Seeds.derive(run.seed), scenario)),
        "data": scenario.data,
    }
    check_same_run("sweep: out", folder / str(run), result.config, planned)
    return result


def _train_all(
    runs: Mapping[Run, MethodSpec],
    settings: Settings,
    folder: Path,
    n_jobs: int | None,
    threads: int,
) -> Iterator[Ended]:
    """Have joblib do the runs; they come as they end."""
    settings = replace(settings, progress=False)
    # Ray's backend gives all results at the end; until then the folders have them.
    as_they_end = get_active_backend()[0].supports_return_generator
    parallel = joblib.Parallel(
        n_jobs=n_jobs,
        batch_size=1,
        return_as="generator_unordered" if as_they_end else "list",
    )
    train = joblib.delayed(_train)
    yield from parallel(
        train(run, spec, replace(settings, seed=run.seed), folder / str(run), threads)
        for run, spec in runs.items()
    )


def _shown(ended: Iterator[Ended], before: int, total: int, *, show: bool) -> Iterator[Ended]:
    """The runs that end, with a bar on a terminal or a line for each in a log."""
    lines = show and not shows_bars()
    if lines and before:
        say(f"sweep: {before} of {total} runs are there already")
    with tqdm(
        desc="sweep",
        total=total,
        initial=before,
        unit="run",
        file=sys.stderr,
        disable=lines or not show,
        dynamic_ncols=True,
    ) as bar:
        for count, (run, result, problem) in enumerate(ended, before + 1):
            bar.update()
            if lines and result is not None:
                accuracy = result.average_accuracy[-1]
                say(f"sweep: {count} of {total} runs, {run}: accuracy {accuracy:.4f}")
            yield run, result, problem


def _train(run: Run, spec: MethodSpec, settings: Settings, folder: Path, threads: int) -> Ended:
    """One run, in whatever process joblib has for it; a sentence if it failed."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        scenario = load_scenario(settings, announce=False)
        own = replace(spec, model=copy.deepcopy(spec.model), options=copy.deepcopy(spec.options))
        method = own.build(Seeds.derive(run.seed), scenario)
        check_tasks(method, scenario, settings)

        def save(result: Result) -> Path:
            return result.save(folder, picture=False)

        result = train_method(method, scenario, settings, save, draws=not spec.makes_model)
    except Exception as error:  # whatever it is, the other runs go on
        return run, None, next(iter(str(error).splitlines()), type(error).__name__)
    finally:
        torch.set_num_threads(before)
    return run, result, ""
