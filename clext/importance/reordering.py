"""Whether a forward pass may have put samples into an order that its data decide."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.autograd.graph import Node

# Names of autograd's nodes for operations that move rows to where an index, or their values, say.
_MOVING = re.compile(r"(Index(?!Fill)|Gather|Scatter|MaskedSelect|MaskedScatter|Sort|Topk|Take)")


def may_reorder(outputs: Tensor, samples: int) -> bool:
    """Whether something on the way to `outputs` has moved rows along a dimension that may count
    samples. Then the layers may see another order in the next batch, although all sizes are equal.
    """
    return any(_moves(node, samples) for node in _graph(outputs) if _MOVING.match(node.name()))


def _graph(outputs: Tensor) -> Iterator[Node]:
    waiting = [outputs.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting.extend(before for before, _ in node.next_functions)


def _moves(node: Node, samples: int) -> bool:
    moved: Sequence[int] = node._input_metadata[0].shape
    dim: int | None = getattr(node, "_saved_dim", None)
    if dim is not None:
        return moved[dim - 2**64 if dim >= 2**63 else dim] % samples == 0  # saved without sign
    if not node.name().startswith(("IndexBackward", "IndexPutBackward")):
        return True
    sizes: Sequence[int] = getattr(node, "_saved_self_sym_sizes", moved)
    # To take one token of each sample, say, is an index by 0, 1, 2, ... in the samples' dimension.
    return any(
        index is not None and size % samples == 0 and not _counts(index, size)
        for size, index in zip(sizes, getattr(node, "_saved_indices", ()), strict=False)
    )


def _counts(index: Tensor, size: int) -> bool:
    """Whether the index is 0, 1, ..., size - 1."""
    return torch.equal(index.flatten(), torch.arange(size, device=index.device))
