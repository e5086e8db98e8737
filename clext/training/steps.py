"""The steps of one task: a batch, its loss, gradients, and the fused optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from clext.core.parameters import device_of
from clext.methods import Method
from clext.methods.base import Examples
from clext.training.evaluate import autocast
from clext.training.optimizers import TaskOptimizer

Function = Callable[[], object]


class Steps:
    """The steps of a task: `run_epoch` takes those of an epoch, each of which is `take`.

    Args:
        method: its model is trained.
        optimizer: of this task, with the method.
        precision: "fp32", or "bf16" for a forward pass in bfloat16.
    """

    losses: Tensor | list[Tensor]  # of the steps of the epoch
    per_epoch: int  # steps

    def __init__(self, method: Method, optimizer: TaskOptimizer, precision: str) -> None:
        self.method, self.optimizer, self.precision = method, optimizer, precision
        self.device = device_of(method.model)

    def run_epoch(
        self,
        shuffle: torch.Generator,
        step_done: Function,
        first: int = 0,
        skipped: Function = lambda: None,
    ) -> Tensor:
        """Train from step `first` on; the loss of each step, penalty included.

        Args:
            shuffle: draws the order of the examples.
            step_done: called after each step.
            first: the steps before it were taken in an earlier run.
            skipped: called when they have been passed over.
        """
        raise NotImplementedError

    def take(self, batch: Any) -> Tensor:  # noqa: ANN401  (as `arguments` takes it)
        """One step on a batch; returns its loss, penalty included."""
        loss = self.backward(batch)
        with autocast(self.device, self.precision if self.method.runs_model else "fp32"):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return loss + self.optimizer.penalty

    def backward(self, batch: Any) -> Tensor:  # noqa: ANN401
        """Loss and gradients of a batch."""
        with autocast(self.device, self.precision):
            loss = self.method.loss(*self.arguments(batch))
        loss.backward()
        return loss.detach()

    def arguments(self, batch: Any) -> Sequence[Any]:  # noqa: ANN401
        """What the loss takes of a batch: here all of it."""
        return (batch,)


class TaskSteps(Steps):
    """One step after the other on rows of a task's examples, each launched by the host.

    Args:
        method: its model is trained.
        optimizer: of this task, with the method.
        examples: what `method.begin_task` returned, on the model's device.
        batch_size: examples in a step; the last batch of an epoch may be smaller.
        precision: "fp32", or "bf16" for a forward pass in bfloat16.
        iterations: steps of an epoch, pass after pass; None: one pass.
    """

    losses: Tensor

    def __init__(
        self,
        method: Method,
        optimizer: TaskOptimizer,
        examples: Examples,
        batch_size: int,
        precision: str,
        iterations: int | None = None,
    ) -> None:
        super().__init__(method, optimizer, precision)
        self.examples, self.batch_size = examples, batch_size
        self._count = len(examples[0]) if iterations is None else iterations * batch_size
        self.per_epoch = -(-self._count // batch_size)
        self.losses = torch.empty(0)

    def run_epoch(
        self,
        shuffle: torch.Generator,
        step_done: Function,
        first: int = 0,
        skipped: Function = lambda: None,
    ) -> Tensor:
        """All examples in an order that `shuffle` draws, or as many as the iterations need."""
        order = self.order_of_epoch(shuffle)
        if first:
            skipped()
        with explained(self._count, self.batch_size):
            return self.train_on(order, step_done, first)

    def order_of_epoch(self, shuffle: torch.Generator) -> Tensor:
        """The examples of an epoch (int64 [N], on the device), as `shuffle` draws them."""
        examples = len(self.examples[0])
        passes = -(-self._count // examples)
        order = torch.cat([torch.randperm(examples, generator=shuffle) for _ in range(passes)])
        return order[: self._count].to(self.device)

    def train_on(self, order: Tensor, step_done: Function, first: int = 0) -> Tensor:
        """Train on the examples `order` (int64 [N]), from step `first` on.

        The losses stay on the device and nothing here waits for it: they are read when the epoch is
        over.
        """
        self.losses = self.empty_losses(len(order))
        self.launch(range(first, len(self.losses)), order, step_done)
        return self.losses[first:]

    def launch(self, steps: Iterable[int], order: Tensor, step_done: Function) -> None:
        """Some of an epoch's steps, each launched by the host."""
        for step in steps:
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            self.losses[step] = self.take(rows)
            self.optimizer.step_done()
            step_done()

    def empty_losses(self, examples: int) -> Tensor:
        """Room for the loss of every step of an epoch."""
        # Not in half precision: a loss of 70,000 is finite, though float16 has no number for it.
        dtype = torch.promote_types(self.examples[0].dtype, torch.float32)
        return torch.empty(-(-examples // self.batch_size), device=self.device, dtype=dtype)

    def arguments(self, batch: Tensor) -> Sequence[Tensor]:
        """The examples at these rows."""
        return [entry.index_select(0, batch) for entry in self.examples]


@contextmanager
def explained(examples: int, batch_size: int) -> Iterator[None]:
    """Say of an error inside, raised by the model, if it may be due to a last batch of one."""
    try:
        yield
    except ValueError as error:
        one = examples % batch_size == 1 and batch_size > 1
        if one and "more than 1 value per channel" in str(error):
            error.add_note(
                f"The last batch of an epoch has one example ({examples} in batches of "
                f"{batch_size}), of which a batch norm can make no statistics; choose another "
                "batch_size."
            )
        raise
