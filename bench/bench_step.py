"""One training step of the course's MLP, batch 128, with every method, interleaved."""

from __future__ import annotations

from typing import Any

import torch
from timing import Stopwatch, machine, record
from torch.nn import functional

import clext
from clext.methods import Method, make_method
from clext.models import mlp

BATCH = 128
ROUNDS = 40
STEPS = 10


class Run:
    """A model with its optimizer and method, trained as `clext.train` does."""

    def __init__(self, method: str) -> None:
        torch.manual_seed(0)
        self.model = mlp()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4, fused=True)
        self.method: Method = make_method(method, self.model)
        self.x, self.y = torch.rand(BATCH, 784), torch.randint(0, 10, (BATCH,))
        # A second task: importance is there, so that every term is at work.
        self.method.consolidate([(self.x, self.y)])

    def step(self) -> None:
        loss = functional.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        self.method.add_penalty_grad_()
        self.optimizer.step()
        self.method.update()
        self.optimizer.zero_grad()


def test_step(benchmark: Any, capsys: Any) -> None:
    runs = {name: Run(name) for name in clext.METHODS}
    watch = Stopwatch("cpu")

    def all_of_them() -> None:
        for name, run in runs.items():
            watch.time(name, run.step, STEPS)

    benchmark.pedantic(runs["baseline"].step, setup=all_of_them, rounds=ROUNDS)
    medians = watch.medians()
    entry = {
        "model": "mlp",
        "batch": BATCH,
        "ms": {name: round(1e3 * s, 3) for name, s in medians.items()},
        "against_baseline": {n: round(s / medians["baseline"], 3) for n, s in medians.items()},
        "machine": machine("cpu"),
    }
    record("step", entry)
    with capsys.disabled():
        print(f"\nms a step: {entry['ms']}\nagainst baseline: {entry['against_baseline']}")
