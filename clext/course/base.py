"""What the course's classes share: the constructor's checks, and the penalty in one pass."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clext import ops
from clext.core.lists import state_dtype
from clext.core.parameters import trainable_parameters

if TYPE_CHECKING:
    from clext.importance.passes import Batches

Device = str | int | torch.device
Tensors = dict[str, Tensor]


class CourseMethod:
    """A quadratic penalty on the parameters of one model, made anew for each task."""

    def __init__(self, model: nn.Module, dataloader: Batches | None, device: Device) -> None:
        self.params = trainable_parameters(model)
        self._check_device(device)
        self.model, self.dataloader, self.device = model, dataloader, device

    def penalty(self, model: nn.Module) -> Tensor:
        """The sum of importance * (parameter - anchor)^2: 0-dim, differentiable, no strength."""
        anchors, importances = self._quadratic()
        named = self._trained(model, anchors)
        return ops.quadratic_penalty(
            list(named.values()), [anchors[k] for k in named], [importances[k] for k in named]
        )

    def update(self, model: nn.Module) -> None:
        """Do nothing: only `si` and `rwalk` look at steps."""

    def _quadratic(self) -> tuple[Tensors, Tensors]:
        """Anchors and importances."""
        raise NotImplementedError

    @staticmethod
    def _key(name: str) -> str:
        """Under which name state is kept for the parameter `name`."""
        return name

    def _keyed(self) -> Tensors:
        return {self._key(name): entry for name, entry in self.params.items()}

    def _zeros(self) -> Tensors:
        return {
            k: torch.zeros_like(p, dtype=state_dtype(p.dtype)) for k, p in self._keyed().items()
        }

    def _copies(self) -> Tensors:
        return {k: p.detach().to(state_dtype(p.dtype), copy=True) for k, p in self._keyed().items()}

    def _trained(self, model: nn.Module, known: Tensors) -> Tensors:
        """The parameters of `model` that are not frozen, by key."""
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"{self._owner}: penalty and update take the model, a torch.nn.Module, got "
                f"{brief(model)}"
            )
        named: Tensors = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                key = self._key(name)
                if key not in known:
                    raise ValueError(
                        f"{self._owner}: parameter '{name}' was frozen or absent when this "
                        f"{self._owner} was made; make another one after a change of the model"
                    )
                named[key] = parameter
        return named

    # ------------------------------------------------------------------ checks

    @property
    def _owner(self) -> str:
        return type(self).__name__

    @property
    def _order(self) -> str:
        return f"the order is {self._owner}({', '.join(inspect.signature(type(self)).parameters)})"

    def _check_device(self, device: Any) -> None:  # noqa: ANN401  (that is the check)
        try:
            target = torch.device(device)
        except (TypeError, RuntimeError):
            raise ValueError(
                f"{self._owner}: device must be a torch.device or the name of one, got "
                f"{brief(device)}; {self._order}"
            ) from None
        try:
            torch.empty(0, device=target)
        except (AssertionError, NotImplementedError, RuntimeError):  # each backend has its own
            usable = False
        else:
            usable = target.type != "meta"
        if not usable:
            raise ValueError(
                f"{self._owner}: device '{target}' cannot compute here, expected the one that the "
                "model is on"
            )


def brief(value: object) -> str:
    """`value` for a sentence: numbers, names and devices as they are, else the type."""
    shown = isinstance(value, int | float | str | torch.device | type(None))
    return repr(value) if shown else type(value).__name__


class baseline(CourseMethod):  # noqa: N801  (the notebook's name)
    """Plain fine-tuning: every importance is zero.

    Args:
        model: see `ewc`.
        dataloader: not looked at.
        device: not used.

    Attributes:
        params: the trainable parameters by name.
        p_old: their values when the object was made.
        _precision_matrices: zeros.

    Raises:
        ValueError: an argument is not as described.
    """

    def __init__(self, model: nn.Module, dataloader: Batches | None, device: Device) -> None:
        super().__init__(model, dataloader, device)
        self._precision_matrices = self._zeros()
        self.p_old = self._copies()

    def _quadratic(self) -> tuple[Tensors, Tensors]:
        return self.p_old, self._precision_matrices
