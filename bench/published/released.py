"""Methods as the released code of a paper has them, where that is not what any paper says."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from clext import ops
from clext.methods import GEM, SI
from clext.methods.gem import solve_dual
from clext.methods.quadratic import QuadraticPenalty


class ReleasedSI(SI):
    """SI in the released code of Zenke et al. 2017 (arXiv:1703.04200), on Keras 2.0.

    What stays at zero or above is the sum of the importances, not each task's. The distance of the
    first task is that from zero, not from where it started. And the loss is the one of that Keras:
    it holds the probability of the label between 1e-7 and 1 - 1e-7, so examples that are learned,
    or entirely mistaken, have no gradient.
    """

    name: ClassVar[str] = "released_si"

    def __init__(self, model: nn.Module, *, strength: float | None = None, xi: float = 0.1) -> None:
        super().__init__(model, strength=strength, xi=xi, clamp="total")
        torch._foreach_zero_(self._state.lists["anchor"])

    def _loss(self, *batch: Tensor) -> Tensor:
        inputs, labels = batch
        of_all = self.heads(inputs).softmax(1)
        of_label = of_all.gather(1, labels.unsqueeze(1))
        return -of_label.clamp(1e-7, 1 - 1e-7).log().mean()


class RunningFisherEWC(QuadraticPenalty):
    """EWC in the released code of A-GEM (Chaudhry et al. 2019, arXiv:1812.00420).

    Its Fisher information is a moving average along the training, as in RWalk: every `interval`
    steps running = 0.1 * running + 0.9 * mean of the squared gradient of a mini-batch. At the end
    of a task it is scaled to [0, 1] and replaces, not joins, that of the tasks before.
    """

    name: ClassVar[str] = "running_fisher_ewc"
    state_names: tuple[str, ...] = ("anchor", "importance", "squares", "running")
    counter_names: tuple[str, ...] = ("tasks", "steps", "all_steps")
    fused: tuple[str, ...] | None = None

    def __init__(
        self, model: nn.Module, *, strength: float | None = None, interval: int = 10
    ) -> None:
        super().__init__(model, strength=strength)
        self.interval, self.all_steps = interval, 0

    @torch.no_grad()
    def add_penalty_grad_(self, scaler: object = None) -> Tensor:
        """As ever, after a look at the gradient of the task alone."""
        squares, running = self._state.lists["squares"], self._state.lists["running"]
        grads = [entry.grad for entry in self._state.params if entry.grad is not None]
        ops.accumulate_square_(squares, grads, 1 / self.interval)
        self.all_steps += 1
        if self.all_steps % self.interval == 0:
            torch._foreach_lerp_(running, squares, 0.9)
            torch._foreach_zero_(squares)
        return super().add_penalty_grad_(scaler)

    @torch.no_grad()
    def _end_task(self, dataloader: object) -> None:  # noqa: ARG002
        running = self._state.lists["running"]
        lowest = torch.stack([entry.min() for entry in running]).min()
        highest = torch.stack([entry.max() for entry in running]).max()
        for importance, entry in zip(self._state.lists["importance"], running, strict=True):
            importance.copy_((entry - lowest) / (highest - lowest))
        torch._foreach_zero_(self._state.lists["squares"])
        self._state.restart("anchor")


class ReleasedGEM(GEM):
    """GEM in the code of A-GEM (Chaudhry et al. 2019, arXiv:1812.00420) until December 2018.

    What it gives the program as the current gradient is a row of its matrix of past gradients that
    belongs to the current task and is filled when that is over: zeros. So a step whose gradient is
    in conflict goes along gradients of the past alone, each weighted by `margin` or more.
    """

    name: ClassVar[str] = "released_gem"

    @torch.no_grad()
    def _weights(self, gram: Tensor) -> Tensor | None:
        past, products = gram[:-1, :-1], gram[:-1, -1]
        if not bool((products < 0).any()):
            return None
        torch._foreach_zero_([p.grad for p in self.model.parameters() if p.grad is not None])
        weights = solve_dual(past.cpu().numpy(), 0 * products.cpu().numpy(), self.margin)
        return torch.from_numpy(weights).to(gram.device)
