"""Which of a model's outputs count: those of the task, or of all tasks seen.

With a head for each task, and with a head that grows with the classes, a model has outputs that
take no part in the loss of a task. `Outputs` takes them out of what the model returns, so that a
loss, an importance or a prediction need not know of them.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.utils.hooks import RemovableHandle


class Outputs:
    """The outputs of one model that are active now, and those of each task so far.

    While outputs are selected, the model returns the active ones alone, by a forward hook on it.
    Labels that go with such outputs are *local*: they count from the first active output. Labels of
    examples of several tasks are *global*: they count from the model's first output.

    Args:
        model: returns logits [N, outputs].
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._hook: RemovableHandle | None = None
        self._is_full = False
        self.active: range | None = None  # None: all that the model has
        self.blocks: list[range] = []  # of the tasks begun, in their order

    @property
    def start(self) -> int:
        """The first active output: global label = start + local label."""
        return 0 if self.active is None else self.active.start

    @property
    def seen(self) -> int | None:
        """How many outputs the tasks begun so far have; None where nobody said."""
        return max((block.stop for block in self.blocks), default=None)

    def begin_task(self, block: range | None, active: range | None) -> None:
        """A task begins whose classes are the outputs `block`, competing with `active`."""
        if block is not None:
            self.blocks.append(block)
        self.select(active)

    def select(self, active: range | None) -> None:
        """Let the model return the outputs `active`; None for all of them, without a hook."""
        self.active = active
        if active is None and self._hook is not None:
            self._hook.remove()
            self._hook = None
        elif active is not None and self._hook is None:
            self._hook = self._model.register_forward_hook(self._narrow)

    @contextmanager
    def selected(self, active: range | None) -> Iterator[None]:
        """The same for a while."""
        before = self.active
        self.select(active)
        try:
            yield
        finally:
            self.select(before)

    @contextmanager
    def full(self) -> Iterator[None]:
        """Inside, the model returns all its outputs."""
        before, self._is_full = self._is_full, True
        try:
            yield
        finally:
            self._is_full = before

    def cross_entropy(self, inputs: Tensor, labels: Tensor, *, reduction: str = "mean") -> Tensor:
        """The mean loss of examples of any task seen.

        An example competes with the active outputs if its class is among them, else with those of
        its own task.

        Args:
            inputs: of the model, N examples.
            labels: global, int64 [N].
            reduction: "mean", or "none" for the loss of each, [N].
        """
        if not self.apart:
            local = labels - self.start
            return F.cross_entropy(self._model(inputs), local, reduction=reduction)
        with self.full():
            logits = self._model(inputs)
        rivals = self.competing(logits.shape[1], logits.device).index_select(0, labels)
        rivalling = logits.masked_fill(~rivals, -torch.inf)
        return F.cross_entropy(rivalling, labels, reduction=reduction)

    def competing(self, outputs: int, device: torch.device) -> Tensor:
        """Row l: with which of the model's `outputs` the class l competes; bool, square."""
        rivals = torch.eye(outputs, dtype=torch.bool, device=device)
        for block in [*self.blocks, self.active or range(outputs)]:
            rivals[block.start : block.stop, :] = False
            rivals[block.start : block.stop, block.start : block.stop] = True
        return rivals

    @property
    def apart(self) -> bool:
        """Whether a task seen has outputs that are not active (a head for each task)."""
        active = self.active
        return active is not None and any(
            block.start < active.start or block.stop > active.stop for block in self.blocks
        )

    def _narrow(self, _module: nn.Module, _inputs: object, logits: Tensor) -> Tensor | None:
        if self._is_full or self.active is None:
            return None
        return logits[:, self.active.start : self.active.stop]
