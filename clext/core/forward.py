"""Forward pass of a model on the inputs of a batch, and what is taken of what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from clext.core.inputs import Inputs

LABELS = "labels"  # the entry of a batch that is a mapping


def call_model(model: nn.Module, inputs: Inputs, labels: Tensor | None = None) -> Any:  # noqa: ANN401
    """What the model returns: for a tensor, for the tensors of a tuple or list as its arguments, or
    for those entries of a mapping that its `forward` names (all tensors where it takes any).

    `labels`: are given too, for which a Transformers model returns its own loss as well.
    """
    keywords = {} if labels is None else {LABELS: labels}
    if not isinstance(inputs, Mapping):
        return model(*((inputs,) if isinstance(inputs, Tensor) else inputs), **keywords)
    inner, names, takes_all = _innermost(model)
    entries = {**inputs, **keywords}
    # An encoder-decoder makes the decoder's inputs of the labels.
    makes_inputs = getattr(getattr(inner, "config", None), "is_encoder_decoder", False)
    if labels is None and not makes_inputs:
        entries.pop(LABELS, None)
    return model(
        **{
            name: entry
            for name, entry in entries.items()
            if name in names or (takes_all and isinstance(entry, Tensor))
        }
    )


def takes_labels(model: nn.Module) -> bool:
    """Whether `call_model` may give it some."""
    _, names, takes_all = _innermost(model)
    return LABELS in names or takes_all


def entry_of(found: Any, name: str) -> Any:  # noqa: ANN401
    """An entry of what a Transformers model returns; None if it is not there."""
    return found.get(name) if isinstance(found, Mapping) else getattr(found, name, None)


def _innermost(model: nn.Module) -> tuple[nn.Module, set[str], bool]:
    """The model inside of wrappers whose `forward` takes anything (DDP, torch.compile, PEFT), the
    names that its own takes, and whether it takes others too.
    """
    while True:
        parameters = inspect.signature(model.forward).parameters.values()
        kinds = {entry.kind for entry in parameters}
        variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        names = {entry.name for entry in parameters if entry.kind not in variable}
        inside = (getattr(model, name, None) for name in ("module", "_orig_mod"))
        inner = next((entry for entry in inside if isinstance(entry, nn.Module)), None)
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()  # type: ignore[operator]
        if names or inner is None or inner is model:
            return model, names, inspect.Parameter.VAR_KEYWORD in kinds
        model = inner
