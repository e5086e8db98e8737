"""The course's quadratic penalty, and fine-tuning as the penalty that is zero."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clext import ops
from clext.core.lists import state_dtype
from clext.core.parameters import trainable_parameters

if TYPE_CHECKING:
    from clext.core.batches import Batches

Device = str | int | torch.device
Tensors = dict[str, Tensor]


class CourseMethod:
    """A penalty on the parameters of one model, made anew for each task.

    The attributes are the state, as in the notebook: what a hand or a subclass writes there counts.
    """

    def __init__(self, model: nn.Module, dataloader: Batches | None, device: Device) -> None:
        if dataloader is not None and not isinstance(dataloader, Iterable):
            raise ValueError(
                f"{self._owner}: dataloader must be None (before the first task) or the batches of "
                f"the task that has ended, got {dataloader!r}"
            )
        self.params = trainable_parameters(model)
        self.model, self.dataloader, self.device = model, dataloader, device

    def penalty(self, model: nn.Module) -> Tensor:
        """The sum of importance * (parameter - anchor)^2: 0-dim, differentiable, no strength."""
        named = self._trained(model)
        anchors, importances = (
            [as_state(entries[key], p) for key, p in named.items()] for entries in self._quadratic()
        )
        return ops.quadratic_penalty(list(named.values()), anchors, importances)

    def update(self, model: nn.Module) -> None:
        """Do nothing: only `si` and `rwalk` look at steps."""

    def _quadratic(self) -> tuple[Tensors, Tensors]:
        """Anchors and importances."""
        raise NotImplementedError

    def _trained(self, model: nn.Module) -> Tensors:
        """The parameters of `model` that are not frozen, by key."""
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name in named:
            if name not in self.params:
                raise ValueError(
                    f"{self._owner}: parameter '{name}' was frozen or absent when this "
                    f"{self._owner} was made; make another one after a change of the model"
                )
        return {self._key(name): p for name, p in named.items()}

    @property
    def _owner(self) -> str:
        return type(self).__name__

    @staticmethod
    def _key(name: str) -> str:
        """Under which name state is kept for the parameter `name`."""
        return name

    def _keyed(self) -> Tensors:
        return {self._key(name): p for name, p in self.params.items()}

    def _zeros(self) -> Tensors:
        return {
            k: torch.zeros_like(p, dtype=state_dtype(p.dtype)) for k, p in self._keyed().items()
        }

    def _copies(self) -> Tensors:
        return {key: copied(p) for key, p in self._keyed().items()}


def as_state(entry: Tensor | float, p: Tensor) -> Tensor:
    """`entry` as an expression with `p` would take it: a number too, or one of another dtype."""
    found = torch.as_tensor(entry, dtype=state_dtype(p.dtype), device=p.device)
    return found.detach().expand_as(p)


def copied(p: Tensor) -> Tensor:
    """The parameter as it is now, as state."""
    return p.detach().to(state_dtype(p.dtype), copy=True)


class baseline(CourseMethod):  # noqa: N801  (the notebook's name)
    """Plain fine-tuning: every importance is zero.

    Arguments and attributes are those of `ewc`; the data is not looked at.
    """

    def __init__(self, model: nn.Module, dataloader: Batches | None, device: Device) -> None:
        super().__init__(model, dataloader, device)
        self._precision_matrices = self._calculate_importance()
        self.p_old = self._copies()

    def _calculate_importance(self) -> Tensors:
        return self._zeros()

    def _quadratic(self) -> tuple[Tensors, Tensors]:
        return self.p_old, self._precision_matrices
