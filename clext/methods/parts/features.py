"""The feature extractor: what goes into one layer of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clext.core.modes import module_mode, run_eagerly
from clext.core.processes import apart, inner
from clext.methods.parts.teacher import LARGE_BATCH

if TYPE_CHECKING:
    from collections.abc import Callable


class FeatureExtractor:
    """Reads the input of one layer while the model runs.

    Args:
        owner: who asks, for errors.
        model: from inputs to logits.
        layer: the layer's name in the model; None: the nn.Linear that runs last.
        logits: from inputs to logits, by calling `model`; None: `model`.

    Raises:
        ValueError: the model has no layer of that name.
    """

    def __init__(
        self,
        owner: str,
        model: nn.Module,
        layer: str | None,
        logits: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._owner, self._model, self._layer = owner, model, layer
        self._logits = model if logits is None else logits
        self._inner = inner(model)
        names = [name for name, _ in self._inner.named_modules() if name]
        if layer is not None and layer not in names:
            raise ValueError(
                f"{owner}: the model has no layer '{layer}'; features must be one of "
                f"{', '.join(names) or 'its layers, and it has none'}"
            )

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, size] and all logits [N, outputs] of `inputs`, in the model's mode.

        Raises:
            ValueError: no such layer has run, or it gets no tensor with a row for each example.
        """
        seen: list[object] = []
        hooks = [
            layer.register_forward_pre_hook(lambda _layer, args: seen.extend(args[:1]))
            for name, layer in self._inner.named_modules()
            if (isinstance(layer, nn.Linear) if self._layer is None else name == self._layer)
        ]
        try:
            with run_eagerly(), apart(self._model):
                logits: Tensor = self._logits(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        found = seen[-1] if seen else None
        if not isinstance(found, Tensor) or found.dim() < 1 or len(found) != len(inputs):
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"{self._owner}: layer '{self._layer or 'nn.Linear'}' gets {got} for {len(inputs)} "
                "examples, expected a tensor with a row for each; name another layer with features="
            )
        return found.flatten(1) if found.dim() > 1 else found.unsqueeze(1), logits

    @torch.no_grad()
    def of_many(self, inputs: Tensor) -> Tensor:
        """Features of many inputs, in eval mode."""
        with module_mode(self._model, training=False):
            return torch.cat([self(batch)[0] for batch in inputs.split(LARGE_BATCH)])
