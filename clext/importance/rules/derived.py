"""Rule of parameters that are not used themselves, but something that is calculated from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clext.importance.rule import LayerRule

if TYPE_CHECKING:
    from clext.importance.call import Path


class DerivedRule(LayerRule):
    """As `rule`, for the parameter that `path` leads back to from the gradient of its layer's.

    Tables of relative positions, weight norms, standardised weights: linear, but no selection of
    entries. So the gradient of each sample goes back by itself.
    """

    def __init__(self, rule: LayerRule, path: Path, parameter: Tensor) -> None:
        super().__init__(rule.layer)
        self._rule, self._path, self._parameter = rule, path, parameter

    asks_nodes = True

    def row_dims(self, dims: int) -> tuple[int, int]:
        return self._rule.row_dims(dims)

    def features(self, inputs: Tensor) -> Tensor:
        return self._rule.features(inputs)

    def gradient(self, name: str, features: Tensor, g: Tensor) -> Tensor:
        gradients = self._rule.gradient(name, features, g)
        return torch.stack([self._path.back(gradient) for gradient in gradients]).to(g.dtype)

    def scratch(self, name: str, features: Tensor) -> int:
        return self._rule.scratch(name, features) + 2 * self._parameter.numel()
