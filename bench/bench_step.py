"""One training step of the course's MLP, batch 128, with every method, interleaved.

The steps are those of `clext.train` in its second task, where every term is at work. Methods take
turns, in another order each round, and a method's ratio to the baseline is taken within a round,
so that neither a slow spell of the machine nor a warm cache favours one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch.nn import functional

from clext.core.names import DEFAULT_METHODS
from clext.data.datasets import Split
from clext.methods import Method, make_method
from clext.training.evaluate import autocast
from clext.training.graphs import graphed_or_not
from clext.training.models import mlp
from clext.training.optimizers import TaskOptimizer
from clext.training.settings import Settings
from clext.training.steps import TaskSteps
from speed.timing import DEVICES, ROUNDS, Stopwatch, machine, record

BATCH = 128
# A round is short beside the spells of a busy machine; a GPU needs more steps to be measurable.
STEPS = {"cpu": 5, "cuda": 50}
LR = 1e-4


class Run:
    """A model with its method and optimizer, trained as `clext.train` does, or with other steps."""

    def __init__(
        self, method: str, split: Split, precision: str, kind: type[TaskSteps] | None = None
    ) -> None:
        torch.manual_seed(0)
        model = mlp().to(split.labels.device)
        self.method = make_method(method, model)
        self._examples = len(split.labels)
        self._split, self._precision, self._kind = split, precision, kind
        self._start_task()
        self.epoch()
        self.method.consolidate([tuple(split)])
        self._start_task()

    def _start_task(self) -> None:
        optimizer = task_optimizer(self.method)
        kind = self._kind or graphed_or_not(self.method, optimizer, self._split)
        self.steps = kind(self.method, optimizer, self._split, BATCH, self._precision)

    def epoch(self) -> None:
        order = torch.randperm(self._examples).to(self._split.labels.device)
        self.steps.train_on(order, lambda: None)


def task_optimizer(method: Method) -> TaskOptimizer:
    """The optimizer of a run, at the beginning of a task."""
    parameters = list(method.model.parameters())
    made = TaskOptimizer(Settings(lr=LR), method, parameters, parameters[0].device)
    made.begin(1)
    return made


class PlainRun:
    """The same without clext: torch's fused Adam, every kernel launched by the host."""

    def __init__(self, split: Split, precision: str) -> None:
        torch.manual_seed(0)
        self._split, self._precision = split, precision
        self._model = mlp().to(split.labels.device)
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=LR, fused=True)

    def epoch(self) -> None:
        inputs, labels = self._split
        device = labels.device
        for rows in torch.randperm(len(labels)).to(device).split(BATCH):
            with autocast(device, self._precision):
                loss = functional.cross_entropy(self._model(inputs[rows]), labels[rows])
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()


def random_images(device: str) -> Split:
    """Examples for `STEPS` steps, of the size of MNIST's."""
    examples = STEPS[device] * BATCH
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(examples, 784, generator=generator)
    labels = torch.randint(0, 10, (examples,), generator=generator)
    return Split(inputs.to(device), labels.to(device))


def measure(runs: Mapping[str, Any], device: str, benchmark: Any, rounds: int) -> Stopwatch:
    """An epoch of `STEPS` steps of all `runs`, in turns."""
    watch = Stopwatch(device)
    everyone = watch.round_of({name: run.epoch for name, run in runs.items()})
    benchmark.pedantic(runs["baseline"].epoch, setup=everyone, rounds=ROUNDS or rounds)
    return watch


def entry_of(watch: Stopwatch, names: Iterable[str], precision: str, device: str) -> dict[str, Any]:
    """What is recorded of the contestants, in the order of `names`."""
    medians = {name: watch.medians()[name] / STEPS[device] for name in names}
    return {
        "model": "mlp",
        "batch": BATCH,
        "precision": precision,
        "ms": {name: round(1e3 * median, 3) for name, median in medians.items()},
        "against_baseline": {name: round(watch.ratio(name, "baseline"), 3) for name in medians},
        "machine": machine(device),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step(precision: str, device: str, benchmark: Any, capsys: Any) -> None:
    split = random_images(device)
    runs: dict[str, Run | PlainRun] = {
        "torch": PlainRun(split, precision),
        **{name: Run(name, split, precision) for name in DEFAULT_METHODS},
    }
    watch = measure(runs, device, benchmark, rounds=60)
    entry = entry_of(watch, runs, precision, device)
    record("step", entry)
    with capsys.disabled():
        print(f"\n{precision} {device}, ms a step: {entry['ms']}")
        print(f"against baseline: {entry['against_baseline']}")
