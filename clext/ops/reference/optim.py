"""Optimizer steps with a method's protection in the same pass, as `clext.optim` takes them.

For each element, with g the gradient of the task's loss, scaled back and signed, and

    d = parameter - anchor,  t = importance * d,  value = strength * t * d,

the step is that of SGD or Adam for the gradient g + 2 * strength * t (+ weight_decay * parameter).
With `proximal` the pull comes after the step instead: for p = 2 * lr * strength * importance,
parameter <- (parameter + p * anchor) / (1 + p), which no strength makes unstable. Then

    path   <- path - g * (the movement of the parameter, as it is stored)           (SI, RWalk)
    fisher <- decay * fisher + (1 - decay) * g^2                                    (RWalk)

With `clip` the step is that for clip * g + 2 * strength * t, while path and fisher still see g.

Which of these a call does is told by the lists that are given: none of them; anchors and
importances; path too; fisher too. Lists that are not used are empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from clext.core.lists import (
    Argument,
    TensorList,
    check_fraction,
    check_lists,
    check_scalar,
    state,
    widest,
)
from clext.ops.reference.arithmetic import total, wide
from clext.ops.reference.path import average_square, path_change


@torch.no_grad()
def sgd_step_(
    params: TensorList,
    grads: TensorList,
    momentum_buffers: TensorList,
    steps: TensorList,
    path: TensorList,
    fisher: TensorList,
    anchors: TensorList,
    importances: TensorList,
    *,
    lr: Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    strength: float = 0.0,
    decay: float = 0.0,
    proximal: bool = False,
    clear_grad: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip: Tensor | None = None,
) -> Tensor:
    """One step of torch.optim.SGD with protection; returns the penalty's value before it (0-dim).

    `steps`: one 0-dim state tensor per parameter, the steps that its momentum buffer has seen;
    like `momentum_buffers` it is empty without momentum. The first gradient enters a buffer whole.
    """
    name = "sgd_step_"
    check_scalar(name, "momentum", momentum)
    check_finite(name, "dampening", dampening)
    check_scalar(name, "weight_decay", weight_decay)
    if momentum == 0 and (len(momentum_buffers) > 0 or len(steps) > 0):
        raise ValueError(
            f"{name}: momentum_buffers has {len(momentum_buffers)} and steps {len(steps)} tensors, "
            "expected none of either since momentum is 0"
        )
    buffers = [state("momentum_buffers", momentum_buffers, written=True), step_counts(steps)]
    step = _Step(name, params, grads, path, fisher, anchors, importances, strength, decay)
    step.check(buffers if momentum else [], clear_grad, lr, grad_scale, found_inf, clip)
    step.prepare(lr, grad_scale, clip, maximize, weight_decay, decoupled=False, proximal=proximal)
    if found_inf is not None and bool(found_inf):
        return step.value()
    firsts = [count == 1 for count in _advance(steps)]

    def update(index: int, base: Tensor, grad: Tensor) -> Tensor:
        if not momentum:
            return base - step.lr * grad
        buffer, first = momentum_buffers[index], firsts[index]
        gain = 1.0 if first else 1 - dampening
        buffer.copy_((0.0 if first else momentum) * buffer + gain * grad)
        return base - step.lr * (grad + momentum * buffer if nesterov else buffer)

    return step.run(update, clear_grad)


@torch.no_grad()
def adam_step_(
    params: TensorList,
    grads: TensorList,
    exp_avgs: TensorList,
    exp_avg_sqs: TensorList,
    steps: TensorList,
    path: TensorList,
    fisher: TensorList,
    anchors: TensorList,
    importances: TensorList,
    *,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
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
    """One step of torch.optim.Adam with protection; returns the penalty's value before it (0-dim).

    `steps`: one 0-dim state tensor per parameter, the steps taken so far; `decoupled`: AdamW.
    """
    name = "adam_step_"
    for label, beta in (("beta1", beta1), ("beta2", beta2)):
        check_beta(name, label, beta)
    check_scalar(name, "eps", eps)
    check_scalar(name, "weight_decay", weight_decay)
    averages = [
        state("exp_avgs", exp_avgs, written=True),
        state("exp_avg_sqs", exp_avg_sqs, written=True),
        step_counts(steps),
    ]
    step = _Step(name, params, grads, path, fisher, anchors, importances, strength, decay)
    step.check(averages, clear_grad, lr, grad_scale, found_inf, clip)
    step.prepare(
        lr, grad_scale, clip, maximize, weight_decay, decoupled=decoupled, proximal=proximal
    )
    if found_inf is not None and bool(found_inf):
        return step.value()
    counts = _advance(steps)

    def update(index: int, base: Tensor, grad: Tensor) -> Tensor:
        mean, square = exp_avgs[index], exp_avg_sqs[index]
        step_size = step.lr / _one_minus_power(beta1, counts[index])
        correction = 1 / math.sqrt(_one_minus_power(beta2, counts[index]))
        mean.copy_(beta1 * mean + (1 - beta1) * grad)
        square.copy_(beta2 * square + (1 - beta2) * grad * grad)
        return base - step_size * mean / (square.sqrt() * correction + eps)

    return step.run(update, clear_grad)


def check_beta(op: str, name: str, value: float) -> None:
    """Raise ValueError unless `value` lies in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{op}: {name} is {value}, expected a number in [0, 1)")


def check_finite(op: str, name: str, value: float) -> None:
    """Raise ValueError for NaN and infinity."""
    if not math.isfinite(value):
        raise ValueError(f"{op}: {name} is {value}, expected a finite number")


def _advance(steps: TensorList) -> list[float]:
    """Count one more step everywhere; the new counts, read in one transfer."""
    for entry in steps:
        entry.add_(1)
    if len(steps) == 0:
        return []
    counts: list[float] = torch.stack([entry.float() for entry in steps]).tolist()
    return counts


def _one_minus_power(beta: float, count: float) -> float:
    return -math.expm1(count * math.log(beta)) if beta > 0 else 1.0


@dataclass
class _Step:
    """What SGD and Adam share: the lists, their checks, and all that surrounds the update."""

    op: str
    params: TensorList
    grads: TensorList
    path: TensorList
    fisher: TensorList
    anchors: TensorList
    importances: TensorList
    strength: float
    decay: float

    lr: float = 0.0
    factor: float = 1.0  # of the gradient
    clip: float = 1.0  # of the gradient, where it moves the parameter
    keep: float = 1.0  # what decoupled weight decay leaves of the parameter
    weight_decay: float = 0.0  # that goes through the gradient
    pull: float = 0.0
    prox: float = 0.0
    proximal: bool = False

    def check(
        self,
        buffers: list[Argument],
        clear_grad: bool,
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        clip: Tensor | None,
    ) -> None:
        check_scalar(self.op, "strength", self.strength)
        check_fraction(self.op, "decay", self.decay)
        self._check_protection()
        protection = [
            state("path", self.path, written=True),
            state("fisher", self.fisher, written=True),
            state("anchors", self.anchors),
            state("importances", self.importances),
        ]
        used = [entry for entry in protection if len(entry.tensors) > 0]
        check_lists(
            self.op,
            Argument("params", self.params, written=True),
            Argument("grads", self.grads, written=clear_grad),
            *buffers,
            *used,
        )
        _check_number(self.op, "lr", lr)
        if clip is not None and clip.numel() != 1:
            raise ValueError(f"{self.op}: clip has shape {list(clip.shape)}, expected one element")
        if clip is not None and clip.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{self.op}: clip has dtype {clip.dtype}, expected float32 or float64")
        if clip is not None and self.params and clip.device != self.params[0].device:
            raise ValueError(
                f"{self.op}: clip is on {clip.device}, expected {self.params[0].device} "
                "(the device of params)"
            )
        for name, scalar in (("grad_scale", grad_scale), ("found_inf", found_inf)):
            if scalar is not None and scalar.numel() != 1:
                raise ValueError(
                    f"{self.op}: {name} has shape {list(scalar.shape)}, expected one element"
                )
            if scalar is not None and scalar.dtype != torch.float32:
                raise TypeError(f"{self.op}: {name} has dtype {scalar.dtype}, expected float32")

    def prepare(
        self,
        lr: Tensor,
        grad_scale: Tensor | None,
        clip: Tensor | None,
        maximize: bool,
        weight_decay: float,
        *,
        decoupled: bool,
        proximal: bool,
    ) -> None:
        """The coefficients of the formulas."""
        self.lr = float(lr)
        self.factor = -1.0 if maximize else 1.0
        if grad_scale is not None:
            self.factor /= float(grad_scale)
        self.clip = 1.0 if clip is None else float(clip)
        self.keep = 1 - self.lr * weight_decay if decoupled else 1.0
        self.weight_decay = 0.0 if decoupled else weight_decay
        self.pull = 0.0 if proximal else 2 * self.strength
        self.prox = 2 * self.lr * self.strength
        self.proximal = proximal

    def run(self, update: Callable[[int, Tensor, Tensor], Tensor], clear_grad: bool) -> Tensor:
        """The step of every tensor; `update(index, base, gradient)` is the optimizer's."""
        terms = []
        for index, (param, gradient) in enumerate(zip(self.params, self.grads, strict=True)):
            theta = wide(param)
            task_grad = self.factor * wide(gradient)
            grad = self.factor * self.clip * wide(gradient)
            if self.anchors:
                anchor, omega = self.anchors[index], self.importances[index]
                difference = theta - anchor
                tension = omega * difference
                terms.append((tension * difference).sum())
                grad = grad + self.pull * tension
            grad = grad + self.weight_decay * theta
            new = update(index, self.keep * theta, grad)
            if self.anchors and self.proximal:
                weight = self.prox * omega
                new = (new + weight * anchor) / (1 + weight)
            stored = new.to(param.dtype)
            movement = wide(stored) - theta
            if self.path:
                self.path[index].sub_(path_change(task_grad, movement))
            if self.fisher:
                average = self.fisher[index]
                average.copy_(average_square(average, task_grad, movement, self.decay))
            param.copy_(stored)
            if clear_grad:
                gradient.zero_()
        return self.value(terms)

    def value(self, terms: TensorList = ()) -> Tensor:
        """The penalty; 0 for a step without protection, or one that was skipped."""
        if terms:
            return self.strength * total(terms)
        device = self.params[0].device if self.params else None
        return torch.zeros((), dtype=widest(self.params), device=device)

    def _check_protection(self) -> None:
        for name, needed in (
            ("anchors", "importances"),
            ("importances", "anchors"),
            ("path", "anchors"),
            ("fisher", "path"),
        ):
            if len(getattr(self, name)) > 0 and len(getattr(self, needed)) == 0:
                missing = "anchors and importances" if name == "path" else needed
                raise ValueError(
                    f"{self.op}: {name} without {missing}, expected none of them, anchors and "
                    "importances, these and path, or these and fisher as well"
                )


def step_counts(steps: TensorList) -> Argument:
    """The list argument of an optimizer's steps."""
    return Argument("steps", steps, state=True, written=True, scalar=True)


def _check_number(op: str, name: str, value: Tensor) -> None:
    """A learning rate: one number, not negative."""
    if value.dim() != 0:
        raise ValueError(f"{op}: {name} has shape {list(value.shape)}, expected a 0-dim tensor")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: {name} has dtype {value.dtype}, expected float32 or float64")
    check_scalar(op, name, float(value))
