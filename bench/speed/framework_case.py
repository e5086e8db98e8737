"""A training in a framework: without a method, with one by its adapter, and in a loop by hand.

The first two are the same but for the glue, which is counted as the lines that only the second has.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LR, CLIP = 1e-3, 0.05  # a norm that every gradient here has more of
STEPS = 40  # of each of two tasks

Training = Callable[[nn.Module, Sequence[Any]], object]


@dataclass(frozen=True)
class Framework:
    """`model` and `tasks` make what the three trainings begin with."""

    package: str
    model: Callable[[], nn.Module]
    tasks: Callable[[], Sequence[Any]]
    without: Training
    glued: Training
    by_hand: Training

    @property
    def glue(self) -> list[str]:
        """The lines that a training with the method has, and one without has not."""
        sources = [
            inspect.getsource(function).splitlines()[1:] for function in (self.without, self.glued)
        ]
        added = (line[2:].strip() for line in difflib.ndiff(*sources) if line.startswith("+ "))
        return [line for line in added if line]


def steps(method: Any, params: Iterable[Tensor], optimizer: Any, losses: Iterable[Any]) -> None:
    """The loop by hand: the pull, the clip, the step."""
    params = list(params)
    for loss in losses:
        loss().backward()
        method.add_penalty_grad_()
        torch.nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()
        method.update()
        optimizer.zero_grad()
