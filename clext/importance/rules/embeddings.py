"""Rules of layers that look up rows of a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clext.importance.rule import LayerRule

if TYPE_CHECKING:
    from clext.importance.rule import Function


class EmbeddingRule(LayerRule):
    """Weight gradient: at each token the sum of its output gradients."""

    def holds(self) -> bool:
        return self.layer.max_norm is None and not self.layer.scale_grad_by_freq

    def row_dims(self, dims: int) -> tuple[int, int]:  # noqa: ARG002
        return 0, 1

    def features(self, inputs: Tensor) -> Tensor:
        return inputs.long()

    def gradient(self, name: str, features: Tensor, g: Tensor) -> Tensor:  # noqa: ARG002
        kept = self._kept(features)
        tokens, width = self.layer.weight.shape
        keys = features + tokens * _number(features)
        keys, sums = _sum_by_key(keys[kept], g[kept])
        flat = g.new_zeros(len(g) * tokens, width)
        return flat.index_copy_(0, keys, sums).view(len(g), tokens, width)

    def add_(
        self,
        acc: Tensor,
        name: str,  # noqa: ARG002
        features: Tensor,
        g: Tensor,
        function: Function,
    ) -> None:
        # Only tokens that occur: first the sum for each token and sample, then for each token.
        _, tokens, sums = self.single_rows(features, g)
        tokens, sums = _sum_by_key(tokens, function(sums))
        acc.index_add_(0, tokens, sums)

    def joins(self, other: LayerRule) -> bool:
        return type(other) is type(self) and other.layer.padding_idx == self.layer.padding_idx

    looks_up = True

    def single_rows(self, features: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept = self._kept(features)
        keys = features * len(g) + _number(features)
        keys, sums = _sum_by_key(keys[kept], g[kept])
        return keys % len(g), keys // len(g), sums

    def _kept(self, tokens: Tensor) -> Tensor:
        padding = self.layer.padding_idx
        return torch.ones_like(tokens, dtype=torch.bool) if padding is None else tokens != padding


class EmbeddingBagRule(EmbeddingRule):
    """Weight gradient: at each token of a bag the bag's output gradient times the token's share.

    For a node of autograd's graph. `layer` has `tokens` [bags, tokens], filled up with padding, and
    `shares` of the same shape; the input is the number of each bag.
    """

    def gradient(self, name: str, features: Tensor, g: Tensor) -> Tensor:
        return super().gradient(name, *self._by_token(features, g))

    def add_(self, acc: Tensor, name: str, features: Tensor, g: Tensor, function: Function) -> None:
        super().add_(acc, name, *self._by_token(features, g), function)

    def joins(self, other: LayerRule) -> bool:
        return other is self

    looks_up = False

    def _by_token(self, bags: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        shares = self.layer.shares[bags].to(g.dtype)
        by_token = g.unsqueeze(2) * shares.unsqueeze(3)
        return self.layer.tokens[bags].flatten(1), by_token.flatten(1, 2)


def _number(tokens: Tensor) -> Tensor:
    """The number of each sample, [samples, 1]."""
    return torch.arange(len(tokens), device=tokens.device).unsqueeze(1)


def _sum_by_key(keys: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct keys, ascending, and the sum of the rows of each, added in their order."""
    keys, order = keys.sort(stable=True)
    distinct, counts = keys.unique_consecutive(return_counts=True)
    if len(distinct) == 0:
        return distinct, rows
    return distinct, torch.segment_reduce(rows[order], "sum", lengths=counts)
