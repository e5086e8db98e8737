"""ParameterPlan in plain torch, for devices without kernels: same interface, meaning and errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clext.reference.importance import consolidate_all_anchors_, consolidate_importance_
from clext.reference.path import (
    accumulate_path_integral_,
    accumulate_riemannian_walk_score_,
    consolidate_path_integral_,
    consolidate_riemannian_walk_,
    riemannian_walk_step_,
)
from clext.reference.penalty import add_quadratic_penalty_grad_, quadratic_penalty
from clext.tensor_lists import Argument, TensorList, check_lists
from clext.tensor_lists import state as state_list

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class ReferencePlan:
    """Parameters and a method's state, checked once; gradients are read at each call.

    `state`: lists as long as `params`, each entry laid out like its parameter and in the state
    dtype; keys among "anchor", "importance", "path", "previous", "fisher", "task_score", "score",
    "interval_start".
    """

    def __init__(
        self, names: Sequence[str], params: TensorList, state: Mapping[str, TensorList]
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
        check_lists("ParameterPlan", layout, *lists, parameter_names=self._names)

    def quadratic_penalty(self) -> Tensor:
        """The penalty's value without strength, without autograd (0-dim)."""
        anchors, importances = self._lists("quadratic_penalty", "anchor", "importance")
        with torch.no_grad():
            return quadratic_penalty(self._params, anchors, importances)

    def add_quadratic_penalty_grad_(self, strength: float) -> Tensor:
        """Add the gradient of strength * penalty to every `.grad`; returns the value (0-dim).

        A missing `.grad` is made; frozen parameters without one are left out.
        """
        keys = ("anchor", "importance")
        params, grads, (anchors, importances) = self._active(
            "add_quadratic_penalty_grad_", *keys, written=True
        )
        value = add_quadratic_penalty_grad_(grads, params, anchors, importances, strength)
        for parameter, grad in zip(params, grads, strict=True):
            parameter.grad = grad
        return value

    def accumulate_path_integral_(self, strength: float) -> None:
        """One step of SI; parameters without gradient are left out: no optimizer has moved them."""
        keys = ("path", "previous", "anchor", "importance")
        params, grads, (path, previous, anchors, importances) = self._active(
            "accumulate_path_integral_", *keys
        )
        accumulate_path_integral_(path, previous, params, grads, anchors, importances, strength)

    def riemannian_walk_step_(self, strength: float, decay: float) -> None:
        """One step of RWalk; parameters without gradient are left out."""
        keys = ("path", "previous", "fisher", "anchor", "importance")
        params, grads, (path, previous, fisher, anchors, importances) = self._active(
            "riemannian_walk_step_", *keys
        )
        riemannian_walk_step_(
            path, previous, fisher, params, grads, anchors, importances, strength, decay
        )

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

    def consolidate_path_integral_(self, xi: float) -> None:
        """End of a task for SI."""
        keys = ("importance", "anchor", "path")
        importances, anchors, path = self._lists("consolidate_path_integral_", *keys)
        consolidate_path_integral_(importances, anchors, path, self._params, xi)

    def consolidate_riemannian_walk_(self, mix: float) -> None:
        """End of a task for RWalk."""
        keys = ("importance", "anchor", "score", "task_score", "fisher")
        importances, anchors, score, task_score, fisher = self._lists(
            "consolidate_riemannian_walk_", *keys
        )
        consolidate_riemannian_walk_(
            importances, anchors, score, task_score, fisher, self._params, mix
        )

    def _lists(self, op: str, *keys: str) -> list[list[Tensor]]:
        for key in keys:
            if key not in self._state:
                raise ValueError(
                    f"ParameterPlan.{op}: state has no list '{key}'; pass it to the constructor"
                )
        return [self._state[key] for key in keys]

    def _active(
        self, op: str, *keys: str, written: bool = False
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
        gradients = Argument("grads", grads, written=written)
        check_lists(op, Argument("params", params), gradients, parameter_names=names)
        return params, grads, [[entries[index] for index in chosen] for entries in lists]
