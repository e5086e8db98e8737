"""The steps of one task: a batch, its loss, gradients, and the fused optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from clext.methods import Method
from clext.methods.base import Examples
from clext.training.evaluate import autocast
from clext.training.optimizers import TaskOptimizer

Function = Callable[[], object]


class TaskSteps:
    """One step after the other, each launched by the host.

    Args:
        method: its model is trained.
        optimizer: of this task, with the method.
        examples: what `method.begin_task` returned, on the model's device.
        batch_size: examples in a step; the last batch of an epoch may be smaller.
        precision: "fp32", or "bf16" for a forward pass in bfloat16.
    """

    def __init__(
        self,
        method: Method,
        optimizer: TaskOptimizer,
        examples: Examples,
        batch_size: int,
        precision: str,
    ) -> None:
        self.method, self.optimizer, self.examples = method, optimizer, examples
        self.batch_size, self.precision = batch_size, precision
        self.device = examples[0].device
        self.losses = torch.empty(0)  # of the steps of the epoch

    def run_epoch(self, order: Tensor, step_done: Function, first: int = 0) -> Tensor:
        """Train on the examples `order` (int64 [N]), from step `first` on; the loss of each step,
        penalty included.

        The losses stay on the device and nothing here waits for it: they are read when the epoch is
        over.
        """
        self.losses = self.empty_losses(len(order))
        self.launch(range(first, len(self.losses)), order, step_done)
        return self.losses[first:]

    def launch(self, steps: Iterable[int], order: Tensor, step_done: Function) -> None:
        """Some of an epoch's steps, each launched by the host."""
        batches = order.split(self.batch_size)
        for step in steps:
            self.losses[step] = self.take(batches[step])
            self.optimizer.step_done()
            step_done()

    def empty_losses(self, examples: int) -> Tensor:
        """Room for the loss of every step of an epoch."""
        # Not in half precision: a loss of 70,000 is finite, though float16 has no number for it.
        dtype = torch.promote_types(self.examples[0].dtype, torch.float32)
        return torch.empty(-(-examples // self.batch_size), device=self.device, dtype=dtype)

    def take(self, rows: Tensor) -> Tensor:
        """One step on the examples `rows`; returns its loss, penalty included."""
        loss = self.backward(rows)
        with autocast(self.device, self.precision if self.method.runs_model else "fp32"):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return loss + self.optimizer.penalty

    def backward(self, rows: Tensor) -> Tensor:
        """Loss and gradients of the examples `rows`."""
        batch = [entry.index_select(0, rows) for entry in self.examples]
        with autocast(self.device, self.precision):
            loss = self.method.loss(*batch)
        loss.backward()
        return loss.detach()
