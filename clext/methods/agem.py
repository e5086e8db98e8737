"""Averaged Gradient Episodic Memory (Chaudhry et al. 2019, arXiv:1812.00420)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from clext.core.checks import integer
from clext.core.inputs import taken
from clext.methods.projection import GradientProjection

if TYPE_CHECKING:
    from typing import Unpack

    from clext.core.processes import Processes
    from clext.core.supervision import SupervisionOptions


class AGEM(GradientProjection):
    """No step may raise the mean loss on the memories of all past tasks, to first order.

    With g the gradient of the step and r that of the mean loss on a batch drawn from all memories,
    the step is taken along

        g - (g . r) / (r . r) r   where g . r < 0, else along g (equation 11 of the paper).

    Nothing is read back by the host. Each step runs the model forward and backward once over
    `batch` examples. Memory is bounded by `per_task` examples a task and one more gradient.

    Args:
        model: see `Method`.
        strength: none; there is no penalty.
        per_task: examples kept of each task, >= 1; all of a task that has fewer.
        batch: examples drawn at each step from the memories of all tasks, >= 1, each at most once;
            all of them where there are no more.
        seed: of what is drawn, at the end of each task and at each step.
    """

    name: ClassVar[str] = "agem"

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | None = None,
        per_task: int = 256,
        batch: int = 256,
        seed: int = 0,
        **supervision: Unpack[SupervisionOptions],
    ) -> None:
        super().__init__(model, strength=strength, per_task=per_task, seed=seed, **supervision)
        self.batch = integer(self.name, "batch", batch, minimum=1)

    def _row_count(self) -> int:
        return 1

    def _write_rows(
        self, rows: list[Tensor], params: list[nn.Parameter], processes: Processes
    ) -> None:
        examples: Any = self._examples
        labels = examples[1]
        if len(labels) > self.batch:
            drawn = torch.randperm(len(labels), generator=self._random)[: self.batch]
            examples = taken(examples, drawn.to(labels.device))
        self._write_row(rows, 0, params, examples, processes)

    def _weights(self, gram: Tensor) -> Tensor:
        product, square = gram[0, 1:], gram[0, :1]
        return torch.where(product < 0, -product / square, 0.0)
