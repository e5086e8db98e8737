"""ParameterPlan in plain torch, for devices without kernels: same interface, meaning and errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from clext.core.lists import Argument, TensorList, check_lists
from clext.core.lists import state as state_list
from clext.ops._extension import C, build_info
from clext.ops.reference.importance import consolidate_all_anchors_, consolidate_importance_
from clext.ops.reference.optim import adam_step_, sgd_step_, step_counts
from clext.ops.reference.path import (
    accumulate_path_integral_,
    accumulate_riemannian_walk_score_,
    consolidate_path_integral_,
    consolidate_riemannian_walk_,
    riemannian_walk_step_,
)
from clext.ops.reference.penalty import add_quadratic_penalty_grad_, quadratic_penalty

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


# As the ops of optimizer steps order these lists.
_PROTECTION = ("path", "fisher", "anchor", "importance")
# What a pull keeps of the step: the parameters and the task's gradient.
_KEPT = ("step_start", "task_gradient")


class ReferencePlan:
    """Parameters and a method's state, checked once; gradients are read at each call.

    `state`: lists as long as `params`, each entry laid out like its parameter and in the state
    dtype; keys among "anchor", "importance", "path", "task_gradient", "step_start", "fisher",
    "task_score", "score", "interval_start", "momentum_buffer", "exp_avg", "exp_avg_sq".
    `steps`: one 0-dim state tensor per parameter for the steps of an optimizer, or none.
    """

    def __init__(
        self,
        names: Sequence[str],
        params: TensorList,
        state: Mapping[str, TensorList],
        steps: TensorList = (),
    ) -> None:
        if len(params) == 0:
            raise ValueError("ParameterPlan: params is empty, expected at least one tensor")
        if len(names) != len(params):
            raise ValueError(
                f"ParameterPlan: names has {len(names)} entries, expected {len(params)} "
                "(as many as params)"
            )
        self._names = list(names)
        self._params = list(params)
        self._state = {key: list(tensors) for key, tensors in state.items()}
        lists = [state_list(key, entries, written=True) for key, entries in self._state.items()]
        layout = Argument("params", self._params)
        if len(steps) > 0:
            lists.append(step_counts(steps))
        check_lists("ParameterPlan", layout, *lists, parameter_names=self._names)
        self._guard = tuple(key for key in _PROTECTION if key in self._state)
        self._steps = list(steps)
        self._kept: list[int] | None = None  # the parameters that the last pull was added to

    def quadratic_penalty(self) -> Tensor:
        """The penalty's value without strength, without autograd (0-dim)."""
        anchors, importances = self._lists("quadratic_penalty", "anchor", "importance")
        with torch.no_grad():
            return quadratic_penalty(self._params, anchors, importances)

    def add_quadratic_penalty_grad_(self, strength: float) -> Tensor:
        """Add the gradient of strength * penalty to every `.grad`; returns the value (0-dim).

        A missing `.grad` is made; frozen parameters without one are left out. A state with the
        lists "task_gradient" and "step_start" keeps there the gradients before the pull and the
        parameters.
        """
        op = "add_quadratic_penalty_grad_"
        params, grads, (anchors, importances) = self._active(
            op, "anchor", "importance", written=True
        )
        before = [grad.clone() for grad in grads]
        value = add_quadratic_penalty_grad_(grads, params, anchors, importances, strength)
        if "task_gradient" in self._state:
            self._kept = [i for i, p in enumerate(self._params) if any(p is q for q in params)]
            _, (starts, task_grads) = self._kept_lists(op, *_KEPT)
            for theta, grad, start, task_grad in zip(
                params, before, starts, task_grads, strict=True
            ):
                start.copy_(theta.detach())
                task_grad.copy_(grad)
        for parameter, grad in zip(params, grads, strict=True):
            parameter.grad = grad
        return value

    def accumulate_path_integral_(self) -> None:
        """One step of SI, of the parameters that the last pull was added to."""
        params, (path, starts, task_grads) = self._kept_lists(
            "accumulate_path_integral_", "path", *_KEPT
        )
        accumulate_path_integral_(path, params, starts, task_grads)

    def riemannian_walk_step_(self, decay: float) -> None:
        """One step of RWalk, of the parameters that the last pull was added to."""
        params, (path, fisher, starts, task_grads) = self._kept_lists(
            "riemannian_walk_step_", "path", "fisher", *_KEPT
        )
        riemannian_walk_step_(path, fisher, params, starts, task_grads, decay)

    def accumulate_riemannian_walk_score_(self, eps: float) -> None:
        """Close an interval of RWalk."""
        keys = ("task_score", "path", "interval_start", "fisher")
        score, path, start, fisher = self._lists("accumulate_riemannian_walk_score_", *keys)
        accumulate_riemannian_walk_score_(score, path, start, fisher, self._params, eps)

    def consolidate_importance_(self, estimate: TensorList, gamma: float) -> None:
        """Set importance to gamma * importance + estimate, anchor to the parameter."""
        importances, anchors = self._lists("consolidate_importance_", "importance", "anchor")
        consolidate_importance_(importances, anchors, estimate, self._params, gamma)

    def consolidate_all_anchors_(self, estimate: TensorList, gamma: float) -> Tensor:
        """Merge the estimate around the parameters into the old quadratic; returns the constant."""
        importances, anchors = self._lists("consolidate_all_anchors_", "importance", "anchor")
        return consolidate_all_anchors_(importances, anchors, estimate, self._params, gamma)

    def consolidate_path_integral_(self, xi: float, clamp_total: bool = False) -> None:
        """End of a task for SI."""
        keys = ("importance", "anchor", "path")
        importances, anchors, path = self._lists("consolidate_path_integral_", *keys)
        consolidate_path_integral_(
            importances, anchors, path, self._params, xi, clamp_total=clamp_total
        )

    def consolidate_riemannian_walk_(self, mix: float) -> None:
        """End of a task for RWalk."""
        keys = ("importance", "anchor", "score", "task_score", "fisher")
        importances, anchors, score, task_score, fisher = self._lists(
            "consolidate_riemannian_walk_", *keys
        )
        consolidate_riemannian_walk_(
            importances, anchors, score, task_score, fisher, self._params, mix
        )

    def sgd_step_(
        self,
        lr: float | Tensor,
        momentum: float,
        dampening: float,
        weight_decay: float,
        nesterov: bool,
        maximize: bool,
        strength: float,
        decay: float,
        proximal: bool,
        clear_grad: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        clip: Tensor | None,
    ) -> Tensor | None:
        """One step of SGD; the penalty's value before it, or None where nothing is protected.

        Parameters without gradient are left out. The keys of the state tell how to protect.
        """
        keys = ("momentum_buffer", "step") if momentum else ()
        params, grads, lists = self._active("sgd_step_", *keys, *self._guard, cleared=clear_grad)
        value = sgd_step_(
            params,
            grads,
            *(lists[:2] if momentum else ([], [])),
            *self._guard_lists(lists[len(keys) :]),
            lr=_as_tensor(lr),
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            strength=strength,
            decay=decay,
            proximal=proximal,
            clear_grad=clear_grad,
            grad_scale=grad_scale,
            found_inf=found_inf,
            clip=clip,
        )
        return value if self._guard else None

    def adam_step_(
        self,
        lr: float | Tensor,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        decoupled: bool,
        maximize: bool,
        strength: float,
        decay: float,
        proximal: bool,
        clear_grad: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        clip: Tensor | None,
    ) -> Tensor | None:
        """One step of Adam, or of AdamW if `decoupled`; otherwise as `sgd_step_`."""
        keys = ("exp_avg", "exp_avg_sq", "step")
        params, grads, lists = self._active("adam_step_", *keys, *self._guard, cleared=clear_grad)
        value = adam_step_(
            params,
            grads,
            *lists[:3],
            *self._guard_lists(lists[3:]),
            lr=_as_tensor(lr),
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            decoupled=decoupled,
            maximize=maximize,
            strength=strength,
            decay=decay,
            proximal=proximal,
            clear_grad=clear_grad,
            grad_scale=grad_scale,
            found_inf=found_inf,
            clip=clip,
        )
        return value if self._guard else None

    def _guard_lists(self, lists: Sequence[list[Tensor]]) -> list[list[Tensor]]:
        """The four lists of a step's protection, empty where there is none."""
        given = dict(zip(self._guard, lists, strict=True))
        return [given.get(key, []) for key in _PROTECTION]

    def _lists(self, op: str, *keys: str) -> list[list[Tensor]]:
        for key in keys:
            if key == "step" and not self._steps:
                raise ValueError(
                    f"ParameterPlan.{op}: there are no steps; pass them to the constructor"
                )
            if key != "step" and key not in self._state:
                raise ValueError(
                    f"ParameterPlan.{op}: state has no list '{key}'; pass it to the constructor"
                )
        return [self._steps if key == "step" else self._state[key] for key in keys]

    def _kept_lists(self, op: str, *keys: str) -> tuple[list[Tensor], list[list[Tensor]]]:
        """The parameters that the last pull was added to, and their entries of the state."""
        if self._kept is None:
            raise RuntimeError(
                f"ParameterPlan.{op}: nothing has been kept of this step, expected "
                "add_quadratic_penalty_grad_ first"
            )
        lists = [[entries[i] for i in self._kept] for entries in self._lists(op, *keys)]
        return [self._params[i] for i in self._kept], lists

    def _active(
        self, op: str, *keys: str, written: bool = False, cleared: bool = False
    ) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
        """Parameters that have a gradient, those gradients, and their entries of the state.

        If gradients are to be `written`, trainable parameters without one take part with zeros.
        """
        lists = self._lists(op, *keys)
        params, grads, chosen = [], [], []
        for index, parameter in enumerate(self._params):
            grad = parameter.grad
            if grad is None and written and parameter.requires_grad:
                grad = torch.zeros_like(parameter)
            if grad is not None:
                params.append(parameter)
                grads.append(grad)
                chosen.append(index)
        # The op checks again, but only the plan knows the parameters' names.
        names = [self._names[index] for index in chosen]
        gradients = Argument("grads", grads, written=written or cleared)
        check_lists(op, Argument("params", params), gradients, parameter_names=names)
        return params, grads, [[entries[index] for index in chosen] for entries in lists]


def _as_tensor(value: float | Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def has_kernels(device: torch.device) -> bool:
    """Whether clext was built with kernels for `device`; elsewhere the ops run in plain torch."""
    return device.type == "cpu" or (device.type == "cuda" and build_info()["cuda"] is not None)


def make_plan(
    names: Sequence[str],
    params: Sequence[Tensor],
    state: Mapping[str, Sequence[Tensor]],
    steps: Sequence[Tensor] = (),
) -> ReferencePlan:
    """A plan over `params` and `state`: the compiled one where the device has kernels.

    `steps`: for an optimizer's steps, the counter of each parameter. The compiled ParameterPlan has
    the interface of `ReferencePlan`, which is why that is the declared type.
    """
    if params and has_kernels(params[0].device):
        lists = {key: list(entries) for key, entries in state.items()}
        plan = C.ParameterPlan(list(names), list(params), lists, list(steps))
        return cast("ReferencePlan", plan)
    return ReferencePlan(names, params, state, steps)
