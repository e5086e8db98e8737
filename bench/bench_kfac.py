"""Kronecker factors against the arithmetic that they are, CurvLinOps and training; then the pull.

"backward" is a plain forward and backward pass over the same data. The floor of the factors is a
forward pass, a backward pass down to the layers' outputs and the two products a layer, by hand for
models of linear layers alone. The floor of a pull is two products of matrices a layer. Turns and
ratios are those of `bench_step.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import clext
from clext.importance import kronecker_factors
from speed.importance_cases import CASES
from speed.timing import DEVICES, ROUNDS, Stopwatch, machine, record

BATCHES = 32
PULLS = [
    ("784-100-100-10", 1),
    ("784-100-100-10", 5),
    ("784-100-100-10", 20),
    ("mlp", 1),
    ("mlp", 5),
]


def perceptron() -> nn.Sequential:
    """784-100-100-10."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((784, 100, 100, 10)):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "784-100-100-10": (perceptron, (784,), 128),
    "mlp": (CASES["mlp"].model, (784,), 128),
    "cnn": (CASES["cnn"].model, (3, 32, 32), 64),
}


class Problem:
    def __init__(self, name: str, device: str) -> None:
        make, shape, batch = MODELS[name]
        torch.manual_seed(0)
        self.model = make().to(device).eval()
        self.params = list(self.model.parameters())
        x = torch.randn(BATCHES * batch, *shape, device=device)
        y = torch.randint(10, (len(x),), device=device)
        self.batches = list(zip(x.split(batch), y.split(batch), strict=True))

    def plain(self) -> None:
        for x, y in self.batches:
            functional.cross_entropy(self.model(x), y).backward()
            self.model.zero_grad()

    def factors(self) -> dict[int, Any]:
        return kronecker_factors(self.model, self.params, self.batches, kind="empirical")[0]

    def floor(self) -> list[list[Tensor]]:
        """Of linear layers, nothing checked."""
        layers = [layer for layer in self.model if isinstance(layer, nn.Linear)]  # type: ignore[union-attr]
        new = layers[0].weight.new_zeros
        sums = [[new(k, k) for k in layer.weight.shape] for layer in layers]
        for x, y in self.batches:
            inputs, outputs, value = [], [], x
            for layer in self.model:  # type: ignore[union-attr]
                if isinstance(layer, nn.Linear):
                    inputs.append(value.detach())
                    value = layer(value)
                    outputs.append(value)
                else:
                    value = layer(value)
            loss = functional.cross_entropy(value, y, reduction="sum")
            found = torch.autograd.grad(loss, outputs)
            for (by_output, by_input), a, g in zip(sums, inputs, found, strict=True):
                by_input.addmm_(a.T, a)
                by_output.addmm_(g.T, g)
        return sums


def curvlinops(problem: Problem) -> Callable[[], object]:
    """Its factors, compared with ours first."""
    from curvlinops import KFACLinearOperator

    def run() -> Any:
        operator = KFACLinearOperator(
            problem.model,
            nn.CrossEntropyLoss(reduction="mean"),
            problem.params,
            problem.batches,
            fisher_type="empirical",
            check_deterministic=False,
            separate_weight_and_bias=False,
        )
        operator.compute_kronecker_factors()
        return operator

    theirs, ours = run(), problem.factors()
    vector = [torch.randn_like(entry) for entry in problem.params]
    product = theirs @ vector
    for i, factors in ours.items():
        change = torch.cat([vector[i + 1].unsqueeze(1), vector[i].flatten(1)], 1)
        mine = factors.outputs @ change @ factors.inputs
        expected = torch.cat([product[i + 1].unsqueeze(1), product[i].flatten(1)], 1)
        torch.testing.assert_close(
            mine, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
        )
    return run


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", MODELS)
def test_factors(model: str, device: str, benchmark: Any, capsys: Any) -> None:
    problem = Problem(model, device)
    runs: dict[str, Callable[[], object]] = {"backward": problem.plain, "clext": problem.factors}
    if model != "cnn":
        runs["floor"] = problem.floor
    try:
        runs["curvlinops"] = curvlinops(problem)
    except ImportError as error:
        print(f"without curvlinops: {error}")
    watch = Stopwatch(device)
    benchmark.pedantic(problem.factors, setup=watch.round_of(runs), rounds=ROUNDS or 6)
    report(watch, runs, {"model": model, "part": "factors", "tasks": None}, device, capsys)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("model", "tasks"), PULLS)
def test_pull(model: str, tasks: int, device: str, benchmark: Any, capsys: Any) -> None:
    problem = Problem(model, device)
    method = clext.KFAC(problem.model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="clext: kfac saw no step")
        for _ in range(tasks):
            method.consolidate(problem.batches[:1])
    with torch.no_grad():
        for entry in problem.params:
            entry.add_(0.01)
    changes = [torch.randn(f.outputs.shape[1], f.inputs.shape[1]) for f in method.factors.values()]
    pairs = [
        (f.outputs.flatten(0, 1), f.inputs.flatten(0, 1), change.to(device))
        for f, change in zip(method.factors.values(), changes, strict=True)
    ]
    lefts = [outputs.new_empty(len(change), len(inputs)) for outputs, inputs, change in pairs]

    def products() -> None:
        for (outputs, inputs, change), left in zip(pairs, lefts, strict=True):
            torch.mm(outputs, change)
            torch.mm(left, inputs)

    def pull() -> None:
        method.add_penalty_grad_()
        method.update()
        problem.model.zero_grad()

    def loss() -> None:
        method.penalty().backward()
        method.update()
        problem.model.zero_grad()

    runs: dict[str, Callable[[], object]] = {
        "backward": lambda: functional.cross_entropy(
            problem.model(problem.batches[0][0]), problem.batches[0][1]
        ).backward(),
        "clext": pull,
        "floor": products,
        "in the loss": loss,
    }
    watch = Stopwatch(device)
    benchmark.pedantic(pull, setup=watch.round_of(runs), rounds=ROUNDS or 20)
    report(watch, runs, {"model": model, "part": "pull", "tasks": tasks}, device, capsys)


def report(
    watch: Stopwatch,
    runs: dict[str, Callable[[], object]],
    what: dict[str, object],
    device: str,
    capsys: Any,
) -> None:
    entry = {
        **what,
        "ms": {name: round(1e3 * value, 3) for name, value in watch.medians().items()},
        "against_backward": {name: round(watch.ratio(name, "backward"), 3) for name in runs},
        "against_floor": round(watch.ratio("clext", "floor"), 3) if "floor" in runs else None,
        "machine": machine(device),
    }
    record("kfac", entry)
    with capsys.disabled():
        print(f"\n{what}, {device}: ms {entry['ms']}, against backward {entry['against_backward']}")
        print(f"against the floor: {entry['against_floor']}")
