"""Heads: which of a model's outputs count, those of the task or of all classes seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clext.core.batches import class_labels
from clext.core.inputs import described, flatten, is_plain, mapped, rows, taken
from clext.core.modes import module_mode
from clext.core.parameters import device_of
from clext.core.processes import apart
from clext.core.supervision import Supervision

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Unpack

    from clext.core.batches import Batches
    from clext.core.inputs import Inputs
    from clext.core.supervision import SupervisionOptions


class Heads(Supervision):
    """The outputs of one model that are active now, and those of each task so far.

    `heads(inputs)` are the outputs, cut to the active ones; the model itself is not touched and
    returns all of them. Labels that go with active outputs are *local*: they count from
    the first of these. Labels of examples of several tasks are *global*: they count from the
    model's first output.

    Args:
        model: its outputs are logits [N, outputs] where tasks have heads.
        options: see `Supervision`.
    """

    def __init__(self, model: nn.Module, **options: Unpack[SupervisionOptions]) -> None:
        super().__init__(model, **options)
        self.active: range | None = None  # None: all that the model has
        self.blocks: list[range] = []  # of the tasks begun, in their order

    def __call__(self, inputs: Inputs) -> Tensor:
        """Outputs that are active, [N, active] (or [N, ...] where all are)."""
        return self.narrow(self.outputs(inputs))

    def logits(self, inputs: Inputs) -> Tensor:
        """All outputs, [N, outputs]; ValueError if the model returns something else."""
        return _as_logits(self.outputs(inputs))

    def narrow(self, logits: Tensor, active: range | None = None) -> Tensor:
        """The columns of the active outputs, or of those given."""
        active = self.active if active is None else active
        if active is None:
            return logits
        _as_logits(logits)
        if logits.shape[1] < active.stop:
            raise ValueError(
                f"outputs {active.start} to {active.stop - 1} are active, so the model must return "
                f"logits [N, >= {active.stop}], got {list(logits.shape)}; say other outputs, or "
                "add them to it"
            )
        return logits[:, active.start : active.stop]

    @property
    def start(self) -> int:
        """The first active output: global label = start + local label."""
        return 0 if self.active is None else self.active.start

    @property
    def seen(self) -> int | None:
        """How many outputs the tasks begun so far have; None where nobody said."""
        return max((block.stop for block in self.blocks), default=None)

    @property
    def classes(self) -> range | None:
        """Local labels of the task begun last; None where nobody said."""
        if not self.blocks:
            return None
        block = self.blocks[-1]
        return range(block.start - self.start, block.stop - self.start)

    @property
    def apart(self) -> bool:
        """Whether a task seen has outputs that are not active (a head for each task)."""
        active = self.active
        return active is not None and any(
            block.start < active.start or block.stop > active.stop for block in self.blocks
        )

    def begin_task(self, block: range | None, active: range | None, *, ended: int) -> None:
        """A task begins whose classes are the outputs `block`, competing with `active`.

        Begun once more, it takes the place of itself.

        Args:
            block: of the task; None: nothing is said of it.
            active: outputs that compete, `block` among them; None: all.
            ended: how many tasks have ended.

        Raises:
            ValueError: they are not such ranges; nothing is changed.
        """
        check_range("begin_task: block", block)
        check_range("begin_task: active", active)
        if active is not None:
            if not self.is_categorical:
                raise ValueError(
                    f"begin_task: active={active} is for classes, which loss= and likelihood= "
                    "here have not; leave it out"
                )
            if block is None:
                raise ValueError(
                    f"begin_task: active={active} needs block, the outputs of the task itself"
                )
            if not (active.start <= block.start and block.stop <= active.stop):
                raise ValueError(
                    f"begin_task: block={block} is not within active={active}; the task's own "
                    "outputs are among those that compete"
                )
            if len(self.blocks) < ended:
                raise ValueError(
                    f"begin_task: of {ended} earlier tasks {len(self.blocks)} were begun with a "
                    "block; say it for all tasks, from the first"
                )
        self.active, self.blocks = active, self.blocks[:ended]
        if block is not None:
            self.blocks += [block] * (ended - len(self.blocks) + 1)

    def check_width(self, owner: str, outputs: int, known: int) -> None:
        """ValueError if the model has not all the outputs that a method knows from before."""
        if outputs < known:
            raise ValueError(
                f"{owner}: the model has {outputs} outputs, and {known} when earlier tasks ended: "
                "a head may grow but not shrink; make a new method for this model"
            )

    @torch.no_grad()
    def count(self, inputs: Inputs) -> int:
        """How many outputs the model has, as it makes them of inputs like these."""
        with module_mode(self._model, training=False), apart(self._model):
            return self.logits(taken(inputs, slice(2))).shape[1]

    def read_examples(
        self, owner: str, batches: Batches | None, ended: int
    ) -> Iterator[tuple[Inputs, Tensor]]:
        """Batches of the task after `ended` others, on the model's device, with global labels.

        ValueError if they have no labels, are not finite (one NaN that is kept would be in every
        later task), or not of the task's classes.
        """
        classes: range | None = None
        device = device_of(self._model)
        for inputs, labels in self.read(owner, batches, device):
            check_plain(owner, inputs)
            for entry in flatten(inputs)[0]:
                if entry.is_floating_point() and not bool(entry.isfinite().all()):
                    raise ValueError(
                        f"{owner}: inputs hold NaN or infinity; leave these examples out"
                    )
            if labels is not None and self.has_classes(labels):
                classes = classes or self._classes(inputs, ended)
                labels = class_labels(owner, labels, rows(inputs), classes)
            yield mapped(Tensor.detach, inputs), self.with_start(inputs, labels)

    def with_start(self, inputs: Inputs, labels: Tensor | None) -> Tensor:
        """The global labels of local ones; zeros where a loss of the user's own knows them."""
        if labels is None:
            return torch.zeros(rows(inputs), dtype=torch.int64, device=device_of(self._model))
        return labels.long() + self.start if self.has_classes(labels) else labels

    def has_classes(self, labels: Tensor) -> bool:
        """Whether they say a class of each whole example."""
        return self.is_categorical and labels.dim() == 1

    def _classes(self, inputs: Inputs, ended: int) -> range:
        """The local labels that may occur."""
        if self.classes is not None and len(self.blocks) > ended:
            return self.classes
        return range(self.count(inputs) if self.active is None else len(self.active))

    def loss_over_tasks(self, inputs: Inputs, labels: Tensor, *, reduction: str = "mean") -> Tensor:
        """The loss of examples of any tasks seen.

        An example competes with the active outputs if its class is among them, else with those of
        its own task.

        Args:
            inputs: of the model, N examples.
            labels: global.
            reduction: "mean", or "none" for the loss of each, [N].
        """
        if not self.apart:
            labels = labels - self.start if self.start else labels
            each = reduction == "none"
            return self.losses(inputs, labels) if each else self.loss(inputs, labels)
        return self._apart_loss(self.logits(inputs), labels, reduction)

    def known_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """`loss_over_tasks` of classes, where the logits for all outputs are known: 0-dim."""
        if self.apart:
            return self._apart_loss(logits, labels, "mean")
        return self.loss(logits, labels - self.start, self.narrow(logits))

    def _apart_loss(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        if self._criterion is not None:
            losses = self._of_each_task(logits, labels)
            return losses if reduction == "none" else losses.mean()
        rivals = self.competing(logits.shape[1], logits.device).index_select(0, labels)
        rivalling = logits.masked_fill(~rivals, -torch.inf)
        return F.cross_entropy(rivalling, labels, reduction=reduction)

    def _of_each_task(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss [N] that is trained on, task by task: each has outputs of its own."""
        # The active ones last: they count where they overlap with others.
        blocks = dict.fromkeys([*self.blocks, self.active or range(logits.shape[1])])
        found = []
        for block in blocks:
            rows = ((labels >= block.start) & (labels < block.stop)).nonzero().flatten()
            if len(rows) > 0:
                own = logits[rows, block.start : block.stop]
                found.append((rows, self._losses(own, labels[rows] - block.start)))
        losses = found[0][1].new_full((len(labels),), torch.nan)
        for rows, part in found:
            losses = losses.index_put((rows,), part)
        return losses

    def competing(self, outputs: int, device: torch.device) -> Tensor:
        """Row l: with which of the model's `outputs` the class l competes; bool, square."""
        # A class of no task has no rivals, not even itself: its loss is NaN and not zero.
        rivals = torch.zeros(outputs, outputs, dtype=torch.bool, device=device)
        for block in [*self.blocks, self.active or range(outputs)]:
            rivals[block.start : block.stop, block.start : block.stop] = True
        return rivals

    def state_dict(self) -> dict[str, Any]:
        """Blocks and active outputs, as pairs of first and end."""
        active = self.active
        return {
            "blocks": [[block.start, block.stop] for block in self.blocks],
            "active": None if active is None else [active.start, active.stop],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        active = state["active"]
        blocks = [range(start, stop) for start, stop in state["blocks"]]
        self.active, self.blocks = None if active is None else range(*active), blocks


def _as_logits(outputs: Tensor) -> Tensor:
    if outputs.dim() != 2:
        raise ValueError(
            f"the model returned {list(outputs.shape)} for {len(outputs)} examples, expected "
            f"logits [{len(outputs)}, outputs], which heads and teachers are made for"
        )
    return outputs


def check_plain(owner: str, inputs: Inputs) -> None:
    """ValueError for inputs that a state dict cannot keep."""
    if not is_plain(inputs):
        raise ValueError(
            f"{owner}: inputs are {described(inputs)}, expected tensors, tuples, lists and "
            "mappings, which can be kept in a state dict; make the loader give such"
        )


def check_range(name: str, given: object) -> None:
    """ValueError unless it is a range of outputs, or None."""
    if given is None:
        return
    if not isinstance(given, range) or given.step != 1 or not 0 <= given.start < given.stop:
        raise ValueError(f"{name} must be a range of outputs, such as range(2, 4), got {given!r}")
