"""iCaRL: exemplars of every class, a classifier by the nearest of their means, and distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clext.core.checks import integer, softening
from clext.core.modes import module_mode
from clext.methods.parts.batch import added_logits
from clext.methods.parts.checksum import checksums
from clext.methods.parts.examples import (
    check_alike,
    check_examples,
    count_outputs,
    read_examples,
)
from clext.methods.parts.exemplars import (
    Sets,
    checked_sets,
    class_mean,
    exemplars_per_set,
    herd,
    joined,
    map_sets,
    prepared,
)
from clext.methods.parts.features import Features
from clext.methods.parts.teacher import LARGE_BATCH, Snapshot, refuse_broken
from clext.methods.unpenalised import Unpenalised

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from clext.importance.passes import Batches
    from clext.methods.learning import Examples
    from clext.methods.stateful import Commit


class ICaRL(Unpenalised):
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
            nn.Sequential, None for the nn.Linear that makes the model's outputs.
        norm: bring features and their means to length 1.
        temperature: what the logits of the model before the task are divided by, from 1e-4 to 1e4;
            1 in the paper, 2 in the comparison of van de Ven and Tolias (2018, arXiv:1809.10635).

    Raises:
        ValueError: an option is out of range, or the model has no layer of that name; or, at the
            beginning of a task (in `clext.train` before the first one), the budget is smaller than
            the number of classes.
    """

    name: ClassVar[str] = "icarl"
    keeps_by_loss: ClassVar[bool] = True
    memory: ClassVar[dict[str, str]] = {
        "exemplars": "B*4*X",
        "previous model": "4*(P+Q)",
        "labels of the task": "8*N",
    }

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | None = None,
        budget: int = 2000,
        features: str | int | None = None,
        norm: bool = True,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(model, strength=strength)
        self.budget = integer(self.name, "budget", budget, minimum=1)
        if type(features) is int:  # a layer of an nn.Sequential
            features = str(features)
        if not isinstance(features, str | None):
            raise ValueError(f"{self.name}: features must be a layer's name, got {features!r}")
        if not isinstance(norm, bool):
            raise ValueError(f"{self.name}: norm must be True or False, got {norm!r}")
        self.features, self.norm = features, norm
        self.temperature = softening(self.name, temperature)
        self._features = Features(self, features)
        self._sets: Sets = {}
        self._previous: Snapshot | None = None
        self._current: tuple[Tensor, Tensor] | None = None  # of the task, with global labels
        self._classes: list[int] | None = None  # of these; None: all of the task's block
        # Means by class, and of which values of the model they are.
        self._means: tuple[object, dict[int, Tensor]] | None = None

    # ------------------------------------------------------------------ learning

    def check_classes(self, tasks: Sequence[Collection[int]]) -> None:
        """ValueError if the budget has not one exemplar for each class of each of these tasks."""
        coming = [label for classes in tasks for label in classes]
        exemplars_per_set(self.name, self._sets, coming, self.budget)

    def _begin_task(self, examples: Examples | None) -> Examples | None:
        blocks = self.outputs.blocks
        if examples is None:
            coming = blocks[-1] if blocks else ()
            exemplars_per_set(self.name, self._sets, coming, self.budget)
            self._current = self._classes = self._means = None
            return None
        inputs, labels = own = check_examples(self, examples)
        self._features.find(inputs)
        classes = labels.unique().tolist()
        exemplars_per_set(self.name, self._sets, classes, self.budget)
        if (kept := joined(self._sets)) is not None:
            check_alike(self.name, inputs, kept[0], "of the exemplars")
            inputs, labels = torch.cat([inputs, kept[0]]), torch.cat([labels, kept[1]])
        outputs = count_outputs(self, inputs)
        if self.outputs.active is None:
            self.outputs.check_width(self.name, outputs, max(self._sets, default=-1) + 1)
        width = self._width(outputs)
        old = self._old_outputs(width, labels.device, classes)
        targets = self._targets(inputs, labels, old)
        self._current, self._classes, self._means = own, classes, None
        return inputs, labels, targets

    def _width(self, outputs: int) -> int:
        """How many of all `outputs` have a part in the loss: those of the tasks begun, or all."""
        active = self.outputs.active
        return outputs if active is None else max(active.stop, self.outputs.seen or 0)

    def _targets(self, inputs: Tensor, labels: Tensor, old: Tensor) -> Tensor:
        """What the sigmoids of the outputs should be that `old` tells of, [N, width]."""
        width = len(old)
        dtype = torch.promote_types(self._state.params[0].dtype, torch.float32)
        one_hot = torch.eye(width, dtype=dtype, device=labels.device)
        targets = one_hot.index_select(0, labels)
        if self._previous is not None and self.outputs.blocks[:-1]:
            with self.outputs.full():
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
        for block in self.outputs.blocks[:-1]:
            old[block.start : block.stop] = True
        for block in self.outputs.blocks[-1:]:
            for part in [block] if classes is None else [range(k, k + 1) for k in classes]:
                old[part.start : part.stop] = False
        return old

    def _has_global_labels(self, batch: Examples) -> bool:
        return len(batch) > 2

    def _loss(self, *batch: Tensor) -> Tensor:
        """As `loss`; a batch of what `begin_task` returned, or inputs and local labels."""
        inputs, labels = batch[:2]
        targets = added_logits(self.name, batch)
        with self.outputs.full():
            logits = self.outputs.logits(inputs, labels)
        self.outputs.check_logits(logits)
        if targets is None:
            labels = labels + self.outputs.start
            old = self._old_outputs(self._width(logits.shape[1]), labels.device, self._classes)
            targets = self._targets(inputs, labels, old)
        width = targets.shape[1]
        losses = F.binary_cross_entropy_with_logits(
            logits[:, :width].to(targets.dtype), targets, reduction="none"
        )
        if self.outputs.apart:
            counted = self.outputs.competing(logits.shape[1], labels.device)[:, :width]
            counted = counted | self._old_outputs(width, labels.device, self._classes)
            losses = losses * counted.index_select(0, labels)
        return losses.sum(dim=1).mean()

    # ------------------------------------------------------------------ predictions

    def _predict(self, inputs: Tensor) -> Tensor:
        active = self.outputs.active
        features, logits = self._features(inputs)
        self.outputs.check_logits(logits)
        active = range(logits.shape[1]) if active is None else active
        if not any(label in active for label in self._sets):
            return logits[:, active.start : active.stop]
        means = {label: mean for label, mean in self._class_means().items() if label in active}
        distances = torch.cdist(
            prepared(features, norm=self.norm),
            torch.stack(tuple(means.values())),
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        scores = distances.new_full((len(inputs), len(active)), -torch.inf)
        places = torch.tensor([label - active.start for label in means], device=scores.device)
        return scores.index_copy(1, places, -distances)

    def _class_means(self) -> dict[int, Tensor]:
        """The mean features of the exemplars of a class; of a new class those of its examples."""
        key = self._version()
        if self._means is None or self._means[0] != key:
            # Tensors made in inference mode could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                found: dict[int, Tensor] = {}
                for part in (self._current, joined(self._sets)):
                    found |= {} if part is None else self._means_of(*part)
            self._means = key, found
        return self._means[1]

    def _means_of(self, inputs: Tensor, labels: Tensor) -> dict[int, Tensor]:
        features = self._extract(inputs)
        return {
            label: class_mean(features[labels == label], norm=self.norm)
            for label in labels.unique().tolist()
        }

    @torch.no_grad()
    def _extract(self, inputs: Tensor) -> Tensor:
        """Features of many inputs, in eval mode."""
        with module_mode(self.model, training=False):
            parts = [
                prepared(self._features(batch)[0], norm=self.norm)
                for batch in inputs.split(LARGE_BATCH)
            ]
        return torch.cat(parts)

    def _version(self) -> object:
        """Differs once parameters or buffers have changed.

        By their values: writes through `data` and recorded steps leave no trace on the host.
        """
        values = [*self.model.parameters(), *self.model.buffers()]
        return checksums(values), torch.is_autocast_enabled(values[0].device.type)

    # ------------------------------------------------------------------ the end of a task

    def _prepare_end(self, dataloader: Batches | None) -> Commit:
        refuse_broken(self.name, self.model)
        # A loader may use the tensors of a batch again for the next one.
        batches: list[tuple[Tensor, Tensor]] = []
        for x, y in read_examples(self, dataloader):
            if batches:
                check_alike(self.name, x, batches[0][0], "of the batch before")
            batches.append((x.clone(), y))
        inputs, labels = (torch.cat(entries) for entries in zip(*batches, strict=True))
        del batches
        for known in [entry for entries in self._sets.values() for entry in entries][:1]:
            check_alike(self.name, inputs, known, "of the exemplars")
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
            order = herd(features.index_select(0, rows), counts[label], norm=self.norm)
            chosen = inputs.index_select(0, rows.index_select(0, order))
            sets.setdefault(label, []).append(chosen)
        previous = Snapshot(self.model)

        def commit() -> None:
            self._sets, self._previous = dict(sorted(sets.items())), previous
            self._current = self._classes = self._means = None

        return commit

    # ------------------------------------------------------------------ state

    def _extra_state(self) -> dict[str, Any]:
        return {
            "exemplars": map_sets(self._sets, torch.clone),
            "classes": None if self._classes is None else list(self._classes),
            "previous": None if self._previous is None else self._previous.state_dict(),
        }

    def _prepare_extra_state(self, extra: Mapping[str, Any]) -> Commit:
        owner = f"{self.name}: state_dict['extra']"
        expected = ("exemplars", "classes", "previous")
        if set(extra) != set(expected):
            raise ValueError(
                f"{owner} holds {', '.join(extra) or 'nothing'}, expected {', '.join(expected)}"
            )
        classes = extra["classes"]
        if classes is not None and not _are_classes(classes):
            raise ValueError(f"{owner}['classes'] is {classes!r}, expected integers >= 0, or None")
        given = checked_sets(f"{owner}['exemplars']", extra["exemplars"], self.budget)
        device = self._state.params[0].device
        sets = map_sets(given, lambda entry: entry.to(device, copy=True))
        previous: Snapshot | None = None
        if extra["previous"] is not None:
            previous = Snapshot.load(f"{owner}['previous']", self.model, extra["previous"])

        def commit() -> None:
            self._sets, self._previous = sets, previous
            self._classes = None if classes is None else list(classes)
            self._current = self._means = None

        return commit

    def _move_extra_state(self, device: torch.device) -> None:
        self._sets = map_sets(self._sets, lambda entry: entry.to(device))
        if self._previous is not None:
            self._previous.move(device)
        if self._current is not None:
            self._current = (self._current[0].to(device), self._current[1].to(device))
        self._means = None


def _are_classes(given: object) -> bool:
    return isinstance(given, list) and all(type(label) is int and label >= 0 for label in given)
