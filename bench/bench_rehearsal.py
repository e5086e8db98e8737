"""A training step with a loss on what was learned before, beside the same written by hand.

The course's MLP, batch 128, in the second task of `clext.train`. What a method costs over the
baseline is arithmetic first of all: another loss, another model. So each has a twin in which the
loss is written by hand for this one case (one head, the second task), in the same loop: what the
method costs over its twin is what clext adds. The arithmetic of replay, DER and ER-ACE is that of a
batch of twice the size, that of DER++ of one of three times: they are compared with a baseline that
has one. Turns and ratios are those of `bench_step.py`.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bench_step import BATCH, entry_of, measure, random_images, task_optimizer
from torch import Tensor
from torch.nn import functional

import clext
from clext.methods import make_method
from clext.methods.base import Examples
from clext.optim import Adam
from clext.training.graphs import graphed_or_not
from clext.training.models import mlp
from speed.timing import DEVICES, record

TEMPERATURE = 2.0
BY_HAND = " by hand"
TWICE, THRICE = "baseline, twice the batch", "baseline, three times the batch"
LARGER = {"replay": TWICE, "der": TWICE, "er-ace": TWICE, "derpp": THRICE}
NAMES = ("baseline", "lwf", "dgr", *LARGER)


class Steps:
    """The steps of a method's task, as `clext.train` takes them."""

    def __init__(
        self, method: clext.Method, examples: Examples, precision: str, batch: int = BATCH
    ) -> None:
        self.method, self.examples = method, examples
        optimizer = task_optimizer(method)
        kind = graphed_or_not(method, optimizer, examples)
        self._steps = kind(method, optimizer, examples, batch, precision)

    def epoch(self) -> None:
        order = torch.randperm(len(self.examples[0])).to(self.examples[0].device)
        self._steps.train_on(order, lambda: None)


class LwFByHand(clext.Baseline):
    """LwF's loss in a second task with one head, the old logits at hand."""

    def _loss(self, *batch: Tensor) -> Tensor:
        inputs, labels, old = batch
        logits = self.model(inputs)
        targets = torch.softmax(old / TEMPERATURE, dim=1)
        scores = torch.log_softmax(logits.to(old.dtype) / TEMPERATURE, dim=1)
        distillation = -(targets * scores).sum(dim=1).mean()
        return functional.cross_entropy(logits, labels) + TEMPERATURE**2 * distillation


class DGRByHand(clext.Baseline):
    """DGR's loss and its generator's step in a second task with one head."""

    capturable = False

    def __init__(self, method: clext.DGR) -> None:
        super().__init__(copy.deepcopy(method.model))
        self._teacher = copy.deepcopy(method.model).eval()
        assert method.generator is not None
        self._generator: Any = copy.deepcopy(method.generator)
        self._previous: Any = copy.deepcopy(method.generator).eval()
        self._optimizer = Adam(self._generator.parameters(), lr=method.generator_lr)
        self._random = torch.Generator().manual_seed(0)

    def _loss(self, *batch: Tensor) -> Tensor:
        inputs, labels = batch
        with torch.no_grad():
            replayed = self._previous.sample(len(inputs), self._random)
            classes = self._teacher(replayed).argmax(dim=1)
        losses = [self._generator.loss(x, self._random) for x in (inputs, replayed)]
        (0.5 * losses[0] + 0.5 * losses[1]).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        current = functional.cross_entropy(self.model(inputs), labels)
        return 0.5 * current + 0.5 * functional.cross_entropy(self.model(replayed), classes)


class Launched(clext.Baseline):
    """Plain training whose steps are launched by the host, as those of replay are."""

    capturable = False


def after_one_task(name: str, examples: Examples, precision: str) -> Any:
    torch.manual_seed(0)
    method = make_method(name, mlp().to(examples[0].device))
    method.begin_task(examples)
    Steps(method, examples, precision).epoch()
    method.consolidate([examples])
    return method


def contestants(examples: Examples, precision: str) -> dict[str, Steps]:
    """A method may have a twin of the same name and " by hand"."""
    made = {name: after_one_task(name, examples, precision) for name in NAMES}
    recorded = made["lwf"].begin_task(examples)
    lwf_by_hand = LwFByHand(copy.deepcopy(made["lwf"].model))
    rows = [entry[:BATCH] for entry in recorded]
    torch.testing.assert_close(lwf_by_hand.loss(*rows), made["lwf"].loss(*rows))
    in_each_step = after_one_task("lwf", examples, precision)
    dgr_by_hand = DGRByHand(made["dgr"])
    larger = {}
    for name, k in ((TWICE, 2), (THRICE, 3)):
        launched = Launched(copy.deepcopy(made["replay"].model))
        repeated = tuple(torch.cat([entry] * k) for entry in examples)
        larger[name] = Steps(launched, repeated, precision, k * BATCH)
    return {
        "baseline": Steps(made["baseline"], examples, precision),
        "lwf": Steps(made["lwf"], recorded, precision),
        "lwf" + BY_HAND: Steps(lwf_by_hand, recorded, precision),
        "lwf, teacher run in each step": Steps(in_each_step, examples, precision),
        "dgr": Steps(made["dgr"], examples, precision),
        "dgr" + BY_HAND: Steps(dgr_by_hand, examples, precision),
        **{name: Steps(made[name], examples, precision) for name in LARGER},
        **larger,
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rehearsal(precision: str, device: str, benchmark: Any, capsys: Any) -> None:
    runs = contestants(tuple(random_images(device)), precision)
    watch = measure(runs, device, benchmark, rounds=40)
    by_hand = [name for name in runs if name + BY_HAND in runs]
    entry = {
        **entry_of(watch, runs, precision, device),
        "against_larger": {
            name: round(watch.ratio(name, larger), 3) for name, larger in LARGER.items()
        },
        "against_hand": {name: round(watch.ratio(name, name + BY_HAND), 3) for name in by_hand},
    }
    record("rehearsal", entry)
    with capsys.disabled():
        print(f"\n{precision} {device}, ms a step: {entry['ms']}")
        print(f"against baseline: {entry['against_baseline']}")
        print(f"against the same by hand: {entry['against_hand']}")
        print(f"against a batch as large as theirs: {entry['against_larger']}")
