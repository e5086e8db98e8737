"""Fisher, MAS and SCP importances against other ways to the same numbers, and against training.

The unit is a plain forward and backward pass over the same data: a task's importance should cost
little more than one epoch of training without optimizer. The other ways run on one batch or less,
and their time is scaled up. BackPACK and CurvLinOps take part where they are installed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from clext.core.seeding import generator
from clext.importance import fisher_information, output_sensitivity, sliced_cramer_importance
from speed.importance_cases import CASES, Case
from speed.timing import DEVICES, ROUNDS, Stopwatch, machine, record

ESTIMATES = ["fisher", "mas", "exact fisher"]
LOOPED = 8  # samples of the loop over samples
SLICES = 100
LIBRARIES = {
    **dict.fromkeys(("resnet18", "vit", "convnext"), "timm"),
    **dict.fromkeys(("bert", "gpt2", "llama"), "transformers"),
}
Batches = list[tuple[Tensor, Tensor]]


class Problem:
    """A model in eval mode, batches for it, and what the estimate asks of one sample."""

    def __init__(self, case: Case, estimate: str, device: str) -> None:
        torch.manual_seed(0)
        self.estimate = estimate
        self.model = case.model().to(device).eval()
        self.params = list(self.model.parameters())
        x = case.inputs(case.batch * case.batches).to(device)
        y = torch.randint(10, (len(x),)).to(device)
        self.batches: Batches = list(zip(x.split(case.batch), y.split(case.batch), strict=True))

    def clext(self, batches: Batches) -> list[Tensor]:
        if self.estimate == "mas":
            return output_sensitivity(self.model, self.params, batches)
        kind = "exact" if self.estimate == "exact fisher" else "empirical"
        return fisher_information(self.model, self.params, batches, kind=kind)

    def plain(self) -> None:
        for x, y in self.batches:
            functional.cross_entropy(self.model(x), y).backward()
            self.model.zero_grad()

    def loop(self, batches: Batches) -> list[Tensor]:
        samples = sum(len(x) for x, _ in batches)
        sums = [torch.zeros_like(p) for p in self.params]
        for x, y in batches:
            for n in range(len(x)):
                outputs = self.model(x[n : n + 1])[0]
                for value, weight in self._values(outputs, y[n]):
                    found = torch.autograd.grad(value, self.params, retain_graph=True)
                    for total, g in zip(sums, found, strict=True):
                        total += weight * self._power(g) / samples
        return sums

    def vmap(self, batches: Batches) -> list[Tensor]:
        """torch.func's gradients of single samples; a few at a time, to bound the memory."""
        samples = sum(len(x) for x, _ in batches)
        values = {name: p.detach() for name, p in self.model.named_parameters()}
        sums = [torch.zeros_like(p) for p in self.params]

        def value(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            outputs = torch.func.functional_call(self.model, values, (x.unsqueeze(0),))[0]
            return self._values(outputs, y)[0][0]

        gradients = torch.vmap(torch.func.grad(value), (None, 0, 0))
        for x, y in batches:
            for rows in torch.arange(len(x)).split(32):
                found = gradients(values, x[rows], y[rows])
                for total, g in zip(sums, found.values(), strict=True):
                    total += self._power(g).sum(0) / samples
        return sums

    def _values(self, outputs: Tensor, label: Tensor) -> list[tuple[Tensor, float | Tensor]]:
        """What is differentiated for one sample, and how much each counts."""
        if self.estimate == "mas":
            return [(outputs.square().sum(), 1.0)]
        log_p = outputs.log_softmax(0)
        if self.estimate == "exact fisher":
            return [(entry, entry.detach().exp()) for entry in log_p]
        return [(log_p.gather(0, label.view(1)).squeeze(0), 1.0)]

    def _power(self, g: Tensor) -> Tensor:
        return g.abs() if self.estimate == "mas" else g.square()


def backpack(problem: Problem) -> Callable[[Batches], list[Tensor]]:
    from backpack import backpack as recording
    from backpack import extend
    from backpack.extensions import SumGradSquared

    if not isinstance(problem.model, nn.Sequential) or any(
        type(module).__name__ == "Block" for module in problem.model
    ):
        raise NotImplementedError("no rule for models with a forward of their own")
    loss_function = extend(nn.CrossEntropyLoss(reduction="sum"))

    def run(batches: Batches) -> list[Tensor]:
        model = extend(problem.model)
        samples = sum(len(x) for x, _ in batches)
        sums = [torch.zeros_like(p) for p in problem.params]
        for x, y in batches:
            with recording(SumGradSquared()):
                loss_function(model(x), y).backward()
            for total, p in zip(sums, problem.params, strict=True):
                total += p.sum_grad_squared / samples
                del p.sum_grad_squared
                p.grad = None
        return sums

    return run


def check_against_curvlinops(problem: Problem, expected: list[Tensor]) -> Callable[[], object]:
    """CurvLinOps multiplies by the whole empirical Fisher; its diagonal takes a product an entry.

    Compares a few entries, and returns one product.
    """
    from curvlinops import EFLinearOperator

    operator = EFLinearOperator(
        problem.model,
        nn.CrossEntropyLoss(reduction="mean"),
        problem.params,
        problem.batches[:1],
        check_deterministic=False,
    )
    flat = torch.cat([entry.flatten() for entry in expected])
    for entry in flat.topk(3).indices.tolist():
        unit = torch.zeros_like(flat)
        unit[entry] = 1.0
        torch.testing.assert_close((operator @ unit)[entry], flat[entry], rtol=1e-3, atol=1e-9)
    vector = torch.randn_like(flat)
    return lambda: operator @ vector


def assert_agree(got: list[Tensor], expected: list[Tensor]) -> None:
    rounding = 1e-6 * max(theirs.norm() for theirs in expected)  # all there is of keys' biases
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine - theirs).norm() <= 1e-3 * theirs.norm() + rounding


def is_measured(model: str, estimate: str) -> bool:
    """MAS is as fast as Fisher; the exact Fisher takes one backward pass per class."""
    if estimate == "exact fisher":
        return model == "mlp"
    return estimate != "mas" or CASES[model].batch >= 64


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("model", "estimate"), [pair for pair in product(CASES, ESTIMATES) if is_measured(*pair)]
)
def test_importance(model: str, estimate: str, device: str, benchmark: Any, capsys: Any) -> None:
    case = CASES[model]
    needed = LIBRARIES.get(model)
    if needed is not None:
        pytest.importorskip(needed)
    problem = Problem(case, estimate, device)
    few = [(problem.batches[0][0][:LOOPED], problem.batches[0][1][:LOOPED])]
    one = problem.batches[:1]
    expected = problem.clext(one)
    assert_agree(problem.loop(few), problem.clext(few))
    # By name: what runs, and which share of the data that is.
    runs: dict[str, tuple[Callable[[], object], float]] = {
        "backward": (problem.plain, 1.0),
        "clext": (lambda: problem.clext(problem.batches), 1.0),
        # In which it finds out which rows belong to which sample, and checks each parameter.
        "first batch": (lambda: problem.clext(one), 1 / case.batches),
        "loop": (lambda: problem.loop(few), LOOPED / (case.batch * case.batches)),
    }
    skipped = {}
    if estimate != "exact fisher":
        try:
            assert_agree(problem.vmap(one), expected)
            runs["vmap"] = (lambda: problem.vmap(one), 1 / case.batches)
        except (RuntimeError, ValueError) as error:  # what it cannot batch
            skipped["vmap"] = str(error).partition("\n")[0]
    if estimate == "fisher":
        try:
            packed = backpack(Problem(case, estimate, device))
            assert_agree(packed(one), expected)
            runs["backpack"] = (lambda: packed(one), 1 / case.batches)
        except (ImportError, NotImplementedError) as error:
            skipped["backpack"] = str(error)
        try:
            product = check_against_curvlinops(problem, expected)
            runs["curvlinops product"] = (product, 1 / case.batches)
        except ImportError as error:
            skipped["curvlinops"] = str(error)
    watch = measure(runs, device, benchmark)
    report(watch, runs, {"model": model, "batch": case.batch, "estimate": estimate}, device)
    with capsys.disabled():
        for name, why in skipped.items():
            print(f"\nwithout {name}: {why}")
        print(f"\n{model}, {estimate}, {device}: {summary(watch, runs)}")


@pytest.mark.parametrize("device", DEVICES)
def test_sliced(device: str, benchmark: Any, capsys: Any) -> None:
    """SCP with 100 slices against 100 backward passes a batch."""
    case = CASES["mlp"]
    problem = Problem(case, "scp", device)
    model, params, batches = problem.model, problem.params, problem.batches[:2]
    normal = torch.randn(SLICES, 10, generator=generator(0))
    directions = (normal / normal.norm(dim=1, keepdim=True)).to(device)
    samples = sum(len(x) for x, _ in batches)

    def passes(directions: Tensor) -> list[Tensor]:
        sums = [torch.zeros_like(p) for p in params]
        for direction in directions:
            totals = [torch.zeros_like(p) for p in params]
            for x, _ in batches:
                (model(x) @ direction).sum().backward()
            for total, p in zip(totals, params, strict=True):
                total += p.grad
                p.grad = None
            for entry, total in zip(sums, totals, strict=True):
                entry += (total / samples).square() / SLICES
        return sums

    def sliced() -> list[Tensor]:
        return sliced_cramer_importance(model, params, batches, slices=SLICES)

    assert_agree(sliced(), passes(directions))
    part = directions[:10]
    runs: dict[str, tuple[Callable[[], object], float]] = {
        "backward": (problem.plain, case.batches / len(batches)),
        "clext": (sliced, 1.0),
        "100 backward passes": (lambda: passes(part), len(part) / SLICES),
    }
    watch = measure(runs, device, benchmark)
    report(watch, runs, {"model": "mlp", "batch": case.batch, "estimate": "scp"}, device)
    with capsys.disabled():
        print(f"\nmlp, SCP with {SLICES} slices, {device}: {summary(watch, runs)}")


def measure(
    runs: dict[str, tuple[Callable[[], object], float]], device: str, benchmark: Any
) -> Stopwatch:
    """All `runs` in turns."""
    watch = Stopwatch(device)
    everyone = watch.round_of({name: function for name, (function, _) in runs.items()})
    benchmark.pedantic(runs["clext"][0], setup=everyone, rounds=ROUNDS or 5)
    return watch


def summary(
    watch: Stopwatch, runs: dict[str, tuple[Callable[[], object], float]]
) -> dict[str, dict[str, float]]:
    """Milliseconds for all the data, and times the plain pass."""
    medians = {name: s / runs[name][1] for name, s in watch.medians().items()}
    ratios = {
        name: round(watch.ratio(name, "backward") * runs["backward"][1] / share, 3)
        for name, (_, share) in runs.items()
    }
    if "first batch" in runs:
        first = runs["first batch"][1]
        seconds = (watch.seconds[name] for name in ("clext", "first batch", "backward"))
        later = (
            (every - one) / (1 - first) / plain for every, one, plain in zip(*seconds, strict=True)
        )
        ratios["later batches"] = round(median(later), 3)
    return {
        "ms": {name: round(1e3 * s, 2) for name, s in medians.items()},
        "against_backward": ratios,
    }


def report(
    watch: Stopwatch,
    runs: dict[str, tuple[Callable[[], object], float]],
    head: dict[str, object],
    device: str,
) -> None:
    record("importance", {**head, **summary(watch, runs), "machine": machine(device)})
