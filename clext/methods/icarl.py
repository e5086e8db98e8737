"""iCaRL: exemplars of every class, a classifier by the nearest of their means, and distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clext.core.batches import added_logits, check_alike, class_labels, owned
from clext.core.checks import flag, integer, softening
from clext.core.inputs import mapped, one_tensor
from clext.core.parameters import device_of
from clext.methods.base import Method
from clext.methods.parts.exemplars import (
    Sets,
    class_mean,
    exemplars_per_set,
    herd,
    joined,
    map_sets,
    prepared,
)
from clext.methods.parts.features import FeatureExtractor
from clext.methods.parts.teacher import Teacher, check_teacher

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from typing import Unpack

    from clext.core.batches import Batches
    from clext.core.inputs import Inputs
    from clext.core.supervision import SupervisionOptions
    from clext.methods.base import Examples


class ICaRL(Method):
    """iCaRL: incremental classifier and representation learning (Rebuffi et al. 2017, 1611.07725).

    Of each class the budget / (classes seen) examples are kept whose running mean stays nearest to
    the class's mean, in the model's features. A task is trained on its examples and all exemplars,
    with a binary cross entropy for each output: the targets of the task's own classes are 1 for
    the label and else 0, those of earlier classes what the model gave before the task (after a
    sigmoid). It is summed over the outputs and averaged over the batch. An example is put into the
    class whose mean of exemplars is nearest to its features.

    It is made for class-incremental runs. Where tasks have a head each, an exemplar of another
    task has no part in the loss of this task's outputs. Where the classes are the same in all
    tasks, nothing is distilled, and the exemplars of a class are shared by the tasks that had it.

    While a task is learned there are no exemplars of its classes: their means are those of all the
    examples that `begin_task` was given. Where no class has exemplars, the logits decide. Without
    examples in `begin_task` a loop of your own trains on its own batches alone; what the earlier
    model gives for them is then computed in each step.

    The exemplars are bounded by the budget; beside them one copy of the model is kept, and during a
    task its examples, by reference.

    Args:
        model: see `Method`.
        strength: none; there is no penalty.
        budget: how many exemplars are kept in all, at least one for each class, and where tasks
            share classes, for each class of each task.
        features: the name of the layer whose input are the features, or its number in an
            nn.Sequential, None for the nn.Linear that runs last.
        norm: bring features and their means to length 1.
        temperature: what the logits of the model before the task are divided by, from 1e-4 to 1e4;
            1 in the paper, 2 in the comparison of van de Ven and Tolias (2018, arXiv:1809.10635).

    Raises:
        ValueError: an option is out of range, or the model has no layer of that name; or, at the
            beginning of a task (in `clext.train` before the first one), the budget is smaller than
            the number of classes.
    """

    name: ClassVar[str] = "icarl"
    needs_classes: ClassVar[bool] = True
    needs_whole: ClassVar[bool] = True
    has_own_loss: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | None = None,
        budget: int = 2000,
        features: str | int | None = None,
        norm: bool = True,
        temperature: float = 1.0,
        **supervision: Unpack[SupervisionOptions],
    ) -> None:
        super().__init__(model, strength=strength, **supervision)
        self.budget = integer(self.name, "budget", budget, minimum=1)
        if not isinstance(features, str | int | None) or isinstance(features, bool):
            raise ValueError(f"{self.name}: features must be a layer's name, got {features!r}")
        self.features = None if features is None else str(features)
        self.norm = flag(self.name, "norm", norm)
        self.temperature = softening(self.name, temperature)
        self._features = FeatureExtractor(self.name, model, self.features, self.heads.logits)
        self._sets: Sets = {}
        self._previous: Teacher | None = None
        self._current: tuple[Tensor, Tensor] | None = None  # of the task, with global labels
        self._classes: list[int] | None = None  # of these; None: all of the task's block
        self._means: dict[int, Tensor] | None = None  # by class, of the model as it is now

    def _follow_model(self) -> None:
        device = device_of(self.model)
        self._sets = map_sets(self._sets, lambda entry: entry.to(device))
        if self._previous is not None:
            self._previous.to(device)
        if self._current is not None:
            self._current = self._current[0].to(device), self._current[1].to(device)
        self._means = None

    def _after_step(self) -> None:
        self._means = None

    # ------------------------------------------------------------------ learning

    def check_classes(self, tasks: Sequence[Collection[int]]) -> None:
        """ValueError if the budget has not one exemplar for each class of each of these tasks."""
        coming = [label for classes in tasks for label in classes]
        exemplars_per_set(self.name, self._sets, coming, self.budget)

    def _begin_task(self, examples: Examples | None) -> Examples | None:
        if examples is None:
            coming = self.heads.blocks[-1] if self.heads.blocks else ()
            exemplars_per_set(self.name, self._sets, coming, self.budget)
            self._current = self._classes = None
            return None
        inputs = one_tensor(self.name, owned(examples[0]))
        inputs, labels = own = inputs, examples[1].long() + self.heads.start
        classes = labels.unique().tolist()
        exemplars_per_set(self.name, self._sets, classes, self.budget)
        if (kept := joined(self._sets)) is not None:
            check_alike(self.name, inputs, kept[0], "of the exemplars")
            inputs, labels = torch.cat([inputs, kept[0]]), torch.cat([labels, kept[1]])
        outputs = self.heads.count(inputs)
        self.heads.check_width(self.name, outputs, max(self._sets, default=-1) + 1)
        old = self._old_outputs(self._width(outputs), labels.device, classes)
        targets = self._targets(inputs, labels, old)
        self._current, self._classes = own, classes
        return inputs, labels, targets

    def _width(self, outputs: int) -> int:
        """How many of all `outputs` have a part in the loss: those of the tasks begun, or all."""
        active = self.heads.active
        return outputs if active is None else max(active.stop, self.heads.seen or 0)

    def _targets(self, inputs: Tensor, labels: Tensor, old: Tensor) -> Tensor:
        """What the sigmoids of the outputs should be that `old` tells of, [N, width]."""
        width = len(old)
        dtype = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        one_hot = torch.eye(width, dtype=dtype, device=labels.device)
        targets = one_hot.index_select(0, labels)
        if self._previous is not None and self.heads.blocks[:-1]:
            before = self._previous.record(inputs)[:, :width].to(dtype)
            before = (before / self.temperature).sigmoid()
            # The head may have been narrower then.
            before = F.pad(before, (0, width - before.shape[1]))
            targets = torch.where(old, before, targets)
        return targets

    def _old_outputs(self, width: int, device: torch.device, classes: list[int] | None) -> Tensor:
        """Which of the first `width` outputs are of classes that only earlier tasks had, [width].

        `classes` are those of the current task, None all of its block. (A block may reach over
        classes of others, where tasks share some.)
        """
        old = torch.zeros(width, dtype=torch.bool, device=device)
        for block in self.heads.blocks[:-1]:
            old[block.start : block.stop] = True
        for block in self.heads.blocks[-1:]:
            for part in [block] if classes is None else [range(k, k + 1) for k in classes]:
                old[part.start : part.stop] = False
        return old

    def _loss(self, inputs: Inputs, labels: Any, *more: Any) -> Tensor:  # noqa: ANN401
        """Of a batch of what `begin_task` returned, or of inputs and local labels."""
        inputs = one_tensor(self.name, inputs)
        labels = class_labels("loss", labels, len(inputs))
        self._means = None  # the model is about to change
        targets = added_logits(len(inputs), more)
        logits = self.heads.logits(inputs)
        if targets is None:
            labels = labels + self.heads.start
            old = self._old_outputs(self._width(logits.shape[1]), labels.device, self._classes)
            targets = self._targets(inputs, labels, old)
        width = targets.shape[1]
        losses = F.binary_cross_entropy_with_logits(
            logits[:, :width].to(targets.dtype), targets, reduction="none"
        )
        if self.heads.apart:
            counted = self.heads.competing(logits.shape[1], labels.device)[:, :width]
            counted = counted | self._old_outputs(width, labels.device, self._classes)
            losses = losses * counted.index_select(0, labels)
        return losses.sum(dim=1).mean()

    # ------------------------------------------------------------------ predictions

    def _predict(self, inputs: Tensor, active: range | None) -> Tensor:
        features, logits = self._features(inputs)
        scores = self.heads.narrow(logits, active)
        start = 0 if active is None else active.start
        active = range(start, start + scores.shape[1])
        if not any(label in active for label in self._sets):
            return scores
        means = {label: mean for label, mean in self._class_means().items() if label in active}
        distances = torch.cdist(
            prepared(features, norm=self.norm),
            torch.stack(tuple(means.values())),
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        scores = distances.new_full((len(inputs), len(active)), -torch.inf)
        places = torch.tensor([label - start for label in means], device=scores.device)
        return scores.index_copy(1, places, -distances)

    def _class_means(self) -> dict[int, Tensor]:
        """The mean features of the exemplars of a class; of a new class those of its examples."""
        if self._means is None:
            # Tensors made in inference mode could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                means: dict[int, Tensor] = {}
                for inputs, labels in filter(None, (self._current, joined(self._sets))):
                    features = self._extract(inputs)
                    for label in labels.unique().tolist():
                        means[label] = class_mean(features[labels == label], norm=self.norm)
            self._means = means
        return self._means

    def _extract(self, inputs: Tensor) -> Tensor:
        return prepared(self._features.of_many(inputs), norm=self.norm)

    # ------------------------------------------------------------------ the end of a task

    def _end_task(self, dataloader: Batches | None) -> None:
        check_teacher(self.name, self.model)
        known = next((entries[0] for entries in self._sets.values()), None)
        batches: list[tuple[Tensor, Tensor]] = []
        processes = self.heads.processes
        with processes.together():
            for inputs, labels in self.heads.read_examples(self.name, dataloader, self.tasks):
                known = inputs if known is None else known
                check_alike(self.name, inputs, known, "of the other examples")
                inputs = one_tensor(self.name, inputs)
                batches.append((inputs.clone(), labels))  # a loader may use its tensors again
        if processes.groups:
            found = [own for some in processes.gathered_rows(batches) for own in some]
            batches = mapped(lambda entry: entry.to(device_of(self.model)), found)
        inputs, labels = map(torch.cat, zip(*batches, strict=True))
        coming = labels.unique().tolist()
        counts = exemplars_per_set(self.name, self._sets, coming, self.budget)
        # Cut to copies: a view would keep all that was in memory.
        sets = {
            label: [entry[: counts[label]].clone() for entry in entries]
            for label, entries in self._sets.items()
        }
        features = self._extract(inputs)
        for label in coming:
            rows = (labels == label).nonzero().flatten()
            order = herd(features[rows], counts[label], norm=self.norm)
            sets.setdefault(label, []).append(inputs[rows[order]])
        self._sets = dict(sorted(sets.items()))
        self._previous = Teacher(self.model, self.heads.logits)
        self._current = self._classes = self._means = None

    # ------------------------------------------------------------------ state

    def _save(self) -> dict[str, Any]:
        extra = {
            "exemplars": map_sets(self._sets, torch.clone),
            "classes": None if self._classes is None else list(self._classes),
            "previous": None if self._previous is None else self._previous.state_dict(),
        }
        return {"extra": extra}

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        extra, device = state["extra"], device_of(self.model)
        self._sets = map_sets(extra["exemplars"], lambda entry: entry.to(device, copy=True))
        self._classes = None if extra["classes"] is None else list(extra["classes"])
        given = extra["previous"]
        self._previous = Teacher.load(self.model, given, self.heads.logits)
        self._current = self._means = None
