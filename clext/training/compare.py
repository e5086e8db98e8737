"""Several methods on the same tasks, or on those of several seeds."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

from torch import nn

from clext.core.checks import unknown_name
from clext.core.seeding import Seeds
from clext.training.comparison import Comparison
from clext.training.loader_steps import check_tasks
from clext.training.loop import NonFiniteLossError
from clext.training.machine import resolve_device
from clext.training.result import Result
from clext.training.runs import load_scenario, train_method
from clext.training.settings import NAMES, Settings, shows_settings
from clext.training.spec import method_specs
from clext.training.storage import check_free, claimed_folder, clear, keep
from clext.training.sweep import sweep
from clext.training.sweep_result import Sweep

Methods = str | Sequence[str | Sequence[str]] | None
Options = Mapping[str, Mapping[str, Any]] | None


@overload
def compare(
    methods: Methods = None,
    *,
    seeds: None = None,
    options: Options = None,
    model: nn.Module | str | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    **settings: object,
) -> Comparison: ...


@overload
def compare(
    methods: Methods = None,
    *,
    seeds: Iterable[int],
    options: Options = None,
    model: nn.Module | str | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    **settings: object,
) -> Sweep: ...


@shows_settings
def compare(
    methods: Methods = None,
    *,
    seeds: Iterable[int] | None = None,
    options: Options = None,
    model: nn.Module | str | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> Comparison | Sweep:
    """Run several methods on the same tasks, from the same initial weights, in the same order.

    With `seeds` that is done for each of them: it is the `clext.sweep` over these seeds, with every
    method at its own strength.

    A method whose loss becomes NaN or infinite, or that cannot work on the data of a task, is
    stopped with a warning and keeps what it did; the others go on.

    Args:
        methods: names in `clext.METHODS`, as a list or "ewc, si", or two of them to combine
            ("ewc+replay", or a list of the two in the list); by default the six that only protect:
            baseline, ewc, mas, si, rwalk, scp.
        seeds: such as `range(3)`, in the place of `seed`; the means and their spread are then told.
        options: for a method's name its options, such as `{"ewc": {"strength": 100.0}}` or
            `{"ewc+replay": {"replay.strength": 3.0}}`.
        model: as in `clext.train`; each method trains a copy of a given one.
        out: folder for `comparison.json` (also written after each task) and the picture; with
            `seeds` for the files of the sweep.
        overwrite: remove what another run has left in `out`, which is refused else; with `seeds`
            what is there is gone on with.
        **settings: all other settings of `clext.train`, from `scenario` to `progress`; with `seeds`
            those of `clext.sweep`, such as `n_jobs`, too.

    Returns:
        The result of each method, see `Comparison`; with `seeds` a `Sweep`.

    Raises:
        ValueError: an argument is wrong; nothing was done.
        DataError: the data set cannot be had, or its files are damaged.
        OSError: `out` cannot be written, or holds another run; nothing was done.
    """
    if seeds is not None:
        given = {**settings, "options": options, "model": model}
        with TemporaryDirectory() as scratch:
            return sweep(methods, seeds=seeds, out=scratch if out is None else out, **given)
    taken = Settings.taken_from(settings)
    if settings:
        own = ["seeds", "options", "model", "out", "overwrite", *NAMES]
        raise unknown_name("option of compare", next(iter(settings)), own)
    resolve_device(taken.device)
    derived = Seeds.derive(taken.seed)
    specs = method_specs("compare", methods, model, {} if options is None else options)
    for spec in specs.values():
        spec.build(derived, taken.own_scenario)  # before any work: it knows its options
    comparison = Comparison({})
    with claimed_folder(out, "compare: out") as folder:
        if folder is not None:
            check_free(folder, "compare: out", overwrite=overwrite)
        scenario = load_scenario(taken)
        for spec in specs.values():
            check_tasks(spec.build(derived, scenario), scenario, taken)
        for label, spec in specs.items():

            def save(result: Result, label: str = label) -> Path | None:
                if folder is not None and overwrite and not comparison.results:
                    clear(folder)
                comparison.results[label] = result
                return None if folder is None else comparison.save(folder, picture=False)

            try:
                # Copied only now, so that no more than one model is held beside the given one; and
                # with it the modules among the options (a generator), which are trained too.
                copied = replace(
                    spec, model=copy.deepcopy(model), options=copy.deepcopy(spec.options)
                )
                method = copied.build(derived, scenario)
                train_method(method, scenario, taken, save, draws=not spec.makes_model)
            except (NonFiniteLossError, ValueError) as error:
                if label not in comparison.results:
                    raise  # before anything was done
                warnings.warn(str(error), stacklevel=2)
        if folder is not None:
            keep(lambda: comparison.save(folder))
    return comparison
