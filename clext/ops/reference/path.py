"""Path integrals.

SI: Zenke et al. 2017, arXiv:1703.04200. RWalk: Chaudhry et al. 2018, arXiv:1801.10112.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from clext.core.lists import (
    Argument,
    TensorList,
    check_fraction,
    check_lists,
    check_scalar,
    state,
)
from clext.ops.reference.arithmetic import maximum, wide


@torch.no_grad()
def accumulate_path_integral_(
    path: TensorList,
    previous: TensorList,
    params: TensorList,
    grads: TensorList,
    anchors: TensorList,
    importances: TensorList,
    strength: float,
    *,
    task_scale: Tensor | None = None,
    pull_scale: Tensor | None = None,
) -> None:
    """Subtract task gradient * step from `path`; `previous` becomes the parameters.

    The penalty's gradient at `previous` is taken out of `grads` first, so that `path` holds the
    decrease of the task loss alone (Zenke et al. 2017, equation 3). `grads` hold task_scale times
    the task's gradient and pull_scale times the penalty's, each 1 unless given (float32 or float64,
    one element). A task_scale of 0 has left nothing to learn from; a parameter that stayed earns
    nothing, whatever its gradient.
    """
    check_scalar("accumulate_path_integral_", "strength", strength)
    check_lists(
        "accumulate_path_integral_",
        Argument("params", params),
        Argument("grads", grads),
        state("path", path, written=True),
        state("previous", previous, written=True),
        state("anchors", anchors),
        state("importances", importances),
    )
    scales = _Scales.read("accumulate_path_integral_", strength, params, task_scale, pull_scale)
    for gain, before, theta, grad, anchor, omega in zip(
        path, previous, params, grads, anchors, importances, strict=True
    ):
        task_grad = scales.task_gradient(grad, before, anchor, omega)
        gain.sub_(path_change(task_grad, wide(theta) - before))
        before.copy_(theta)


@torch.no_grad()
def riemannian_walk_step_(
    path: TensorList,
    previous: TensorList,
    fisher: TensorList,
    params: TensorList,
    grads: TensorList,
    anchors: TensorList,
    importances: TensorList,
    strength: float,
    decay: float,
    *,
    task_scale: Tensor | None = None,
    pull_scale: Tensor | None = None,
) -> None:
    """`accumulate_path_integral_`, and fisher = decay * fisher + (1 - decay) * task gradient^2.

    The gradient of a step that was skipped (not finite, where the parameter stayed) or lost
    (task_scale 0) is not averaged in.
    """
    check_scalar("riemannian_walk_step_", "strength", strength)
    check_fraction("riemannian_walk_step_", "decay", decay)
    check_lists(
        "riemannian_walk_step_",
        Argument("params", params),
        Argument("grads", grads),
        state("path", path, written=True),
        state("previous", previous, written=True),
        state("fisher", fisher, written=True),
        state("anchors", anchors),
        state("importances", importances),
    )
    scales = _Scales.read("riemannian_walk_step_", strength, params, task_scale, pull_scale)
    memory = 1.0 if scales.is_lost else decay
    for gain, before, average, theta, grad, anchor, omega in zip(
        path, previous, fisher, params, grads, anchors, importances, strict=True
    ):
        task_grad = scales.task_gradient(grad, before, anchor, omega)
        movement = wide(theta) - before
        gain.sub_(path_change(task_grad, movement))
        average.copy_(average_square(average, task_grad, movement, memory))
        before.copy_(theta)


@torch.no_grad()
def accumulate_riemannian_walk_score_(
    task_score: TensorList,
    path: TensorList,
    interval_start: TensorList,
    fisher: TensorList,
    params: TensorList,
    eps: float,
) -> None:
    """Close an interval: task_score += max(0, path) / (fisher * step^2 / 2 + eps).

    `step` is the way since `interval_start`; then path = 0 and interval_start = parameters.
    The loss decrease per distance in the KL divergence (Chaudhry et al. 2018, section 4.2).
    """
    check_scalar("accumulate_riemannian_walk_score_", "eps", eps, positive=True)
    check_lists(
        "accumulate_riemannian_walk_score_",
        Argument("params", params),
        state("task_score", task_score, written=True),
        state("path", path, written=True),
        state("interval_start", interval_start, written=True),
        state("fisher", fisher),
    )
    for score, gain, start, average, theta in zip(
        task_score, path, interval_start, fisher, params, strict=True
    ):
        step = wide(theta) - start
        score.add_(gain.clamp(min=0) / (0.5 * average * step.square() + eps))
        gain.zero_()
        start.copy_(theta)


@torch.no_grad()
def consolidate_path_integral_(
    importances: TensorList,
    anchors: TensorList,
    path: TensorList,
    params: TensorList,
    xi: float,
    *,
    clamp_total: bool = False,
) -> None:
    """Add max(0, path) / (step^2 + xi) to importance; anchor = parameter; path = 0.

    `step` is the way since the anchor, the start of the task (Zenke et al. 2017, equation 5). A
    negative path integral would turn the penalty into a reward. With `clamp_total` it may take away
    what tasks before have added: importance = max(0, importance + path / (step^2 + xi)).
    """
    check_scalar("consolidate_path_integral_", "xi", xi, positive=True)
    check_lists(
        "consolidate_path_integral_",
        Argument("params", params),
        state("importances", importances, written=True),
        state("anchors", anchors, written=True),
        state("path", path, written=True),
    )
    for omega, anchor, gain, theta in zip(importances, anchors, path, params, strict=True):
        step = wide(theta) - anchor
        share = (gain if clamp_total else gain.clamp(min=0)) / (step.square() + xi)
        omega.add_(share)
        if clamp_total:
            omega.clamp_(min=0)
        anchor.copy_(theta)
        gain.zero_()


@torch.no_grad()
def consolidate_riemannian_walk_(
    importances: TensorList,
    anchors: TensorList,
    score: TensorList,
    task_score: TensorList,
    fisher: TensorList,
    params: TensorList,
    mix: float,
) -> None:
    """Merge the scores; importance = fisher / max(fisher) + score / max(score).

    `score` becomes (1 - mix) * score + mix * task_score, task_score 0, the anchor the parameter.
    The maxima are taken over all lists; a term whose maximum is 0 is 0, rather than 0 / 0.
    """
    check_fraction("consolidate_riemannian_walk_", "mix", mix)
    check_lists(
        "consolidate_riemannian_walk_",
        Argument("params", params),
        state("importances", importances, written=True),
        state("anchors", anchors, written=True),
        state("score", score, written=True),
        state("task_score", task_score, written=True),
        state("fisher", fisher),
    )
    for mean, new in zip(score, task_score, strict=True):
        mean.mul_(1 - mix).add_(new, alpha=mix)
        new.zero_()
    largest_fisher, largest_score = maximum(fisher), maximum(score)
    for omega, anchor, mean, average, theta in zip(
        importances, anchors, score, fisher, params, strict=True
    ):
        omega.copy_(_normalised(average, largest_fisher) + _normalised(mean, largest_score))
        anchor.copy_(theta)


def path_change(task_grad: Tensor, movement: Tensor) -> Tensor:
    """What a step takes from the path integral: nothing where the parameter stayed.

    A step that a GradScaler has skipped leaves infinite gradients, and infinity * 0 is NaN.
    """
    return torch.where(movement == 0, 0.0, task_grad * movement)


def average_square(average: Tensor, task_grad: Tensor, movement: Tensor, memory: float) -> Tensor:
    """The moving average of the squared gradient, in which that of a skipped step has no part."""
    updated = memory * average + (1 - memory) * task_grad * task_grad
    return torch.where((movement == 0) & ~updated.isfinite(), average, updated)


def check_scale(op: str, name: str, scale: Tensor | None, params: TensorList) -> None:
    """Raise unless `scale` is None or a float tensor of one element, where the parameters are."""
    if scale is None:
        return
    if scale.numel() != 1:
        raise ValueError(f"{op}: {name} has shape {list(scale.shape)}, expected one element")
    if scale.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: {name} has dtype {scale.dtype}, expected float32 or float64")
    if params and scale.device != params[0].device:
        raise ValueError(
            f"{op}: {name} is on {scale.device}, expected {params[0].device} (the device of params)"
        )


@dataclass(frozen=True)
class _Scales:
    """How the gradient of the task loss alone is found in what `.grad` holds."""

    inverse: float
    pull: float
    is_lost: bool

    @classmethod
    def read(
        cls,
        op: str,
        strength: float,
        params: TensorList,
        task_scale: Tensor | None,
        pull_scale: Tensor | None,
    ) -> Self:
        check_scale(op, "task_scale", task_scale, params)
        check_scale(op, "pull_scale", pull_scale, params)
        task = 1.0 if task_scale is None else float(task_scale)
        pull = 1.0 if pull_scale is None else float(pull_scale)
        if task == 0 or math.isinf(task):
            return cls(0.0, 0.0, is_lost=True)
        return cls(1 / task, 2 * strength * pull, is_lost=False)

    def task_gradient(
        self, grad: Tensor, previous: Tensor, anchor: Tensor, omega: Tensor
    ) -> Tensor:
        return self.inverse * (wide(grad) - self.pull * omega * (previous - anchor))


def _normalised(tensor: Tensor, largest: Tensor) -> Tensor:
    return torch.where(largest == 0, 0.0, tensor / largest).to(tensor.dtype)
