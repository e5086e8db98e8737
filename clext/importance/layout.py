"""Layouts of a batch: which rows of a layer's tensors belong to which sample."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.autograd.graph import Node

# Names of autograd's nodes for operations that move rows to where an index, or their values, say.
_MOVING = re.compile(r"(Index(?!Fill)|Gather|Scatter|MaskedSelect|MaskedScatter|Sort|Topk|Take)")


@dataclass(frozen=True)
class Layout:
    """Leading dimension `dim` counts the samples, each with several neighbours if `major`.

    Of a dimension of size samples * k, sample n has the entries n * k to n * k + k - 1 if `major`,
    else n, n + samples, n + 2 * samples, ... All other leading dimensions belong to each sample.
    """

    dim: int
    major: bool

    def rows(self, tensor: Tensor, row_dims: int, samples: int) -> Tensor:
        """`tensor` [..., *row] as [samples, rows, *row]."""
        leading = tensor.dim() - row_dims
        shape = (samples, math.prod(tensor.shape[:leading]) // samples, *tensor.shape[leading:])
        if samples > 1:
            each = tensor.shape[self.dim] // samples
            sizes = (samples, each) if self.major else (each, samples)
            tensor = tensor.unflatten(self.dim, sizes).movedim(self.dim + (not self.major), 0)
        return tensor.reshape(shape)


WHOLE = Layout(0, True)  # of one sample, which everything belongs to


def possible_layouts(leading: Sequence[int], samples: int) -> list[Layout]:
    """Those that the sizes of the leading dimensions allow."""
    if samples == 1:
        return [WHOLE]
    return [
        Layout(dim, major)
        for dim, size in enumerate(leading)
        if size > 0 and size % samples == 0
        for major in ((True, False) if size > samples else (True,))
    ]


def may_reorder(nodes: Iterable[Node], samples: int) -> bool:
    """Whether one of the `nodes` has moved rows along a dimension that may count samples.

    Then the layers may see another order in the next batch, although all sizes are equal.
    """
    return any(_MOVING.match(node.name()) and _moves(node, samples) for node in nodes)


def _moves(node: Node, samples: int) -> bool:
    moved: Sequence[int] = node._input_metadata[0].shape
    dim: int | None = getattr(node, "_saved_dim", None)
    if dim is not None:
        return moved[dim - 2**64 if dim >= 2**63 else dim] % samples == 0  # saved without sign
    if not node.name().startswith(("IndexBackward", "IndexPutBackward")):
        return True
    # To take one token of each sample, say, is an index by 0, 1, 2, ... in the samples' dimension.
    sizes: Sequence[int] = getattr(node, "_saved_self_sym_sizes", moved)
    return any(
        index is not None
        and size % samples == 0
        and not torch.equal(index.flatten(), torch.arange(size, device=index.device))
        for size, index in zip(sizes, getattr(node, "_saved_indices", ()), strict=False)
    )
