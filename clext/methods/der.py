"""DER and DER++: dark experience replay (Buzzega et al. 2020, arXiv:2004.07211)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from clext.core.checks import number
from clext.core.inputs import concatenated, rows
from clext.core.lists import state_dtype
from clext.methods.rehearsal import Memory

if TYPE_CHECKING:
    from typing import Unpack

    from clext.core.inputs import Inputs
    from clext.core.supervision import SupervisionOptions


class DER(Memory):
    """Old examples keep the logits that they had when they were seen (equation 6 of the paper).

        loss = CE(f(x), y) + strength * mean of (f(x') - z')^2 + beta * CE(f(x''), y'')

    with (x', z') and (x'', y'') from two draws of the memory; the mean is over examples and logits,
    z are the logits for all outputs, from before the step that learned x. With beta = 0 this is
    DER, with the last term DER++ (`DERpp`). Both cross entropies are over the active outputs, or
    the own ones of an example's task where each has a head. What `loss` is given with gradients on
    is taken into the memory after its step, so that the current task is replayed too, and
    `consolidate` needs no data. All examples go through the model together.

    Where classes are new in each task, DER needs a larger strength than where inputs change, or
    the labels of DER++.

    Args:
        model: see `Method`; all its outputs are there from the first task on.
        strength: weight of the distance to the old logits, alpha in the paper.
        beta: weight of the cross entropy of the second draw.
        budget: how many examples are kept, each with its logits, a label and a random key.
        batch: how many old examples each draw has, None for as many as the batch.
        seed: of the choice and the drawing.

    Raises:
        ValueError: an option is out of range.
    """

    name: ClassVar[str] = "der"
    default_strength: ClassVar[float] = 0.5
    needs_classes: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | None = None,
        beta: float = 0.0,
        budget: int = 2000,
        batch: int | None = None,
        seed: int = 0,
        **supervision: Unpack[SupervisionOptions],
    ) -> None:
        super().__init__(
            model, strength=strength, budget=budget, batch=batch, seed=seed, **supervision
        )
        self.beta = number(self.name, "beta", beta, minimum=0.0)
        self._check_gives_outputs()

    def _loss(self, inputs: Inputs, labels: Any, *more: Any) -> Tensor:  # noqa: ANN401, ARG002
        self._take_in()
        own, count, parts = self.heads.with_start(inputs, labels), rows(inputs), [inputs]
        first = second = None
        if len(self._buffer) > 0:
            self._check_as_kept(inputs, own)
            first = self._buffer.sample(self.batch or count)
            parts.append(first[0]["inputs"])
            if self.beta > 0:
                second = self._buffer.sample(self.batch or count)
                parts.append(second[0]["inputs"])
        logits = list(self.heads.logits(concatenated(parts)).split([*map(rows, parts)]))
        loss = self.heads.loss(inputs, labels, self.heads.narrow(logits[0]))
        if first is not None:
            stored = first[0]["logits"]
            self._check_logits(logits[0], stored)
            loss = loss + self.strength * F.mse_loss(logits[1].to(stored.dtype), stored)
        if second is not None:
            loss = loss + self.beta * self.heads.known_loss(logits[2], second[1])
        kept = logits[0].to(state_dtype(logits[0].dtype))
        self._stream({"inputs": inputs, "logits": kept}, own)
        return loss

    def _kept(self) -> tuple[Inputs, Tensor]:
        tree, labels = super()._kept()
        return tree["inputs"], labels

    def _check_logits(self, logits: Tensor, stored: Tensor) -> None:
        if logits.shape[1] != stored.shape[1]:
            raise ValueError(
                f"{self.name}: the model has {logits.shape[1]} outputs, and the logits in the "
                f"memory are of {stored.shape[1]}; make it with the outputs of all tasks at once"
            )


class DERpp(DER):
    """DER++: DER with the cross entropy of a second draw (equation 7 of the paper).

        loss = CE(f(x), y) + strength * mean of (f(x') - z')^2 + beta * CE(f(x''), y'')

    as in `DER`, which has beta = 0.

    Args:
        model: see `Method`; all its outputs are there from the first task on.
        strength: weight of the distance to the old logits, alpha in the paper.
        beta: weight of the cross entropy of the second draw.
        budget: how many examples are kept, each with its logits, a label and a random key.
        batch: how many old examples each draw has, None for as many as the batch.
        seed: of the choice and the drawing.

    Raises:
        ValueError: an option is out of range.
    """

    name: ClassVar[str] = "derpp"

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | None = None,
        beta: float = 0.5,
        budget: int = 2000,
        batch: int | None = None,
        seed: int = 0,
        **supervision: Unpack[SupervisionOptions],
    ) -> None:
        memory: Any = {"budget": budget, "batch": batch, "seed": seed}
        super().__init__(model, strength=strength, beta=beta, **memory, **supervision)
