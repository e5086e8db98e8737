"""One optimizer step with a method's protection, written in three ways over the same numbers.

- "course": torch's optimizer as it comes, the penalty as an expression that autograd takes the
  gradient of, the path integral in a loop over the parameters, as in course notebooks;
- "separate": torch's fused optimizer between the method's own calls, two passes over memory more;
- "fused": clext.optim, everything in the pass that moves the parameters.

The gradients of the loss are there and stay. RWalk's score, a pass every so many steps that is the
same for all, is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import clext
from speed.cases import DECAY, STRENGTH
from speed.sizes import Shapes

NEVER = 10**9
LR, MOMENTUM = 1e-3, 0.9

METHODS: dict[str, Callable[..., clext.Method]] = {
    "ewc": clext.EWC,
    "si": clext.SI,
    "rwalk": partial(clext.RWalk, interval=NEVER, alpha=1 - DECAY),
}
COURSE_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": partial(torch.optim.SGD, momentum=MOMENTUM),
}
CLEXT_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": clext.optim.Adam,
    "sgd": partial(clext.optim.SGD, momentum=MOMENTUM),
}

# What the one pass reads and writes; everything float32.
OPTIMIZER_LISTS = {
    "adam": (("param", "grad", "exp_avg", "exp_avg_sq"), ("param", "exp_avg", "exp_avg_sq")),
    "sgd": (("param", "grad", "momentum_buffer"), ("param", "momentum_buffer")),
}
METHOD_LISTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "none": ((), ()),
    "ewc": (("anchor", "importance"), ()),
    "si": (("anchor", "importance", "path"), ("path",)),
    "rwalk": (("anchor", "importance", "path", "fisher"), ("path", "fisher")),
}


def least_traffic(optimizer: str, method: str) -> tuple[int, int]:
    """How many lists the fused step reads and writes."""
    own, added = OPTIMIZER_LISTS[optimizer], METHOD_LISTS[method]
    return len(own[0]) + len(added[0]), len(own[1]) + len(added[1])


class Numbers:
    """The same random numbers for everyone who asks in the same order."""

    def __init__(self, shapes: Shapes, device: str) -> None:
        self._shapes, self._device = shapes, device
        self._generator = torch.Generator().manual_seed(0)

    def draw(self, low: float, high: float) -> list[Tensor]:
        return [
            torch.empty(shape).uniform_(low, high, generator=self._generator).to(self._device)
            for shape in self._shapes
        ]


class Weights(nn.Module):
    """Parameters of the given shapes, with gradients; nothing that computes with them."""

    def __init__(self, numbers: Numbers) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(p) for p in numbers.draw(-0.1, 0.1))
        for parameter, grad in zip(self.parameters(), numbers.draw(-0.1, 0.1), strict=True):
            parameter.grad = grad


class Course:
    """As a course notebook writes it; the path integral includes the penalty's gradient there."""

    def __init__(self, optimizer: str, method: str, shapes: Shapes, device: str) -> None:
        numbers = Numbers(shapes, device)
        self.model = Weights(numbers)
        self.optimizer = COURSE_OPTIMIZERS[optimizer](self.model.parameters(), lr=LR)
        self.method = method
        names = [name for name, _ in self.model.named_parameters()]
        self.anchor = dict(zip(names, numbers.draw(-0.1, 0.1), strict=True))
        self.importance = dict(zip(names, numbers.draw(0.0, 1.0), strict=True))
        self.path: dict[str, Tensor] = {}
        self.fisher: dict[str, Tensor] = {}
        self.p_old: dict[str, Tensor] = {}
        for name, p in self.model.named_parameters():
            if method in ("si", "rwalk"):
                self.path[name] = torch.zeros_like(p)
                self.p_old[name] = p.detach().clone()
            if method == "rwalk":
                self.fisher[name] = torch.zeros_like(p)

    def penalty(self) -> Tensor:
        total: Any = 0
        for name, p in self.model.named_parameters():
            total = total + (self.importance[name] * (p - self.anchor[name]) ** 2).sum()
        return STRENGTH * total

    def step(self) -> None:
        if self.method != "none":
            self.penalty().backward()
        self.optimizer.step()
        if self.path:
            for name, p in self.model.named_parameters():
                self.path[name] -= p.grad * (p.detach() - self.p_old[name])
                self.p_old[name] = p.detach().clone()
        if self.fisher:
            for name, p in self.model.named_parameters():
                self.fisher[name] = DECAY * self.fisher[name] + (1 - DECAY) * p.grad**2


def protected(
    method: str, model: nn.Module, numbers: Numbers, state_dtype: torch.dtype | None = None
) -> clext.Method | None:
    """The method in its second task: anchor and importance are there."""
    if method == "none":
        return None
    made = METHODS[method](model, strength=STRENGTH, state_dtype=state_dtype)
    for own, (low, high) in ((made.anchor, (-0.1, 0.1)), (made.importance, (0.0, 1.0))):
        for entry, drawn in zip(own.values(), numbers.draw(low, high), strict=True):
            entry.copy_(drawn)
    made.tasks = 1
    return made


class Separate:
    """torch's fused optimizer, and a pass each for the penalty and the path integral."""

    def __init__(self, optimizer: str, method: str, shapes: Shapes, device: str) -> None:
        numbers = Numbers(shapes, device)
        self.model = Weights(numbers)
        self.optimizer = COURSE_OPTIMIZERS[optimizer](self.model.parameters(), lr=LR, fused=True)
        self.method = protected(method, self.model, numbers)

    def step(self) -> None:
        if self.method is not None:
            self.method.add_penalty_grad_()
        self.optimizer.step()
        if self.method is not None:
            self.method.update()


class Fused:
    """clext.optim."""

    def __init__(
        self,
        optimizer: str,
        method: str,
        shapes: Shapes,
        device: str,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        numbers = Numbers(shapes, device)
        self.model = Weights(numbers)
        self.method = protected(method, self.model, numbers, state_dtype)
        self.optimizer = CLEXT_OPTIMIZERS[optimizer](
            self.model.parameters(), lr=LR, method=self.method
        )

    def step(self) -> None:
        self.optimizer.step()
