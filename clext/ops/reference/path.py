"""Path integrals.

SI: Zenke et al. 2017, arXiv:1703.04200. RWalk: Chaudhry et al. 2018, arXiv:1801.10112.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clext.core.lists import TensorList
from clext.ops.reference.arithmetic import maximum, wide


@torch.no_grad()
def accumulate_path_integral_(
    path: TensorList, params: TensorList, starts: TensorList, task_grads: TensorList
) -> None:
    """Subtract task gradient * (parameter - start) from `path`.

    `starts` and `task_grads`: the parameters before the step and the gradient of the task's loss
    alone there, both in the state dtype; `path` is the decrease of that loss (Zenke et al. 2017,
    equation 3). A parameter that stayed earns nothing, whatever its gradient.
    """
    for gain, theta, start, task_grad in zip(path, params, starts, task_grads, strict=True):
        gain.sub_(path_change(task_grad, wide(theta) - start))


@torch.no_grad()
def riemannian_walk_step_(
    path: TensorList,
    fisher: TensorList,
    params: TensorList,
    starts: TensorList,
    task_grads: TensorList,
    decay: float,
) -> None:
    """`accumulate_path_integral_`, and fisher = decay * fisher + (1 - decay) * task gradient^2.

    The gradient of a step that was skipped (not finite, where the parameter stayed) is not
    averaged in.
    """
    for gain, average, theta, start, task_grad in zip(
        path, fisher, params, starts, task_grads, strict=True
    ):
        movement = wide(theta) - start
        gain.sub_(path_change(task_grad, movement))
        average.copy_(average_square(average, task_grad, movement, decay))


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
    for omega, anchor, gain, theta in zip(importances, anchors, path, params, strict=True):
        step = wide(theta) - wide(anchor)
        share = (gain if clamp_total else gain.clamp(min=0)) / (step.square() + xi)
        merged = wide(omega) + share
        omega.copy_(merged.clamp(min=0) if clamp_total else merged)
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
    *,
    largest: Callable[[TensorList], Tensor] = maximum,
) -> None:
    """Merge the scores; importance = fisher / max(fisher) + score / max(score).

    `score` becomes (1 - mix) * score + mix * task_score, task_score 0, the anchor the parameter.
    The maxima are taken over all lists; a term whose maximum is 0 is 0, rather than 0 / 0.
    `largest`: of lists of which this process has a part alone.
    """
    for mean, new in zip(score, task_score, strict=True):
        mean.mul_(1 - mix).add_(new, alpha=mix)
        new.zero_()
    largest_fisher, largest_score = largest(fisher), largest(score)
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


def _normalised(tensor: Tensor, largest: Tensor) -> Tensor:
    return torch.where(largest == 0, 0.0, tensor / largest).to(tensor.dtype)
