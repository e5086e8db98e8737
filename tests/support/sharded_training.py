"""Two tasks with a method, in the same lines on one process and on many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sharded_models import (
    WAYS,
    Way,
    all_batches,
    make_loader,
    make_network,
    make_steps,
    plain,
    plain_parameters,
)
from torch import Tensor, nn

import clext

TASKS = 2
CLIP = 0.05  # a value, and a norm, that gradients here have more of

# Strengths that make the pull a part of the step, and the step stable.
METHODS: dict[str, tuple[Callable[..., clext.Method], dict[str, Any]]] = {
    "si": (clext.SI, {"strength": 50.0}),
    "rwalk": (clext.RWalk, {"strength": 2.0, "interval": 4}),
    "rwalk released": (clext.RWalk, {"strength": 2.0, "interval": 4, "variant": "released"}),
    "ewc empirical": (clext.EWC, {"strength": 20.0}),
    "ewc exact": (clext.EWC, {"strength": 20.0, "fisher": "exact", "gamma": 0.9}),
    "l2": (clext.L2, {"strength": 0.2}),
    "ewc batch": (clext.EWC, {"strength": 50.0, "fisher": "batch"}),
    "ewc optimizer": (clext.EWC, {"strength": 500.0, "fisher": "optimizer"}),
    "ewc all": (clext.EWC, {"strength": 0.5, "anchors": "all", "weighting": "sum", "gamma": 0.8}),
    "mas": (clext.MAS, {"strength": 3.0}),
    "scp": (clext.SCP, {"strength": 20.0}),
    "scp drawn": (clext.SCP, {"strength": 20.0, "slices": 5}),
}

Step = Callable[[], Tensor]  # an optimizer's step with the method's part; returns the penalty


def _by_hand(model: nn.Module, method: clext.Method) -> tuple[torch.optim.Optimizer, Step]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step() -> Tensor:
        penalty = method.add_penalty_grad_()
        # By value, one by one: torch's norm takes no mixture of sharded and plain parameters.
        torch.nn.utils.clip_grad_value_(model.parameters(), CLIP, foreach=False)
        optimizer.step()
        method.update()
        return penalty

    return optimizer, step


def _in_the_loss(model: nn.Module, method: clext.Method) -> tuple[torch.optim.Optimizer, Step]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def step() -> Tensor:
        penalty = method.penalty()
        if penalty.requires_grad:
            penalty.backward()
        optimizer.step()
        method.update()
        return penalty.detach()

    return optimizer, step


def _attached(model: nn.Module, method: clext.Method) -> tuple[torch.optim.Optimizer, Step]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    handle = method.attach(optimizer)

    def step() -> Tensor:
        optimizer.step()
        return handle.penalty

    return optimizer, step


def _fused(kind: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    def made(model: nn.Module, method: clext.Method) -> tuple[torch.optim.Optimizer, Step]:
        optimizer = kind(model.parameters(), method=method, max_grad_norm=CLIP, **options)

        def step() -> Tensor:
            optimizer.step()
            return optimizer.penalty

        return optimizer, step

    return made


LOOPS: dict[str, Callable[..., tuple[torch.optim.Optimizer, Step]]] = {
    "by hand": _by_hand,
    "in the loss": _in_the_loss,
    "attached": _attached,
    "fused sgd": _fused(clext.optim.SGD, lr=0.2, momentum=0.9, weight_decay=0.01),
    "fused adam": _fused(clext.optim.Adam, lr=0.02),
    "fused adamw": _fused(clext.optim.AdamW, lr=0.02, betas=(0.8, 0.95)),
    "proximal": _fused(clext.optim.SGD, lr=0.2, proximal=True),
}


def train_task(
    way: Way, model: nn.Module, optimizer: torch.optim.Optimizer, step: Step, task: int
) -> list[float]:
    """The penalty before each step, of all processes."""
    penalties = []
    for x, y in make_steps(task, way, dtype=next(model.parameters()).dtype):
        F.cross_entropy(model(x), y).backward()
        penalties.append(float(plain(step())))
        optimizer.zero_grad()
    return penalties


def trained(
    name: str, method_name: str, loop: str, dtype: torch.dtype, shares: int = 1
) -> dict[str, Any]:
    """All that a training comes to, as plain tensors.

    `shares`: in how many a single process takes the examples to measure, one after the other.
    """
    way = WAYS[name]
    model = way.wrap(make_network(dtype))
    kind, options = METHODS[method_name]
    method = kind(model, **options)
    optimizer, step = LOOPS[loop](model, method)
    penalties = []
    for task in range(TASKS):
        penalties += train_task(way, model, optimizer, step, task)
        is_single = way.ranks == 1
        data = all_batches(task, shares, dtype) if is_single else make_loader(task, way, dtype)
        method.consolidate(optimizer if method.takes_optimizer else data)
    return {"penalties": penalties, "parameters": plain_parameters(model), **state_of(method)}


def state_of(method: clext.Method) -> dict[str, dict[str, Tensor]]:
    return {
        "importance": {name: plain(value) for name, value in method.importance.items()},
        "anchor": {name: plain(value) for name, value in method.anchor.items()},
    }


def assert_close(found: dict[str, Any], expected: dict[str, Any], part: float) -> None:
    """Each tensor differs by at most this part of its largest entry."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_close(found[key], value, part)
        else:
            mine, theirs = (torch.as_tensor(v, dtype=torch.float64) for v in (found[key], value))
            size = float(theirs.abs().max())
            torch.testing.assert_close(
                mine, theirs, rtol=0, atol=part * size, msg=lambda m, key=key: f"{key}: {m}"
            )
