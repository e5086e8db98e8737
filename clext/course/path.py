"""Importance from the path of training: the course's `si` and `rwalk`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clext import ops
from clext.core.checks import number
from clext.course.base import CourseMethod, Device, Tensors, as_state, copied
from clext.course.measured import Guards, add_mean_importance_, cross_entropies, sum_of_guards

if TYPE_CHECKING:
    from clext.core.batches import Batches

# Of the new task, where RWalk mixes: Fisher information with the guards, score with the old score.
FISHER_SHARE, SCORE_SHARE = 0.4, 0.5


class PathMethod(CourseMethod):
    """A path integral over the steps of a task, and importances handed on through the model."""

    W: Tensors
    p_old: Tensors
    _n_p_prev: Tensors
    _n_omega: Tensors

    def __init__(
        self, model: nn.Module, dataloader: Batches | None, epsilon: float, device: Device
    ) -> None:
        super().__init__(model, dataloader, device)
        self.epsilon = number(self._owner, "epsilon", epsilon, minimum=0.0, open_minimum=True)
        if dataloader is not None:
            self._check_buffers()

    @staticmethod
    def _key(name: str) -> str:
        return name.replace(".", "__")  # names of buffers have no dots

    def _check_buffers(self) -> None:
        """Whether the object of the task that has ended left its state on the model."""
        for key, p in self._keyed().items():
            for name in (f"{key}_SI_prev_task", f"{key}_W"):
                entry = getattr(self.model, name, None)
                if entry is None or entry.shape != p.shape:
                    got = f"of shape {list(entry.shape)}" if entry is not None else "missing"
                    raise ValueError(
                        f"{self._owner}: buffer '{name}' of the model is {got}, expected "
                        f"{list(p.shape)} from the task that has ended; make the first "
                        f"{self._owner} with dataloader=None, and call update(model) at every step "
                        "before zero_grad()"
                    )

    def _init_(self) -> tuple[Tensors, Tensors]:
        """`W` and `p_old` at the start of a task."""
        return self._zeros(), self._copies()

    @torch.no_grad()
    def _calculate_importance(self) -> tuple[Tensors, Tensors]:
        """`_n_p_prev` and `_n_omega`, also kept on the model for the next object."""
        anchor, omega = self._copies(), self._zeros()
        for key, now in anchor.items():
            if self.dataloader is not None:
                squared_distance = (now - getattr(self.model, f"{key}_SI_prev_task")).square()
                gain = getattr(self.model, f"{key}_W") / self._damped(key, squared_distance)
                old = getattr(self.model, f"{key}_SI_omega", omega[key])
                omega[key] = self._merged(old, gain)
                self.model.register_buffer(f"{key}_SI_omega", omega[key])
            self.model.register_buffer(f"{key}_SI_prev_task", now)
        return anchor, omega

    def _damped(self, key: str, squared_distance: Tensor) -> Tensor:
        """By what the path integral is divided."""
        raise NotImplementedError

    def _merged(self, old: Tensor, gain: Tensor) -> Tensor:
        """The importance after a task that brought `gain`."""
        raise NotImplementedError

    def update(self, model: nn.Module) -> None:
        """Add the step before this one to the path integral `W`: before `zero_grad()`.

        Where a parameter has no gradient, the step is passed over.
        """
        named = self._trained(model)
        moved = {key: p for key, p in named.items() if p.grad is not None}
        ops.accumulate_path_integral_(
            [self.W[key] for key in moved],
            list(moved.values()),
            [as_state(self.p_old[key], p) for key, p in moved.items()],
            [as_state(p.grad, p) for p in moved.values() if p.grad is not None],  # of all the loss
        )
        for key, p in named.items():
            self.p_old[key] = copied(p)
            if key in moved:
                self.model.register_buffer(f"{key}_W", self.W[key])


class si(PathMethod):  # noqa: N801  (the notebook's name)
    """Synaptic Intelligence (Zenke et al. 2017, arXiv:1703.04200), the course's way.

    Importance: omega += W / (distance^2 + epsilon), W the path integral of the task and distance
    the way from its start. Departs from the paper by *penalty in the path*, *negative path* and
    *last step*, and keeps its state in *buffers on the model* (see `clext.course`); `clext.SI` does
    not. The data is not looked at, the mode of the model not changed.

    Args:
        model: its trainable parameters are protected.
        dataloader: None before the first task, that of the task that has ended after it.
        epsilon: damping, > 0.
        device: not used.

    Attributes:
        W, p_old: path integral of this task; the parameters at the latest `update`.
        _n_p_prev, _n_omega: anchor and importance. Names have `__` for dots.

    Raises:
        ValueError: an argument is not as described, or the buffers of the task are missing; the
            model is as it was.
    """

    def __init__(
        self, model: nn.Module, dataloader: Batches | None, epsilon: float, device: Device
    ) -> None:
        super().__init__(model, dataloader, epsilon, device)
        self._n_p_prev, self._n_omega = self._calculate_importance()
        self.W, self.p_old = self._init_()

    def _damped(self, key: str, squared_distance: Tensor) -> Tensor:  # noqa: ARG002
        return squared_distance + self.epsilon

    def _merged(self, old: Tensor, gain: Tensor) -> Tensor:
        return old + gain

    def _quadratic(self) -> tuple[Tensors, Tensors]:
        return self._n_p_prev, self._n_omega


class rwalk(PathMethod):  # noqa: N801  (the notebook's name)
    """Riemannian Walk (Chaudhry et al. 2018, arXiv:1801.10112), the course's way.

    Importance: F + omega, with F = 0.6 * (sum of guards) + 0.4 * (Fisher information as in `ewc`)
    and omega = 0.5 * omega + 0.5 * W / (F distance^2 / 2 + epsilon). Departs from the paper by

    - *one interval*: W and distance span the whole task, and F is that of its end;
    - *no scale*: F and omega are added as they are, not each divided by its maximum;
    - *half a score*: the first task's score is mixed with zero;
    - a pass over the data for F, where the paper averages over the steps;
    - and, see `clext.course`: *batch mean*, *guards again*, *left behind*, *penalty in the path*,
      *negative path*, *last step*, *buffers on the model*.

    `clext.RWalk` does not.

    Arguments, attributes and errors are those of `si` and `ewc`, with F in `_precision_matrices`.
    All names have `__` for dots, those in `prev_guards` too.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Batches | None,
        epsilon: float,
        device: Device,
        prev_guards: Guards = (None,),
    ) -> None:
        super().__init__(model, dataloader, epsilon, device)
        self.previous_guards_list = prev_guards
        self.update_ewc_parameter = FISHER_SHARE
        self._precision_matrices = self._calculate_importance_ewc()
        self._n_p_prev, self._n_omega = self._calculate_importance()
        self.W, self.p_old = self._init_()

    def _calculate_importance_ewc(self) -> Tensors:
        total = sum_of_guards(self, self.previous_guards_list)
        share = 0.0 if self.dataloader is None else self.update_ewc_parameter
        for entry in total.values():
            entry.mul_(1 - share)
        add_mean_importance_(self, total, cross_entropies(self), ops.accumulate_square_, share)
        return total

    def _damped(self, key: str, squared_distance: Tensor) -> Tensor:
        return 0.5 * self._precision_matrices[key] * squared_distance + self.epsilon

    def _merged(self, old: Tensor, gain: Tensor) -> Tensor:
        return (1 - SCORE_SHARE) * old + SCORE_SHARE * gain

    def _quadratic(self) -> tuple[Tensors, Tensors]:
        fisher, omega = self._precision_matrices, self._n_omega
        return self._n_p_prev, {key: fisher[key] + omega[key] for key in fisher}
