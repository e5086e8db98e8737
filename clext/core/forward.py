"""Forward pass of a model on the inputs of a batch, and what is taken of what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from clext.core.inputs import Inputs

LABELS = "labels"  # the entry of a batch that is a mapping


def call_model(model: nn.Module, inputs: Inputs) -> Any:  # noqa: ANN401
    """What the model returns: for a tensor, for the tensors of a tuple or list as its arguments, or
    for those entries of a mapping that its `forward` names, but not the labels.
    """
    if not isinstance(inputs, Mapping):
        return model(inputs) if isinstance(inputs, Tensor) else model(*inputs)
    inner, names = _innermost(model)
    # An encoder-decoder makes the decoder's inputs of the labels.
    makes_inputs = getattr(getattr(inner, "config", None), "is_encoder_decoder", False)
    left_out = () if makes_inputs else (LABELS,)
    return model(
        **{
            name: entry
            for name, entry in inputs.items()
            if (name in names or not names) and name not in left_out
        }
    )


def call_with_labels(model: nn.Module, inputs: Inputs, labels: Tensor) -> Any:  # noqa: ANN401
    """The same with the labels, for which a Transformers model returns its own loss too; None of a
    model that takes none.
    """
    _, names = _innermost(model)
    if LABELS not in names:
        return None
    if not isinstance(inputs, Mapping):
        return model(*((inputs,) if isinstance(inputs, Tensor) else inputs), labels=labels)
    return model(**{n: e for n, e in {**inputs, LABELS: labels}.items() if n in names})


def entry_of(found: Any, name: str) -> Any:  # noqa: ANN401
    """An entry of what a Transformers model returns; None if it is not there."""
    return found.get(name) if isinstance(found, Mapping) else getattr(found, name, None)


def _innermost(model: nn.Module) -> tuple[nn.Module, set[str]]:
    """The model inside of wrappers whose `forward` takes anything (DDP, torch.compile, PEFT), and
    the names that its own takes; none where it takes anything itself.
    """
    while True:
        parameters = inspect.signature(model.forward).parameters.values()
        variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        names = {entry.name for entry in parameters if entry.kind not in variable}
        inside = (getattr(model, name, None) for name in ("module", "_orig_mod"))
        inner = next((entry for entry in inside if isinstance(entry, nn.Module)), None)
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()  # type: ignore[operator]
        if names or inner is None or inner is model:
            return model, names
        model = inner
