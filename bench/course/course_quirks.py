"""The course's formulas beside the papers', same batches: `python bench/course/course_quirks.py`.

Permuted MNIST as in `clext.train`'s defaults: `clext.train` for the papers' formulas, and for the
classes of `clext.course` the notebook's loop with the same permutations, initial weights and order
of examples. Some runs take one quirk out of a class. Appends a line per run to
bench/results/course.jsonl. `--sizes` instead compares importances after the first task
(course_sizes.jsonl), `--steps` times penalty and update of one training step, of these classes and
of the notebook's own (course_step.jsonl); `python bench/report/report.py` makes tables of these.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import clext
from clext import course
from clext.core.seeding import Seeds, generator, isolated_rng
from clext.data.datasets import Batches, Dataset, Split, load_dataset
from clext.data.scenario import make_scenario
from clext.importance import fisher_information, output_sensitivity, sliced_cramer_importance
from clext.training.evaluate import evaluate, test_batches
from clext.training.machine import resolve_device
from clext.training.models import mlp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/

from speed.timing import Stopwatch, machine, record, rounds_for

TASKS, BATCH, LR = 5, 128, 1e-4


class TaskGradientSI(course.si):
    """The penalty's gradient is taken out of the path, as in `clext.SI`."""

    strength = 1.0

    def update(self, model: nn.Module) -> None:
        anchors, importances = self._quadratic()
        for name, p in model.named_parameters():
            if p.grad is not None:
                key = self._key(name)
                pull = 2 * self.strength * importances[key] * (self.p_old[key] - anchors[key])
                p.grad.sub_(pull)
        super().update(model)  # the loop clears the gradients next


class Run(NamedTuple):
    """`kind` is a class of the notebook's constructor, or None for `clext.train`."""

    method: str
    formula: str
    strength: float
    kind: Callable[..., Any] | None = None
    options: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    last_guard_only: bool = False


PAPER, AT_COURSE_STRENGTH = "paper", "paper, course's strength"
DAMPED, SLICED = {"epsilon": 0.1}, {"L": 100}
RUNS = [
    Run("baseline", "course", 0.0, course.baseline),
    Run("ewc", "course", 100.0, course.ewc),
    Run("mas", "course", 0.1, course.mas),
    Run("si", "course", 1.0, course.si, DAMPED),
    Run("rwalk", "course", 100.0, course.rwalk, DAMPED),
    Run("scp", "course", 100.0, course.scp, SLICED),
    Run("baseline", PAPER, 0.0),
    *(
        Run(m, PAPER, clext.METHODS[m].default_strength)
        for m in ("ewc", "mas", "si", "rwalk", "scp")
    ),
    Run("ewc", "course, guards once", 100.0, course.ewc, {}, last_guard_only=True),
    Run("scp", "course, one slice", 100.0, course.scp, {"L": 1}),
    Run("si", "course, task gradient alone", 1.0, TaskGradientSI, DAMPED),
    Run("rwalk", "course, guards once", 100.0, course.rwalk, DAMPED, last_guard_only=True),
    Run("mas", "course, guards once", 0.1, course.mas, {}, last_guard_only=True),
    Run("scp", "course, guards once", 100.0, course.scp, SLICED, last_guard_only=True),
    Run("ewc", AT_COURSE_STRENGTH, 100.0),
    Run("si", AT_COURSE_STRENGTH, 1.0),
    Run("mas", AT_COURSE_STRENGTH, 0.1),
    Run("rwalk", AT_COURSE_STRENGTH, 100.0),
]

FORMULAS = {run.formula for run in RUNS}


def learn_in_the_notebook(run: Run, data: Dataset, epochs: int, seed: int) -> list[list[float]]:
    """The notebook's loop; the accuracies on the tasks seen, after each task."""
    assert run.kind is not None
    seeds, device = Seeds.derive(seed), resolve_device(None)
    scenario = make_scenario("permuted", data, TASKS, seeds.scenario)
    shuffle = generator(seeds.shuffle)
    with isolated_rng(seeds.model, device):
        model = mlp(data.features, scenario.num_outputs).to(device)
    scenario = scenario.to(device, torch.float32)
    np.random.seed(seeds.method)  # noqa: NPY002  (scp draws from it)
    guard = run.kind(model=model, dataloader=None, device=device, **run.options)
    guards: list[Any] = []
    accuracies = []
    for k, task in enumerate(scenario.tasks):
        split = task.train()
        train_task(model, split, guard, run.strength, epochs, shuffle)
        accuracies.append(evaluated(model, scenario.tasks[: k + 1]))
        more = {}
        if run.method not in ("baseline", "si"):
            guards.append(guard._precision_matrices)
            more = {"prev_guards": guards[-1:] if run.last_guard_only else guards}
        guard = run.kind(
            model=model, dataloader=Batches(split, BATCH), device=device, **run.options, **more
        )
    return accuracies


def train_task(
    model: nn.Module,
    split: Split,
    guard: Any,
    strength: float,
    epochs: int,
    shuffle: torch.Generator,
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    model.train()
    model.zero_grad()
    for _ in range(epochs):
        order = torch.randperm(len(split.labels), generator=shuffle).to(split.labels.device)
        for rows in order.split(BATCH):
            loss = F.cross_entropy(model(split.inputs[rows]), split.labels[rows])
            loss += strength * guard.penalty(model)
            guard.update(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def evaluated(model: nn.Module, tasks: Any) -> list[float]:
    method = clext.Baseline(model)
    return [evaluate(method, test_batches(task, method)) for task in tasks]


def learn_as_in_the_paper(run: Run, epochs: int, seed: int) -> list[list[float]]:
    result = clext.train(
        run.method,
        dataset="mnist",
        tasks=TASKS,
        epochs=epochs,
        strength=run.strength,
        seed=seed,
        progress=False,
        **run.options,
    )
    return [list(row[: k + 1]) for k, row in enumerate(result.accuracy)]


def measure(run: Run, epochs: int, seed: int) -> None:
    if run.kind is None:
        accuracies = learn_as_in_the_paper(run, epochs, seed)
    else:
        data = load_dataset("mnist", None, show=False)
        accuracies = learn_in_the_notebook(run, data, epochs, seed)
    record(
        "course",
        {
            "method": run.method,
            "formula": run.formula,
            "strength": run.strength,
            "options": run.options,
            "tasks": TASKS,
            "epochs": epochs,
            "seed": seed,
            "average_accuracy": [round(fmean(row), 5) for row in accuracies],
            "final_accuracy": [round(float(a), 5) for a in accuracies[-1]],
            "machine": machine(resolve_device(None).type),
        },
    )
    line = f"{run.method}, {run.formula}, {run.strength:g}: {fmean(accuracies[-1]):.4f}"
    print(line, flush=True)


def measure_sizes(epochs: int, seed: int) -> None:
    """How large importances are by either formula, on the same model at the end of a task."""
    seeds, device = Seeds.derive(seed), resolve_device(None)
    model, split = first_task(epochs, seeds, device)
    params, batches = list(model.parameters()), Batches(split, BATCH)
    np.random.seed(seeds.method)  # noqa: NPY002  (scp draws from it)
    pairs = {
        "ewc": (course.ewc(model, batches, device), fisher_information(model, params, batches)),
        "mas": (course.mas(model, batches, device), output_sensitivity(model, params, batches)),
        "scp": (
            course.scp(model, batches, SLICED["L"], device),
            sliced_cramer_importance(model, params, batches),
        ),
    }
    for method, (guard, paper) in pairs.items():
        sums = [
            sum(float(e.sum()) for e in found)
            for found in (guard._precision_matrices.values(), paper)
        ]
        mean = dict(
            zip(
                ("course", "paper"), (s / sum(p.numel() for p in params) for s in sums), strict=True
            )
        )
        entry = {"method": method, "epochs": epochs, "seed": seed, "mean": mean}
        record("course_sizes", {**entry, "machine": machine(device.type)})
        print(f"{method}: course {mean['course']:.3g}, paper {mean['paper']:.3g}", flush=True)


def first_task(epochs: int, seeds: Seeds, device: torch.device) -> tuple[nn.Module, Split]:
    """The model after the first task, as every run above has it, and the task's data."""
    data = load_dataset("mnist", None, show=False)
    scenario = make_scenario("permuted", data, TASKS, seeds.scenario)
    with isolated_rng(seeds.model, device):
        model = mlp(data.features, scenario.num_outputs).to(device)
    split = scenario.to(device, torch.float32).tasks[0].train()
    train_task(
        model, split, course.baseline(model, None, device), 0.0, epochs, generator(seeds.shuffle)
    )
    return model, split


def time_steps() -> None:
    """Penalty, its gradient and the update in a later task, without the model's own work."""
    sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "support"))
    import notebook_methods as notebook

    pairs = {
        "ewc": (notebook.EWC, course.ewc, {}),
        "mas": (notebook.MAS, course.mas, {}),
        "si": (notebook.SI, course.si, DAMPED),
        "rwalk": (notebook.RWalk, course.rwalk, DAMPED),
        "scp": (notebook.SCP, course.scp, SLICED),
    }
    device = resolve_device(None)
    watch = Stopwatch(device.type)
    works = {
        (method, name): one_step(kind, options, device)
        for method, (literal, fused, options) in pairs.items()
        for name, kind in (("notebook", literal), ("clext", fused))
    }
    for _ in range(rounds_for(1.5e6, device.type)):
        for (method, name), work in works.items():
            watch.time(f"{method} {name}", work, calls=3)
    for method in pairs:
        ms = {name: 1e3 * watch.medians()[f"{method} {name}"] for name in ("notebook", "clext")}
        ratio = watch.ratio(f"{method} notebook", f"{method} clext")
        entry = {"method": method, "ms": ms, "ratio": ratio, "machine": machine(device.type)}
        record("course_step", entry)
        print(f"{method}: notebook {ms['notebook']:.2f} ms, clext {ms['clext']:.2f} ms", flush=True)


def one_step(kind: Any, options: dict[str, Any], device: torch.device) -> Callable[[], object]:
    """A function that does what the class does in one step of the second task."""
    torch.manual_seed(0)
    model = mlp().to(device)
    loader = [(torch.rand(BATCH, 784), torch.randint(10, (BATCH,)))]
    guard = kind(model=model, dataloader=None, device=device, **options)
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    guard.update(model)
    guard = kind(model=model, dataloader=loader, device=device, **options)

    def work() -> None:
        penalty = guard.penalty(model)
        guard.update(model)
        model.zero_grad()
        penalty.backward()

    return work


@click.command(help=__doc__)
@click.argument("methods", nargs=-1, type=click.Choice(sorted({run.method for run in RUNS})))
@click.option("--formula", "formulas", multiple=True, type=click.Choice(sorted(FORMULAS)))
@click.option("--epochs", default=10, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--sizes", is_flag=True, help="Compare importances instead.")
@click.option("--steps", is_flag=True, help="Time a step instead.")
def main(
    methods: tuple[str, ...],
    formulas: tuple[str, ...],
    epochs: int,
    seed: int,
    sizes: bool,
    steps: bool,
) -> None:
    if steps:
        time_steps()
    elif sizes:
        measure_sizes(epochs, seed)
    else:
        for run in RUNS:
            if run.method in (methods or [run.method]) and run.formula in (formulas or FORMULAS):
                measure(run, epochs, seed)


if __name__ == "__main__":
    main()
