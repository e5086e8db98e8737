"""Optimizer steps with a method's protection in the same pass, as `clext.optim` takes them.

For each element, with g the gradient of the task's loss, scaled back and signed, and

    d = parameter - anchor,  t = importance * d,  value = strength * t * d,

the step is that of SGD or Adam for the gradient clip * g + 2 * strength * t (+ weight_decay *
parameter). With `proximal` the pull comes after the step instead: for p = 2 * lr * strength *
importance, parameter <- (parameter + p * anchor) / (1 + p), which no strength makes unstable. Then

    path   <- path - g * (the movement of the parameter, as it is stored)           (SI, RWalk)
    fisher <- decay * fisher + (1 - decay) * g^2                                    (RWalk)

Which of these a call does is told by the lists that are given: none of them; anchors and
importances; path too; fisher too. Lists that are not used are empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clext.core.lists import TensorList, widest
from clext.ops.reference.arithmetic import total, wide
from clext.ops.reference.path import average_square, path_change


@torch.no_grad()
def sgd_step_(
    params: TensorList,
    grads: TensorList,
    momentum_buffers: TensorList,
    steps: TensorList,
    *protection: TensorList,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    **options: Any,  # noqa: ANN401
) -> Tensor:
    """One step of torch.optim.SGD with protection; returns the penalty's value before it (0-dim).

    `steps`: one 0-dim state tensor per parameter, the steps that its momentum buffer has seen;
    like `momentum_buffers` it is empty without momentum. The first gradient enters a buffer whole.
    `protection`: path, fisher, anchors, importances; `options`: those of `_step`.
    """

    def update(index: int, base: Tensor, grad: Tensor) -> Tensor:
        if not momentum:
            return base - float(lr) * grad
        buffer, is_first = momentum_buffers[index], steps[index] == 1
        kept, gain = (0.0, 1.0) if is_first else (momentum, 1 - dampening)
        buffer.copy_(kept * buffer + gain * grad)
        return base - float(lr) * (grad + momentum * buffer if nesterov else buffer)

    return _step(update, params, grads, steps, *protection, lr=float(lr), **options)


@torch.no_grad()
def adam_step_(
    params: TensorList,
    grads: TensorList,
    exp_avgs: TensorList,
    exp_avg_sqs: TensorList,
    steps: TensorList,
    *protection: TensorList,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    **options: Any,  # noqa: ANN401
) -> Tensor:
    """One step of torch.optim.Adam with protection; returns the penalty's value before it (0-dim).

    `steps`: one 0-dim state tensor per parameter, the steps taken so far; otherwise as `sgd_step_`.
    """

    def update(index: int, base: Tensor, grad: Tensor) -> Tensor:
        mean, square, count = exp_avgs[index], exp_avg_sqs[index], float(steps[index])
        step_size = float(lr) / _one_minus_power(beta1, count)
        correction = 1 / math.sqrt(_one_minus_power(beta2, count))
        mean.copy_(beta1 * mean + (1 - beta1) * grad)
        square.copy_(beta2 * square + (1 - beta2) * grad * grad)
        return base - step_size * mean / (square.sqrt() * correction + eps)

    return _step(update, params, grads, steps, *protection, lr=float(lr), **options)


def _one_minus_power(beta: float, count: float) -> float:
    return -math.expm1(count * math.log(beta)) if beta > 0 else 1.0


def _step(
    update: Callable[[int, Tensor, Tensor], Tensor],
    params: TensorList,
    grads: TensorList,
    steps: TensorList,
    path: TensorList,
    fisher: TensorList,
    anchors: TensorList,
    importances: TensorList,
    *,
    lr: float,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    strength: float = 0.0,
    decay: float = 0.0,
    proximal: bool = False,
    clear_grad: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip: Tensor | None = None,
) -> Tensor:
    """What SGD and Adam share; `update(index, base, gradient)` is the optimizer's."""
    nothing = torch.zeros((), dtype=widest(params), device=params[0].device if params else None)
    if found_inf is not None and bool(found_inf):
        return nothing
    for count in steps:
        count.add_(1)
    factor = (-1.0 if maximize else 1.0) / (1.0 if grad_scale is None else float(grad_scale))
    clipped = factor * (1.0 if clip is None else float(clip))
    pull = 0.0 if proximal else 2 * strength
    keep, decay_in_grad = (1 - lr * weight_decay, 0.0) if decoupled else (1.0, weight_decay)
    terms = []
    for index, (param, gradient) in enumerate(zip(params, grads, strict=True)):
        theta, task_grad = wide(param), factor * wide(gradient)
        grad = clipped * wide(gradient)
        if anchors:
            anchor, omega = wide(anchors[index]), wide(importances[index])
            tension = omega * (theta - anchor)
            terms.append((tension * (theta - anchor)).sum())
            grad = grad + pull * tension
        new = update(index, keep * theta, grad + decay_in_grad * theta)
        if anchors and proximal:
            weight = 2 * lr * strength * omega
            new = (new + weight * anchor) / (1 + weight)
        stored = new.to(param.dtype)
        movement = wide(stored) - theta
        if path:
            path[index].sub_(path_change(task_grad, movement))
        if fisher:
            average = fisher[index]
            average.copy_(average_square(average, task_grad, movement, decay))
        param.copy_(stored)
        if clear_grad:
            gradient.zero_()
    return strength * total(terms) if terms else nothing
