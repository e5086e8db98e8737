"""The course's classes that follow the path of training: `si` and `rwalk`."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from clext import ops
from clext.core.checks import number
from clext.course.base import CourseMethod, Device, Tensors, brief
from clext.course.measured import Guarded, Guards

if TYPE_CHECKING:
    from clext.importance.passes import Batches

# Of the new task, where RWalk mixes: Fisher information with the guards, score with the old score.
FISHER_SHARE, SCORE_SHARE = 0.4, 0.5

# Buffers of a parameter on the model.
KINDS = ("SI_prev_task", "W", "SI_omega")
# Path integrals that an importance of a model was made of, on which they stay until an `update`.
_counted = WeakTensorKeyDictionary()


class Walk(CourseMethod):
    """A path integral over the steps of a task, and importances handed on through the model."""

    epsilon: float
    _n_p_prev: Tensors
    _n_omega: Tensors

    @staticmethod
    def _key(name: str) -> str:
        return name.replace(".", "__")  # names of buffers have no dots

    def update(self, model: nn.Module) -> None:
        """Add the step before this one to the path integral `W`: before `zero_grad()`.

        Where a parameter has no gradient, the step is passed over.
        """
        named = self._trained(model, self.W)
        moved = {key: p for key, p in named.items() if p.grad is not None}
        # The notebook leaves the penalty's gradient in. At strength 0 neither anchor nor importance
        # counts, and one list for both is read once.
        unused = [self._n_p_prev[key] for key in moved]
        ops.accumulate_path_integral_(
            [self.W[key] for key in moved],
            [self.p_old[key] for key in moved],
            list(moved.values()),
            [p.grad for p in moved.values() if p.grad is not None],
            anchors=unused,
            importances=unused,
            strength=0.0,
        )
        for key, p in named.items():
            if key not in moved:
                self.p_old[key].copy_(p.detach())
            elif getattr(self.model, f"{key}_W", None) is not self.W[key]:
                self.model.register_buffer(f"{key}_W", self.W[key])

    def _start_path(self) -> None:
        self.W, self.p_old = self._zeros(), self._copies()

    def _check_epsilon(self, epsilon: object) -> float:
        try:
            return number(self._owner, "epsilon", epsilon, minimum=0.0, open_minimum=True)
        except ValueError:
            raise ValueError(
                f"{self._owner}: epsilon must be a finite number > 0, got {brief(epsilon)}; "
                f"{self._order}"
            ) from None

    def _check_names(self) -> None:
        """Whether each parameter has names for its buffers that nothing else on the model has."""
        named: dict[str, str] = {}
        for name in self.params:
            key = self._key(name)
            if key in named:
                raise ValueError(
                    f"{self._owner}: parameters '{named[key]}' and '{name}' would share the "
                    f"buffers '{key}_...' on the model, rename one of them"
                )
            named[key] = name
            for kind in KINDS:
                label = f"{key}_{kind}"
                if hasattr(self.model, label) and label not in self.model._buffers:
                    raise ValueError(
                        f"{self._owner}: the model has an attribute '{label}', which is to be the "
                        f"name of a buffer for parameter '{name}'; rename it"
                    )

    def _check_buffers(self) -> None:
        """Whether the object of the task that has ended left its state on the model."""
        self._check_names()
        remedies = {
            "SI_prev_task": f"make the first {self._owner} with dataloader=None",
            "W": "call update(model) in the loop, at every step, before zero_grad()",
        }
        for key, p in self._keyed().items() if self.dataloader is not None else ():
            for kind in KINDS:
                name = f"{key}_{kind}"
                entry = getattr(self.model, name, None)
                if entry is None and kind in remedies:
                    raise ValueError(
                        f"{self._owner}: the model has no buffer '{name}', expected one from the "
                        f"task that has ended; {remedies[kind]}"
                    )
                if entry is not None and entry.shape != p.shape:
                    raise ValueError(
                        f"{self._owner}: buffer '{name}' of the model has shape "
                        f"{list(entry.shape)}, expected {list(p.shape)} as the parameter; a model "
                        f"that has changed needs a first {self._owner} with dataloader=None"
                    )

        # Of a parameter without gradients in this task it may be: so it is in the notebook.
        if self.dataloader is not None and all(
            _counted.get(getattr(self.model, f"{key}_W")) == ref(self.model)
            for key in self._keyed()
        ):
            raise ValueError(
                f"{self._owner}: the path integral on the model is that of a task counted already; "
                f"{remedies['W']}"
            )

    @torch.no_grad()
    def _hand_on(self, fisher: Tensors | None) -> None:
        """Anchor and importance for the next task, kept on the model for the next object."""
        self._n_p_prev, self._n_omega = self._copies(), self._zeros()
        if self.dataloader is not None:
            for key, now in self._n_p_prev.items():
                path = getattr(self.model, f"{key}_W")
                distance = (now - getattr(self.model, f"{key}_SI_prev_task")).square()
                if fisher is not None:
                    distance *= 0.5 * fisher[key]
                gain = path / (distance + self.epsilon)
                old = getattr(self.model, f"{key}_SI_omega", self._n_omega[key])
                self._n_omega[key] = self._merged(old, gain)
                _counted[path] = ref(self.model)
        for key, now in self._n_p_prev.items():
            self.model.register_buffer(f"{key}_SI_prev_task", now)
            if self.dataloader is not None:
                self.model.register_buffer(f"{key}_SI_omega", self._n_omega[key])

    def _merged(self, old: Tensor, gain: Tensor) -> Tensor:
        """The importance after a task that brought `gain`."""
        raise NotImplementedError


class si(Walk):  # noqa: N801  (the notebook's name)
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
        super().__init__(model, dataloader, device)
        self.epsilon = self._check_epsilon(epsilon)
        self._check_buffers()
        self._hand_on(fisher=None)
        self._start_path()

    def _merged(self, old: Tensor, gain: Tensor) -> Tensor:
        return old + gain

    def _quadratic(self) -> tuple[Tensors, Tensors]:
        return self._n_p_prev, self._n_omega


class rwalk(Walk, Guarded):  # noqa: N801  (the notebook's name)
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

    Args:
        model: see `ewc`, as `dataloader`, `device` and `prev_guards`.
        dataloader: see `ewc`.
        epsilon: damping of the score, > 0.
        device: see `ewc`.
        prev_guards: see `ewc`; names have `__` for dots.

    Attributes:
        _precision_matrices: F; others as in `si`. Names have `__` for dots.

    Raises:
        ValueError: an argument is not as described, or the buffers of the task are missing; the
            model is as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Batches | None,
        epsilon: float,
        device: Device,
        prev_guards: Guards = (None,),
    ) -> None:
        Guarded.__init__(self, model, dataloader, device, prev_guards)
        self.epsilon = self._check_epsilon(epsilon)
        self._check_buffers()
        self.update_ewc_parameter = FISHER_SHARE
        self._means: Tensors = {}
        self._precision_matrices = self._fisher()
        self._hand_on(self._precision_matrices)
        self._importance = {
            key: fisher + self._n_omega[key] for key, fisher in self._precision_matrices.items()
        }
        self._start_path()

    def _fisher(self) -> Tensors:
        total = self._sum_of_guards()
        if self.dataloader is not None:
            for entry in total.values():
                entry.mul_(1 - self.update_ewc_parameter)
        self._add_importance(total, ops.accumulate_square_, self.update_ewc_parameter)
        return total

    def _objective(self, output: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(output, label)

    def _merged(self, old: Tensor, gain: Tensor) -> Tensor:
        return (1 - SCORE_SHARE) * old + SCORE_SHARE * gain

    def _quadratic(self) -> tuple[Tensors, Tensors]:
        return self._n_p_prev, self._importance
