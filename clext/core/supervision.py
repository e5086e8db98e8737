"""Supervision: what of a batch goes into the model, and how labels follow from its outputs."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clext.core.batches import read_batches
from clext.core.checks import choice
from clext.core.inputs import described, rows, taken
from clext.core.likelihood import IGNORED, LIKELIHOODS
from clext.core.modes import buffers_kept
from clext.core.seeding import isolated_rng

if TYPE_CHECKING:
    from clext.core.batches import Batches
    from clext.core.inputs import Inputs
    from clext.core.likelihood import Likelihood

LABELS = "labels"  # the entry of a batch that is a mapping
_SAME = 0.01  # of two losses of one batch, which may have been rounded in half precision


class SupervisionOptions(TypedDict, total=False):
    """Keywords of every method: see `Supervision`."""

    forward: Callable[[Any, Any], Tensor] | None
    labels: Callable[[Any], Tensor] | None
    loss: Callable[[Any, Any], Tensor] | None
    likelihood: str


class Supervision:
    """A model, what it is given of a batch, and the likelihood of the labels given its outputs.

    A batch is x, or (x, y, ...) with labels y, or a mapping or dataclass with the labels in its
    entry "labels". The model is called with x: a tensor as its argument, a tuple or list as its
    arguments, a mapping as those keywords that its `forward` takes. Outputs are what it returns,
    [N, ...], or the `logits` of a Transformers model's output; [N, T, C] of such a model counts as
    [N, C, T], and its own loss says whether labels are those of the next position.

    Args:
        model: whose outputs are meant.
        forward: (model, batch) -> outputs [N, ...], for other models and batches.
        labels: batch -> labels, for other batches.
        loss: (model, batch) -> a loss for each sample [N], in place of all of that; -log p is the
            loss then.
        likelihood: of the labels: "categorical" (classes: outputs [N, C, ...] are logits, labels
            int [N, ...], -100 for a position that does not count), "bernoulli" (outputs are logits
            of labels from 0 to 1, shaped alike) or "gaussian" (outputs are the mean of labels
            shaped alike, with variance 1).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        forward: Callable[[Any, Any], Tensor] | None = None,
        labels: Callable[[Any], Tensor] | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        likelihood: str = "categorical",
    ) -> None:
        for name, given in (("forward", forward), ("labels", labels), ("loss", loss)):
            if given is not None and not callable(given):
                raise TypeError(f"{name} must be a function, got {described(given)}")
        choice("supervision", "likelihood", likelihood, tuple(LIKELIHOODS))
        self._model = model
        self.options = SupervisionOptions(
            forward=forward, labels=labels, loss=loss, likelihood=likelihood
        )
        self._shifts: bool | None = None  # labels are those of the next position

    @property
    def likelihood(self) -> Likelihood:
        """Of the labels given the outputs."""
        return LIKELIHOODS[self.options["likelihood"]]

    @property
    def gives_losses(self) -> bool:
        """Whether the user's own function gives each sample's loss."""
        return self.options["loss"] is not None

    # ------------------------------------------------------------------ of a batch

    def read(
        self,
        owner: str,
        batches: Batches | None,
        device: torch.device,
        *,
        samples: int | None = None,
        labelled: bool = True,
    ) -> Iterator[tuple[Inputs, Tensor | None]]:
        """Inputs and labels of each batch, on `device`; of the first `samples` only.

        ValueError if there are none, or (with `labelled`) no labels.
        """
        left = samples
        for index, batch in enumerate(read_batches(owner, batches, device)):
            inputs, labels = self.split(batch)
            if labels is None and labelled and not self.gives_losses:
                raise ValueError(
                    f"{owner}: batch {index} is {described(batch)}, expected a pair (x, y), or a "
                    f'mapping with the entry "{LABELS}"; where there is a single batch, pass '
                    "[(x, y)]; labels= says where they are in other batches"
                )
            count = checked_rows(f"{owner}: batch {index}", inputs, labels if labelled else None)
            if left is not None and count > left:
                inputs = taken(inputs, slice(left))
                labels = None if labels is None else labels[:left]
            yield inputs, labels
            if left is not None:
                left -= min(left, count)
                if left == 0:
                    return

    def split(self, batch: Any) -> tuple[Inputs, Tensor | None]:  # noqa: ANN401
        """What the model, or the user's function, is given, and the labels."""
        whole = batch
        if dataclasses.is_dataclass(batch) and not isinstance(batch, type | Mapping):
            batch = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
        inputs: Inputs = batch
        labels: Any = None
        if isinstance(batch, Mapping):
            labels = batch.get(LABELS)
        elif isinstance(batch, tuple | list):
            inputs, labels = (*batch, None, None)[:2]
        if self.options["labels"] is not None:
            labels = self.options["labels"](whole)
        if self.options["forward"] is not None or self.gives_losses:
            inputs = whole
        return inputs, labels

    def arguments(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        """Inputs, labels and whatever else there is of a batch that a loss was given.

        As its arguments, or whole as the only one; TypeError without labels.
        """
        whole = batch[0] if len(batch) == 1 else batch
        inputs, labels = self.split(whole)
        if labels is None and not self.gives_losses:
            raise TypeError(
                "loss: got inputs alone, expected labels too: loss(x, y), or a mapping with the "
                f'entry "{LABELS}"'
            )
        if checked_rows("loss", inputs, labels) == 0:
            raise ValueError(f"loss: got {described(inputs)}, expected at least one example")
        return inputs, labels, *(whole[2:] if isinstance(whole, tuple) else ())

    # ------------------------------------------------------------------ of the model

    def __call__(self, inputs: Inputs) -> Tensor:
        """The outputs that count, [N, ...]."""
        return self.outputs(inputs)

    def outputs(self, inputs: Inputs, model: nn.Module | None = None) -> Tensor:
        """All outputs [N, ...], of `model` in place of the own one.

        ValueError if the model returned something else.
        """
        model = self._model if model is None else model
        if self.options["forward"] is not None:
            outputs = self.options["forward"](model, inputs)
        else:
            outputs = _outputs_of(_called(model, inputs))
        if not isinstance(outputs, Tensor) or outputs.dim() == 0 or len(outputs) != rows(inputs):
            raise ValueError(
                f"the model returned {described(outputs)} for {rows(inputs)} samples, expected a "
                "tensor with a row for each; forward=(model, batch) -> outputs says which of it"
            )
        return outputs

    def own_losses(self, inputs: Inputs) -> Tensor:
        """What the user's own function gives: [N], or one number for all samples."""
        loss = self.options["loss"]
        assert loss is not None
        found = loss(self._model, inputs)
        count = rows(inputs)
        if not isinstance(found, Tensor) or found.numel() not in (1, count):
            raise ValueError(
                f"loss= returned {described(found)} for {count} samples, expected a loss for each, "
                f"[{count}]"
            )
        return found.flatten()

    def each_loss(self, inputs: Inputs) -> Tensor:
        """The same, where it is a loss for each sample; else ValueError."""
        found = self.own_losses(inputs)
        if len(found) != rows(inputs):
            raise ValueError(
                f"loss= returned one number for {rows(inputs)} samples, expected a loss for each: "
                'return these, or take fisher="batch", which needs no more than their mean'
            )
        return found

    def losses(self, inputs: Inputs, labels: Tensor | None = None) -> Tensor:
        """The loss of each sample, [N]; the mean over its positions where it has several."""
        if self.gives_losses:
            found = self.own_losses(inputs)
            return found if len(found) == rows(inputs) else found.expand(rows(inputs))
        outputs = self(inputs)
        return self.likelihood.losses(outputs, self.fitted("loss", outputs, inputs, labels))

    def loss(self, inputs: Inputs, labels: Tensor | None) -> Tensor:
        """The mean loss, 0-dim."""
        if self.gives_losses:
            return self.own_losses(inputs).mean()
        outputs = self(inputs)
        return self.likelihood.loss(outputs, self.fitted("loss", outputs, inputs, labels))

    def fitted(self, owner: str, outputs: Tensor, inputs: Inputs, labels: Tensor | None) -> Tensor:
        """Labels as the likelihood takes them, those of the next position moved to this one."""
        assert labels is not None  # checked where a batch comes in
        return self.likelihood.fitted(owner, outputs, self._aligned(inputs, labels))

    def _aligned(self, inputs: Inputs, labels: Tensor) -> Tensor:
        """Labels that belong to the outputs of their own place."""
        if self._shifts is None:
            self._shifts = self._takes_next_labels(inputs, labels)
        return _next(labels) if self._shifts else labels

    @torch.no_grad()
    def _takes_next_labels(self, inputs: Inputs, labels: Tensor) -> bool | None:
        """Whether a Transformers model takes the labels for those of the next position.

        Its own loss says so. None where it says nothing: no label of the batch counts.
        """
        said = any(self.options[name] is not None for name in ("forward", "labels"))
        if said or not isinstance(inputs, Mapping) or LABELS not in inputs:
            return False
        with isolated_rng(0, labels.device), buffers_kept(self._model):
            found = _called(self._model, inputs, with_labels=True)
        own = found.get("loss") if isinstance(found, Mapping) else getattr(found, "loss", None)
        if own is None:
            return False
        if not bool(own.isfinite()):
            return None
        outputs = _outputs_of(found)
        candidates = [labels, _next(labels)] if labels.dim() == 2 else [labels]
        for shifts, candidate in enumerate(candidates):
            fitted = self.likelihood.fitted("labels", outputs, candidate)
            if torch.isclose(self.likelihood.loss(outputs, fitted).to(own), own, rtol=_SAME):
                return bool(shifts)
        raise ValueError(
            f"the model's own loss {float(own):.6g} is not that of likelihood="
            f'"{self.likelihood.name}" for these labels; say the likelihood, or labels=batch -> '
            "labels of each output, or loss=(model, batch) -> losses [N]"
        )


def checked_rows(owner: str, inputs: Inputs, labels: Tensor | None) -> int:
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


def _called(model: nn.Module, inputs: Inputs, *, with_labels: bool = False) -> Any:  # noqa: ANN401
    """What the model returns for its inputs."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    if not isinstance(inputs, Mapping):
        return model(*inputs)
    # An encoder-decoder makes the decoder's inputs of the labels.
    config = getattr(model, "config", None)
    with_labels = with_labels or getattr(config, "is_encoder_decoder", False)
    known = inspect.signature(model.forward).parameters
    takes_all = any(entry.kind is entry.VAR_KEYWORD for entry in known.values())
    return model(
        **{
            name: entry
            for name, entry in inputs.items()
            if (takes_all or name in known) and (name != LABELS or with_labels)
        }
    )


def _outputs_of(found: Any) -> Any:  # noqa: ANN401
    """The outputs in what a model returned: a tensor, or the logits of a Transformers output."""
    logits = found.get("logits") if isinstance(found, Mapping) else getattr(found, "logits", None)
    if not isinstance(logits, Tensor):
        return found
    return logits.transpose(1, 2) if logits.dim() == 3 else logits
