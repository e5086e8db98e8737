"""The part of a method that learns: a task's beginning, the loss of a batch, a prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clext.core.batches import class_labels
from clext.methods.parts.batch import check_examples_of_task, checked_batch, labelled
from clext.methods.parts.heads import Outputs, check_range
from clext.methods.stateful import Stateful

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from clext.importance.passes import Batches
    from clext.methods.stateful import Commit

# What a task is trained on: tensors with one row for each example. A row of each is what the loss
# takes: inputs and labels, and what a method has added.
Examples = tuple[Tensor, ...]


class Learning(Stateful):
    """What `Method` does beside its penalty: the hooks of methods that learn otherwise.

    A subclass overrides what it needs of `_begin_task`, `_loss`, `_predict` and `_prepare_end`, and
    the three functions of extra state if it keeps anything but counters and one tensor for each
    parameter. `recordable` says whether the loss can be captured in a CUDA graph: it does nothing
    on the host that differs from step to step, and reads nothing that moves in memory.
    """

    recordable: bool = True
    # Whether `add_penalty_grad_` runs the model: in the precision of the loss then.
    runs_model_in_step: ClassVar[bool] = False
    # Whether the loss alone keeps what was learned before: with another one nothing would.
    keeps_by_loss: ClassVar[bool] = False

    def __init__(self, model: nn.Module, *, strength: float | None = None) -> None:
        super().__init__(model, strength=strength)
        self.outputs = Outputs(model)
        self._rehearsal: Learning | None = None
        self._is_part = False  # the rehearsal of another method
        # Since the last task ended.
        self._was_used = False
        self._has_made_loss = False
        self._has_pulled = False

    # ------------------------------------------------------------------ in the loop

    def begin_task(
        self,
        examples: Examples | None = None,
        *,
        block: range | None = None,
        active: range | None = None,
    ) -> Examples | None:
        """Begin a task; returns what it is to be trained on.

        Follows a change of the model since the last task: see `refresh_parameters`.

        Args:
            examples: inputs [N, ...] and labels [N] int64 of the task, on the model's device, for
                methods that prepare something for the whole task or train on more than its own
                data (joint, iCaRL); others do without.
            block: which of the model's outputs are the classes of this task; None: all of them.
            active: with which outputs they compete: the task's own (a head for each task), or
                those of all classes seen (a growing head). From now on the model returns these
                alone, by a forward hook, and labels count from the first of them. None: all
                outputs, without a hook.

        Returns:
            Tensors with a row for each example to train on; the same rows of each are the arguments
            of `loss`. The given examples for most methods, and None if none were given.

        Raises:
            ValueError: block or active is no such range, the examples are not what the method can
                work on, or not of the block, or a parameter has shrunk; nothing is changed.
        """
        self._refuse_if_part("begin_task")
        if examples is not None:
            check_examples_of_task(self.label, examples)
        self.refresh_parameters()
        active_before, blocks_before = self.outputs.active, self.outputs.blocks
        self.outputs.begin_task(block, active, ended=self.tasks)
        try:
            if examples is not None and block is not None:
                labels = class_labels(self.label, examples[1], len(examples[0]))
                self.outputs.check_labels_of_task(self.label, labels)
            begun = self._learner._begin_task(examples)
        except BaseException:
            self.outputs.blocks = blocks_before
            self.outputs.select(active_before)
            raise
        self._was_used = True
        return begun

    def loss(self, *batch: Tensor) -> Tensor:
        """The loss of a batch without the penalty (0-dim, differentiable).

        Args:
            *batch: inputs [N, ...] and integer labels [N], or the same rows of all that
                `begin_task` returned.

        Raises:
            TypeError: that is not what was given.
            ValueError: the batch is empty, its entries have not one row for each example, or the
                model returns no logits [N, outputs]; on the CPU also for labels that are no
                outputs. The method is as it was before.
        """
        self._refuse_if_part("loss")
        learner = self._learner
        batch = checked_batch(batch)
        learner.outputs.check_labels(batch[1], local=not learner._has_global_labels(batch))
        value = learner._loss(*batch)
        learner._has_made_loss = True
        return value

    def predict(self, inputs: Tensor, *, active: range | None = None) -> Tensor:
        """A score for each example and active output, [N, outputs]; the largest is the class.

        In the mode that the model is in: call `model.eval()` before it, as before any prediction.
        Which outputs are active is the model's, so not from several threads with other ones each.

        Args:
            inputs: of the model, N examples.
            active: other outputs than those of the task that was begun last: those of an earlier
                task, where each has a head.

        Raises:
            ValueError: active is no range of outputs, or the model has not so many.
        """
        check_range("predict: active", active)
        if active is None:
            return self._learner._predict(inputs)
        with self.outputs.selected(active):
            return self._learner._predict(inputs)

    def after_step(self) -> None:
        """What is left to do after a step that an optimizer of `clext.optim` has taken.

        The optimizer calls it. Where `optimizer.launch()` was captured in a CUDA graph, call it
        after each replay.
        """

    # ------------------------------------------------------------------ for subclasses

    def check_classes(self, tasks: Sequence[Collection[int]]) -> None:
        """ValueError if the method, as it is, cannot learn tasks with these classes.

        The classes of each task to come, which count from the model's first output.
        """

    def _begin_task(self, examples: Examples | None) -> Examples | None:
        """As `begin_task`; the outputs are selected already. Must leave all as it was if it fails.

        The labels of `examples` are local (see `Outputs`).
        """
        return examples

    def _has_global_labels(self, batch: Examples) -> bool:  # noqa: ARG002
        """Whether the labels of a batch for `_loss` count from the model's first output."""
        return False

    def _loss(self, *batch: Tensor) -> Tensor:
        """As `loss`, of a batch that was checked. By default the cross entropy of the outputs.

        Must leave the method as it was if it fails.
        """
        inputs, labels = labelled(self.name, batch)
        return F.cross_entropy(self.outputs.logits(inputs, labels), labels)

    def _predict(self, inputs: Tensor) -> Tensor:
        scores: Tensor = self.model(inputs)
        return scores

    def _prepare_end(self, dataloader: Batches | None) -> Commit:  # noqa: ARG002
        """All of a task's end that can fail; returns what then changes the method.

        `dataloader` is that of `consolidate`, its labels are local.
        """
        return _nothing

    def _extra_state(self) -> dict[str, Any]:
        """What is kept beside parameters and counters: tensors, numbers, strings, dicts, lists."""
        return {}

    def _prepare_extra_state(self, extra: Mapping[str, Any]) -> Commit:
        """Check what `_extra_state` returned, ValueError if it is not; returns what takes it."""
        if extra:
            raise ValueError(
                f"{self.name}: state_dict['extra'] holds {', '.join(extra)}, expected nothing"
            )
        return _nothing

    def _move_extra_state(self, device: torch.device) -> None:
        """Move what is kept beside the parameters."""

    # ------------------------------------------------------------------ combinations

    @property
    def label(self) -> str:
        """The name, or both names of a combination, as in pictures and tables."""
        return self.name if self._rehearsal is None else f"{self.name}+{self._rehearsal.name}"

    @property
    def parts(self) -> tuple[Learning, ...]:
        """The methods of a combination: this one and its rehearsal; else this one."""
        return (self,) if self._rehearsal is None else (self, self._rehearsal)

    def __repr__(self) -> str:
        return " + ".join(super(Learning, part).__repr__() for part in self.parts)

    @classmethod
    def learns_otherwise(cls) -> bool:
        """Whether this method has a beginning of tasks, a loss or a prediction of its own."""
        hooks = ("_begin_task", "_loss", "_predict")
        return any(getattr(cls, hook) is not getattr(Learning, hook) for hook in hooks)

    def combine(self, rehearsal: Learning) -> Self:
        """Learn with the loss of `rehearsal` from now on, and protect as before; returns self.

        `clext.EWC(model).combine(clext.Replay(model))` is what method="ewc+replay" makes.

        Args:
            rehearsal: a method of the same model that works by its loss: replay, LwF, DGR, ...

        Raises:
            ValueError: it is no method, the two are of different models, or both or neither of
                them work by their loss, or one is combined already; nothing is changed.
        """
        if not isinstance(rehearsal, Learning):
            raise ValueError(
                f"{self.name}: combine expects a method made for the same model, such as "
                "combine(clext.Replay(model)), got "
                f"{rehearsal if isinstance(rehearsal, str | type) else type(rehearsal)!r}"
            )
        for part in (self, rehearsal):
            if part._rehearsal is not None or part._is_part:
                raise ValueError(
                    f"{part.label}: is {'part of ' if part._is_part else ''}a combination already; "
                    "two methods can combine"
                )
        if rehearsal.model is not self.model:
            raise ValueError(
                f"{self.name}: {rehearsal.name} was made for another model; make both for one"
            )
        if any(part.tasks or part.outputs.blocks for part in (self, rehearsal)):
            raise ValueError(
                f"{self.name} and {rehearsal.name}: combine them before their first task begins"
            )
        if self.learns_otherwise() and not rehearsal.learns_otherwise():
            raise ValueError(
                f"{self.name} has a loss of its own, {rehearsal.name} has none: the other way "
                f"round, the {rehearsal.name} is combined with the {self.name}"
            )
        if self.learns_otherwise() or not rehearsal.learns_otherwise() or rehearsal.state_names:
            raise ValueError(
                f"{self.name} does not combine with {rehearsal.name}: expected a method with a "
                "penalty or a change of the gradient (such as ewc) and one with a loss of its own "
                "(such as replay)"
            )
        self._rehearsal, rehearsal.outputs = rehearsal, self.outputs
        rehearsal._is_part = True
        return self

    def _refuse_if_part(self, name: str) -> None:
        """RuntimeError if another method stands for this one: half of the work would be done."""
        if self._is_part:
            raise RuntimeError(
                f"{self.name}: {name} cannot be called: this method is part of a combination; "
                "use the method whose combine() it was given to"
            )

    @property
    def _learner(self) -> Learning:
        """Who begins tasks, and makes losses and predictions."""
        return self if self._rehearsal is None else self._rehearsal

    # ------------------------------------------------------------------ state

    def refresh_parameters(self) -> None:
        """Follow a change of the model: parameters added, grown, replaced, unfrozen or moved.

        As `Stateful.refresh_parameters`, with the same errors, for both methods of a combination.
        """
        super().refresh_parameters()
        if self._rehearsal is not None:
            self._rehearsal.refresh_parameters()

    def to(self, device: str | torch.device) -> Self:
        """Move the state to `device`, where the model has to be already; returns the method."""
        super().to(device)
        for part in self.parts:
            part._move_extra_state(torch.empty(0, device=device).device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything that training needs to go on as if it had not stopped, as copies.

        Plain dicts and lists of tensors, numbers and strings; the options are not among them.
        """
        active = self.outputs.active
        return {
            **super().state_dict(),
            "outputs": {
                "blocks": [[block.start, block.stop] for block in self.outputs.blocks],
                "active": None if active is None else [active.start, active.stop],
            },
            "extra": self._extra_state(),
            "rehearsal": None if self._rehearsal is None else self._rehearsal.state_dict(),
        }

    def _state_dict_keys(self) -> list[str]:
        return [*super()._state_dict_keys(), "outputs", "extra", "rehearsal"]

    def _prepare_load(self, state_dict: Mapping[str, Any]) -> Commit:
        commits = [super()._prepare_load(state_dict)]
        owner = f"{self.name}: state_dict"
        blocks, active = _checked_outputs(owner, state_dict["outputs"])
        extra, rehearsal = state_dict["extra"], state_dict["rehearsal"]
        if not isinstance(extra, dict):
            raise ValueError(f"{owner}['extra'] is {type(extra).__name__}, expected a dict")
        commits.append(self._prepare_extra_state(extra))
        if (rehearsal is None) != (self._rehearsal is None):
            raise ValueError(
                f"{owner} is of {self.name} {'alone' if rehearsal is None else 'in a combination'}"
                f", and this is {self.label}"
            )
        if self._rehearsal is not None:
            commits.append(self._rehearsal._prepare_load(rehearsal))

        def commit() -> None:
            self.outputs.select(active)  # first: it fails if another method has selected some
            for part in commits:
                part()
            self.outputs.blocks = blocks
            # For all that is known.
            self._was_used = self._has_made_loss = self._has_pulled = True

        return commit


def _nothing() -> None:
    """What is left to do where there is nothing to do."""


def _checked_outputs(owner: str, given: object) -> tuple[list[range], range | None]:
    """The outputs of each task, and the active ones, as `state_dict` has them."""
    entries = given if isinstance(given, dict) else {}
    blocks, active = entries.get("blocks"), entries.get("active")
    pairs: list[Any] = [0]
    if isinstance(blocks, list):
        pairs = [*blocks, *([] if active is None else [active])]
    for pair in pairs:
        if not (
            isinstance(pair, list)
            and len(pair) == 2
            and all(type(place) is int for place in pair)
            and 0 <= pair[0] < pair[1]
        ):
            raise ValueError(
                f"{owner}['outputs'] is {given!r}, expected 'blocks', for each task the first and "
                "the end of its outputs, and 'active', the same or None"
            )
    ranges = [range(start, stop) for start, stop in pairs]
    return ranges[: len(blocks or [])], None if active is None else ranges[-1]
