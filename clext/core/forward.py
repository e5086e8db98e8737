"""Forward pass of a model on the inputs of a batch, and what is taken of what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from clext.core.inputs import Inputs

LABELS = "labels"  # the entry of a batch that is a mapping


def call_model(model: nn.Module, inputs: Inputs, *, with_labels: bool = False) -> Any:  # noqa: ANN401
    """What the model returns: for a tensor, for the tensors of a tuple or list as its arguments, or
    for those entries of a mapping that its `forward` names.

    `with_labels`: the labels are among these, so that a Transformers model returns its loss too.
    """
    if isinstance(inputs, Tensor):
        return model(inputs)
    if not isinstance(inputs, Mapping):
        return model(*inputs)
    inner, names = _innermost(model)
    # An encoder-decoder makes the decoder's inputs of the labels.
    config = getattr(inner, "config", None)
    with_labels = with_labels or getattr(config, "is_encoder_decoder", False)
    return model(
        **{
            name: entry
            for name, entry in inputs.items()
            if (name in names or not names) and (name != LABELS or with_labels)
        }
    )


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
