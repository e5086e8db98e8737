"""Optimizers of a run and their learning rates, by name or made by a function of the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
)

from clext.methods import Method
from clext.methods.parts.attachment import Attachment
from clext.optim import SGD, Adam, AdamW, FusedOptimizer
from clext.training.settings import Settings

# What a function of the user's makes of parameters and method, and of an optimizer and the number
# of its steps in the task.
MakeOptimizer = Callable[[list[nn.Parameter], Method], Optimizer]
MakeScheduler = Callable[[Optimizer, int], LRScheduler]

_KINDS: dict[str, Callable[..., FusedOptimizer]] = {"adam": Adam, "adamw": AdamW, "sgd": SGD}
_SCHEDULERS: dict[str, MakeScheduler] = {
    "cosine": lambda optimizer, steps: CosineAnnealingLR(optimizer, steps),
    # A tenth at half and at three quarters of the steps (He et al. 2016, arXiv:1512.03385, CIFAR).
    "step": lambda optimizer, steps: MultiStepLR(optimizer, [steps // 2, steps * 3 // 4], 0.1),
    # Momentum stays: it is no tensor, so a recorded step would not see it change.
    "one-cycle": lambda optimizer, steps: OneCycleLR(
        optimizer, _rates(optimizer), steps, cycle_momentum=False
    ),
}


class TaskOptimizer:
    """The optimizer of a task, its schedule, and the method's pull, in its pass or attached to it.

    Args:
        settings: of the run.
        method: what it protects.
        parameters: of the method's model.
        device: of these.
    """

    def __init__(
        self,
        settings: Settings,
        method: Method,
        parameters: Sequence[nn.Parameter],
        device: torch.device,
    ) -> None:
        self._settings = settings
        self.optimizer = self._made(method, [*parameters], device)
        self._start = [_copied(rate) for rate in _rates(self.optimizer)]
        self._scheduler: LRScheduler | None = None
        does_all = isinstance(self.optimizer, FusedOptimizer) and self.optimizer.method is method
        self._pull: Any = self.optimizer if does_all else Attachment(method, self.optimizer)
        self.does_all = does_all

    def _made(
        self, method: Method, parameters: list[nn.Parameter], device: torch.device
    ) -> Optimizer:
        settings = self._settings
        if not isinstance(settings.optimizer, str):
            made: Optimizer = _called(
                settings.optimizer, "optimizer", Optimizer, parameters, method
            )
            return made
        lr: Any = settings.lr
        if settings.scheduler is not None and device.type == "cuda":
            lr = torch.tensor(settings.lr, device=device)  # a recorded step sees it change
        options = {} if settings.optimizer != "sgd" else {"momentum": settings.momentum}
        return _KINDS[settings.optimizer](
            parameters,
            lr,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            method=method,
            **options,
        )

    def begin(self, steps: int) -> None:
        """A task of so many steps begins: the learning rate starts anew."""
        for group, rate in zip(self.optimizer.param_groups, self._start, strict=True):
            group.pop("initial_lr", None)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        make = self._settings.scheduler
        if isinstance(make, str):
            self._scheduler = _SCHEDULERS[make](self.optimizer, steps)
        elif make is not None:
            self._scheduler = _called(make, "scheduler", LRScheduler, self.optimizer, steps)

    @property
    def capturable(self) -> bool:
        """Whether a recorded step does the same at each replay."""
        rates = _rates(self.optimizer)
        follows = self._settings.scheduler is None or all(isinstance(r, Tensor) for r in rates)
        return self.does_all and follows

    @property
    def penalty(self) -> Tensor:
        """The method's penalty before the last step, 0-dim."""
        found: Tensor = self._pull.penalty
        return found

    def step(self) -> None:
        """One step."""
        self.optimizer.step()

    def zero_grad(self) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad()

    def launch(self) -> None:
        """What of a step can be recorded; `after_replay` is the rest."""
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # torch's schedulers look
        self._fused.launch()

    def after_replay(self) -> None:
        """What is left to do after each replay."""
        self._fused.after_replay()

    def step_done(self) -> None:
        """The learning rate of the next step."""
        if self._scheduler is not None:
            self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Of the optimizer and the schedule."""
        schedule = None if self._scheduler is None else self._scheduler.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "scheduler": schedule}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over such a state, in a task that has begun."""
        own = _rates(self.optimizer)
        self.optimizer.load_state_dict(dict(state["optimizer"]))
        for group, rate in zip(self.optimizer.param_groups, own, strict=True):
            if isinstance(rate, Tensor):  # which a recorded step reads
                group["lr"] = rate.fill_(group["lr"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(dict(state["scheduler"]))

    def close(self) -> None:
        """Leave the optimizer as it was."""
        if isinstance(self._pull, Attachment):
            self._pull.remove()

    @property
    def _fused(self) -> FusedOptimizer:
        assert isinstance(self.optimizer, FusedOptimizer)
        return self.optimizer


def _called(function: Callable[..., Any], name: str, kind: type[Any], *given: object) -> Any:  # noqa: ANN401
    """What a function of the user's makes; ValueError if it fails, or makes another kind."""
    takes = {"optimizer": "(parameters, method)", "scheduler": "(optimizer, steps)"}[name]
    try:
        made = function(*given)
    except TypeError as error:
        raise ValueError(
            f"train: the function {name} failed ({error}); it is called with {takes}"
        ) from error
    if not isinstance(made, kind) or isinstance(made, ReduceLROnPlateau):
        raise ValueError(
            f"train: the function {name} returned a {type(made).__name__}, expected a torch.optim "
            f"{kind.__name__} that is made of {takes} and steps without more"
        )
    return made


def _rates(optimizer: Optimizer) -> list[Any]:
    return [group["lr"] for group in optimizer.param_groups]


def _copied(rate: Any) -> Any:  # noqa: ANN401
    return rate.clone() if isinstance(rate, Tensor) else rate
