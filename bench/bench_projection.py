"""`pytest bench/bench_projection.py -s`: GEM's passes over the gradients of past tasks.

`gradient_gram` and `project_gradient_` against what they replace, and against the time to read the
same bytes once: a sum over them by torch, which is as fast as this machine reads. Equality is
checked first. Times, bytes and ratios within one round go to bench/results/projection.jsonl;
nothing here fails for being slow.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clext import ops
from speed.sizes import MODELS, Shapes, on_devices
from speed.timing import DEVICES, Stopwatch, machine, record

TASKS = (1, 4, 16)
ROUNDS = {"mlp": 15, "resnet18": 9}


class Problem:
    """The gradients of `tasks` past tasks and the current one, as clext keeps them."""

    def __init__(self, shapes: Shapes, tasks: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        elements = sum(int(np.prod(shape)) for shape in shapes)
        # All rows of a list entry lie in one block of memory, as do all entries.
        block = torch.randn(tasks * elements, generator=generator).to(device)
        sizes = [tasks * int(np.prod(shape)) for shape in shapes]
        self.everything = block
        self.rows = [
            part.view(tasks, *shape) for part, shape in zip(block.split(sizes), shapes, strict=True)
        ]
        self.current = torch.randn(elements, generator=generator).to(device)
        parts = self.current.split([size // tasks for size in sizes])
        self.grads = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        self.weights = torch.full((tasks,), 1e-6, dtype=torch.float64, device=device)
        self.zeros = torch.zeros_like(self.weights)
        self.bytes = 4 * (tasks + 1) * elements

    def read(self) -> None:
        """Every byte of the rows and of the gradient, once."""
        self.everything.sum()
        self.current.sum()

    def on_the_host(self) -> np.ndarray:
        """One matrix [tasks + 1, elements] in float64, as GEM's published code builds it."""
        flat = [rows.flatten(1) for rows in self.rows]
        return torch.cat([torch.cat(flat, dim=1), self.current[None]]).double().cpu().numpy()

    def usual_way(self) -> None:
        """To the host, all products, the weights from a small system, and back."""
        matrix = self.on_the_host()
        gram = matrix @ matrix.T
        past, current = matrix[:-1], matrix[-1]
        weights = 1e-9 * np.linalg.solve(gram[:-1, :-1], gram[:-1, -1])
        projected = torch.from_numpy(current - weights @ past)
        self.current.copy_(projected)

    def products_per_parameter(self) -> Tensor:
        """A matrix product for each tensor."""
        terms = []
        for rows, grad in zip(self.rows, self.grads, strict=True):
            both = torch.cat([rows, grad[None]]).flatten(1)
            terms.append(torch.mm(both, both.t()).double())
        return torch.stack(terms).sum(dim=0)

    def projection_per_parameter(self) -> None:
        weights = self.weights.float()
        for rows, grad in zip(self.rows, self.grads, strict=True):
            grad.view(-1).add_(torch.mv(rows.flatten(1).t(), weights))

    def check(self) -> None:
        """The same products and the same projected gradient as the usual tools give."""
        matrix = self.on_the_host()
        exact = torch.from_numpy(matrix @ matrix.T)
        scale = exact.diagonal().sqrt()
        # A matrix product of a million float32 numbers is no more exact than that.
        for gram, tolerance in (
            (ops.gradient_gram(self.rows, self.grads), 1e-6),
            (self.products_per_parameter(), 1e-3),
        ):
            error = (gram.cpu() - exact).abs() / (scale[:, None] * scale)
            assert error.max() < tolerance
        before = self.current.clone()
        ops.project_gradient_(self.grads, self.rows, self.weights)
        want = torch.from_numpy(matrix[-1] + self.weights.cpu().numpy() @ matrix[:-1]).float()
        torch.testing.assert_close(self.current.cpu(), want)
        self.current.copy_(before)
        ops.project_gradient_(self.grads, self.rows, self.zeros)
        assert torch.equal(self.current, before)

    def contestants(self) -> dict[str, Callable[[], object]]:
        return {
            "read": self.read,
            "gram": partial(ops.gradient_gram, self.rows, self.grads),
            "project": partial(ops.project_gradient_, self.grads, self.rows, self.weights),
            "project, no conflict": partial(
                ops.project_gradient_, self.grads, self.rows, self.zeros
            ),
            "mm": self.products_per_parameter,
            "mv": self.projection_per_parameter,
            "host": self.usual_way,
        }


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize(("model", "device"), on_devices(ROUNDS, DEVICES))
def test_projection(model: str, tasks: int, device: str, benchmark: Any, capsys: Any) -> None:
    problem = Problem(MODELS[model](), tasks, device)
    problem.check()
    contestants = problem.contestants()
    watch = Stopwatch(device)

    def a_round() -> None:
        for name, contestant in contestants.items():
            watch.time(name, contestant)

    a_round()
    watch.seconds.clear()
    benchmark.pedantic(contestants["gram"], setup=a_round, rounds=ROUNDS[model])
    entry = {
        "model": model,
        "tasks": tasks,
        "bytes": problem.bytes,
        "ms": {name: round(1e3 * s, 4) for name, s in watch.medians().items()},
        "ratio": {name: round(watch.ratio(name, "read"), 3) for name in contestants},
        "machine": machine(device),
    }
    record("projection", entry)
    with capsys.disabled():
        ratios = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in entry["ratio"].items())  # type: ignore[attr-defined]
        print(
            f"\n{model}, {tasks} tasks, {device}: {problem.bytes / 1e6:.0f} MB, read in "
            f"{entry['ms']['read']:.2f} ms; against that: {ratios}"  # type: ignore[index]
        )
