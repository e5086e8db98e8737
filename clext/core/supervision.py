"""Supervision: what of a batch goes into the model, and how labels follow from its outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clext.core.batches import read_batches
from clext.core.checks import choice, flag
from clext.core.forward import LABELS, call_model, entry_of, takes_labels
from clext.core.inputs import described, rows, taken
from clext.core.likelihood import CATEGORICAL, IGNORED, LIKELIHOODS
from clext.core.modes import buffers_kept
from clext.core.processes import ALONE, Processes, apart, own_rows, processes_of
from clext.core.seeding import isolated_rng

if TYPE_CHECKING:
    from clext.core.batches import Batches
    from clext.core.inputs import Inputs
    from clext.core.likelihood import Likelihood

_SAME = 0.01  # of a model's own loss and ours, relative: it may have been rounded in half precision


class SupervisionOptions(TypedDict, total=False):
    """Keywords of every method: see `Supervision`."""

    forward: Callable[[Any, Any], Tensor] | None
    labels: Callable[[Any], Tensor] | None
    loss: Callable[[Any, Any], Tensor] | None
    likelihood: str
    sync: bool


class Supervision:
    """A model, what it is given of a batch, and the likelihood of the labels given its outputs.

    A batch is x, or (x, y, ...) with labels y, or a mapping or dataclass with the labels in its
    entry "labels"; every tensor in it has a row for each sample. The model is called with x: a
    tensor as its argument, a tuple or list as its arguments, a mapping as those keywords that its
    `forward` names. Outputs [N, ...] are what it returns, or the `logits` of what a Transformers
    model returns. Of outputs [N, A, B] with labels [N, A] the classes are in the last dimension, as
    language models have them; a Transformers model's own loss says whether labels are those of the
    next position. A sequence is one sample.

    Args:
        model: whose outputs are meant.
        forward: (model, batch) -> outputs [N, ...], for other models and batches (of which mappings
            come as plain dicts).
        labels: batch -> labels, each for the output of its own place, for other batches.
        loss: (model, batch) -> a loss for each sample [N], which is -log p then, in place of all of
            that. Its mean alone, 0-dim, is enough to train on and for fisher="batch".
        likelihood: of the labels: "categorical" (classes: outputs [N, C, ...] are logits, labels
            int [N, ...], -100 where none counts), "bernoulli" (outputs are logits of labels from 0
            to 1, shaped alike) or "gaussian" (outputs are the mean of labels shaped alike, with
            variance 1).
        sync: where several processes train the model (DDP, FSDP2), what is measured or kept at the
            end of a task is that of all their data, in the process group that the model's wrapper
            or mesh says, or else the default one; they call `consolidate` together. False: each is
            on its own.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        forward: Callable[[Any, Any], Tensor] | None = None,
        labels: Callable[[Any], Tensor] | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        likelihood: str = CATEGORICAL,
        sync: bool = True,
    ) -> None:
        for name, given in (("forward", forward), ("labels", labels), ("loss", loss)):
            if given is not None and not callable(given):
                raise TypeError(f"{name} must be a function, got {described(given)}")
        choice("every method", "likelihood", likelihood, tuple(LIKELIHOODS))
        self._model = model
        self.options = SupervisionOptions(
            forward=forward,
            labels=labels,
            loss=loss,
            likelihood=likelihood,
            sync=flag("every method", "sync", sync),
        )
        self._criterion: Callable[[Tensor, Tensor], Tensor] | None = None
        # What the first batches say of the model, where they are sequences.
        self._classes_last: bool | None = None
        self._shifts: bool | None = None  # labels are those of the next position

    @property
    def likelihood(self) -> Likelihood:
        """Of the labels given the outputs."""
        return LIKELIHOODS[self.options["likelihood"]]

    @property
    def processes(self) -> Processes:
        """Those that train the model together, each on its share of the data."""
        return processes_of(self._model) if self.options["sync"] else ALONE

    @property
    def is_categorical(self) -> bool:
        """Whether labels are classes of outputs; not with a loss of the user's own."""
        return self.options["likelihood"] == CATEGORICAL and not self.gives_losses

    @property
    def gives_losses(self) -> bool:
        """Whether the user's own function gives each sample's loss."""
        return self.options["loss"] is not None

    @contextmanager
    def calling(self, wrapper: nn.Module) -> Iterator[None]:
        """The model is called through its wrapper inside, which reduces gradients (DDP)."""
        model, self._model = self._model, wrapper
        try:
            yield
        finally:
            self._model = model

    @contextmanager
    def trained_on(self, criterion: Callable[[Tensor, Tensor], Tensor] | None) -> Iterator[None]:
        """Inside, losses are `criterion` (outputs, labels) -> [N], or None for the likelihood's.

        What is measured stays that of the likelihood.
        """
        before, self._criterion = self._criterion, criterion
        try:
            yield
        finally:
            self._criterion = before

    # ------------------------------------------------------------------ of a batch

    def read(
        self,
        owner: str,
        batches: Batches | None,
        device: torch.device,
        *,
        samples: int | None = None,
        labelled: bool = True,
        processes: Processes | None = None,
    ) -> Iterator[tuple[Inputs, Tensor | None]]:
        """Inputs and labels of each batch, on `device`; of the first `samples` only.

        Of several processes each reads its share, without what a sampler repeats to give all as
        many. ValueError if there are none, or (with `labelled`) no labels.

        `processes`: where the model does not show them now.
        """
        processes = self.processes if processes is None else processes
        left = None if samples is None else processes.share(samples)
        # All stop after as many rows: a loader may be one that they iterate together.
        ahead = None if samples is None else -(-samples // processes.size)
        if processes.groups and (own := own_rows(batches)) is not None:
            left = own if left is None else min(own, left)
        for index, batch in enumerate(read_batches(owner, batches, device)):
            inputs, labels = self.inputs_and_labels(batch)
            if labels is None and labelled and not self.gives_losses:
                raise ValueError(
                    f"{owner}: batch {index} is {described(batch)}, expected a pair (x, y), or a "
                    f'mapping with the entry "{LABELS}"; where there is a single batch, pass '
                    "[(x, y)]; labels= says where they are in other batches"
                )
            count = _checked_rows(f"{owner}: batch {index}", inputs, labels if labelled else None)
            if left is not None and count > left:
                inputs = taken(inputs, slice(left))
                labels = None if labels is None else labels[:left]
            if left != 0:
                yield inputs, labels
            left = None if left is None else max(left - count, 0)
            ahead = None if ahead is None else ahead - count
            if ahead is not None and ahead <= 0:
                return

    def inputs_and_labels(self, batch: Any) -> tuple[Inputs, Tensor | None]:  # noqa: ANN401
        """What the model is given, or all of the batch for a function of the user's; the labels."""
        inputs, labels = _parted(batch)
        if self.options["labels"] is not None:
            labels = self.options["labels"](batch)
        if self.options["forward"] is not None or self.gives_losses:
            inputs = batch
        return inputs, labels

    def arguments(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        """Inputs, labels and whatever else there is of a batch that a loss was given.

        As its arguments, or whole as the only one; TypeError without labels.
        """
        whole = batch[0] if len(batch) == 1 else batch
        inputs, labels = self.inputs_and_labels(whole)
        if labels is None and not self.gives_losses:
            raise TypeError(
                "loss: got inputs alone, expected labels too: loss(x, y), or a mapping with the "
                f'entry "{LABELS}"'
            )
        if _checked_rows("loss", inputs, labels) == 0:
            raise ValueError(f"loss: got {described(inputs)}, expected at least one example")
        return inputs, labels, *(whole[2:] if isinstance(whole, tuple) else ())

    # ------------------------------------------------------------------ of the model

    def __call__(self, inputs: Inputs) -> Tensor:
        """The outputs that count, [N, ...]."""
        return self.outputs(inputs)

    def outputs(self, inputs: Inputs) -> Tensor:
        """All outputs [N, ...]; ValueError if the model returned something else."""
        if self.options["forward"] is not None:
            outputs = self.options["forward"](self._model, inputs)
        else:
            found = call_model(self._model, _parted(inputs)[0] if self.gives_losses else inputs)
            logits = entry_of(found, "logits")
            outputs = found if logits is None else logits
            if logits is not None and logits.dim() == 3:
                self._classes_last = True
        if not isinstance(outputs, Tensor) or outputs.dim() == 0 or len(outputs) != rows(inputs):
            raise ValueError(
                f"the model returned {described(outputs)} for {rows(inputs)} samples, expected a "
                "tensor with a row for each; forward=(model, batch) -> outputs says which of it"
            )
        return outputs

    def own_losses(self, inputs: Inputs, *, each: bool = True) -> Tensor:
        """What the user's own function gives: [N], or if not `each` is asked for one number."""
        loss, count = self.options["loss"], rows(inputs)
        assert loss is not None
        found = loss(self._model, inputs)
        allowed = (count,) if each else (count, 1)
        if not isinstance(found, Tensor) or found.numel() not in allowed:
            raise ValueError(
                f"loss= returned {described(found)} for {count} samples, expected a loss for each, "
                f'[{count}]; their mean alone is enough for fisher="batch"'
            )
        return found.flatten()

    def mean_losses(self, inputs: Inputs) -> Tensor:
        """The same, [N], where one number is enough: then it stands for each of them."""
        return self.own_losses(inputs, each=False).expand(rows(inputs))

    def losses(self, inputs: Inputs, labels: Tensor | None) -> Tensor:
        """The loss of each sample, [N]; the mean over its positions where it has several."""
        if self.gives_losses:
            return self.own_losses(inputs)
        return self._losses(*self.matched("loss", self(inputs), inputs, labels))

    def loss(self, inputs: Inputs, labels: Tensor | None, outputs: Tensor | None = None) -> Tensor:
        """The mean loss, 0-dim. `outputs`: those that count, where they are known already."""
        if self.gives_losses:
            return self.own_losses(inputs, each=False).mean()
        outputs = self(inputs) if outputs is None else outputs
        pair = self.matched("loss", outputs, inputs, labels)
        return (
            self.likelihood.loss(*pair) if self._criterion is None else self._losses(*pair).mean()
        )

    def _losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of each sample, [N], of outputs and labels that match."""
        if self._criterion is None:
            return self.likelihood.losses(outputs, labels)
        losses = self._criterion(outputs, labels)
        if not isinstance(losses, Tensor) or losses.shape != labels.shape[:1]:
            raise ValueError(
                f"the loss function returned {described(losses)} for {len(labels)} examples, "
                f'expected a loss for each, [{len(labels)}]; of torch\'s give reduction="none"'
            )
        return losses

    # ------------------------------------------------------------------ of outputs and labels

    def matched(
        self, owner: str, outputs: Tensor, inputs: Inputs, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Outputs with the classes in dimension 1, and the labels that belong to them."""
        assert labels is not None  # checked where a batch comes in
        labels = self._of_their_place(inputs, labels)
        if self.is_categorical and outputs.dim() == 3:
            self._look_for_classes(owner, outputs.shape, labels.shape)
            outputs = outputs.transpose(1, 2) if self._classes_last else outputs
        return outputs, self.likelihood.fitted(owner, outputs, labels)

    def as_outputs(self, score: Tensor) -> Tensor:
        """What is shaped as outputs are in `matched`, shaped as the model's."""
        is_turned = self.is_categorical and score.dim() == 3 and self._classes_last
        return score.transpose(1, 2) if is_turned else score

    def _look_for_classes(self, owner: str, outputs: torch.Size, labels: torch.Size) -> None:
        first, last = (labels == outputs[:1] + outputs[d : d + 1] for d in (2, 1))
        if first != last:
            self._classes_last = last
        elif first and self._classes_last is None:
            raise ValueError(
                f"{owner}: of outputs {list(outputs)} the classes may be in dimension 1, as torch "
                "has them, or in the last, as language models do; begin with a batch of another "
                "length, which tells"
            )

    def _of_their_place(self, inputs: Inputs, labels: Tensor) -> Tensor:
        """Labels each of which belongs to the output of its own place."""
        said = any(self.options[name] is not None for name in ("forward", "labels"))
        if said or labels.dim() != 2 or not self.is_categorical:
            return labels
        if self._shifts is None:
            self._shifts = self._takes_next_labels(inputs, labels)
        return _next(labels) if self._shifts else labels

    @torch.no_grad()
    def _takes_next_labels(self, inputs: Inputs, labels: Tensor) -> bool | None:
        """Whether a Transformers model takes the labels for those of the next position.

        Its own loss says so. None where it says nothing: no label of the batch counts.
        """
        if not takes_labels(self._model):
            return False
        with isolated_rng(0, labels.device), buffers_kept(self._model), apart(self._model):
            found = call_model(self._model, inputs, labels)
        own, logits = entry_of(found, "loss"), entry_of(found, "logits")
        if own is None or logits is None or logits.dim() != 3:
            return False
        if not bool(own.isfinite()):
            return None
        by_class = logits.transpose(1, 2).to(torch.promote_types(logits.dtype, torch.float32))
        both = torch.stack(
            [
                self.likelihood.loss(by_class, self.likelihood.fitted("labels", by_class, some))
                for some in (labels, _next(labels))
            ]
        )
        # Of a model that has learned nothing yet the two are nearly equal: the nearer one.
        distances = (both - own).abs().nan_to_num(nan=torch.inf)
        if float(distances.min()) > _SAME * abs(float(own)):
            raise ValueError(
                f"the model's own loss {float(own):.6g} is not that of its logits and labels; say "
                "labels=batch -> the label of each output, or loss=(model, batch) -> losses [N]"
            )
        return bool(distances.argmin())


def _parted(batch: Any) -> tuple[Inputs, Any]:  # noqa: ANN401
    """Inputs and labels, None if there are none, of a batch in its usual form."""
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type | Mapping):
        batch = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    if isinstance(batch, Mapping):
        return batch, batch.get(LABELS)
    return (*batch, None, None)[:2] if isinstance(batch, tuple | list) else (batch, None)


def _checked_rows(owner: str, inputs: Inputs, labels: Tensor | None) -> int:
    """How many samples there are; ValueError if labels are no tensor or not as many."""
    count = rows(inputs)
    if labels is None:
        return count
    if not isinstance(labels, Tensor) or labels.dim() == 0 or len(labels) != count:
        raise ValueError(
            f"{owner}: labels y are {described(labels)} for {count} inputs, expected a tensor with "
            "a label for each; call torch.as_tensor(y)"
        )
    return count


def _next(labels: Tensor) -> Tensor:
    """At each position the label of the next one; none counts at the last."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)
