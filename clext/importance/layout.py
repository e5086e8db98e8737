"""Layouts of a batch: which rows of a layer's tensors belong to which sample."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clext.importance.capture import output_gradients

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.autograd.graph import Node

    from clext.importance.capture import Call

# All groups of samples but one are probed, by a backward pass each. Of two samples that changed
# places, that shows the one whose group is probed, unless the other is in the same.
_GROUPS = 3

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


def _possible_layouts(leading: Sequence[int], samples: int) -> list[Layout]:
    """Those that the sizes of the leading dimensions allow."""
    if samples == 1:
        return [Layout(0, True)]  # everything is the one sample's
    return [
        Layout(dim, major)
        for dim, size in enumerate(leading)
        if size > 0 and size % samples == 0
        for major in ((True, False) if size > samples else (True,))
    ]


def find_layouts(
    outputs: Tensor, weights: Tensor, calls: Sequence[Call], samples: int
) -> tuple[list[Layout | None], bool]:
    """The layout of each call's rows, None where there is none, and whether other data has it too.

    Where only some samples' outputs are differentiated, by `weights`, the rows of all others have
    no gradient: not even one of rounding.
    """
    possible = [_possible_layouts(call.leading, samples) for call in calls]
    draws = torch.Generator().manual_seed(0)
    group = torch.randperm(samples, generator=draws).to(outputs.device) % _GROUPS
    for k in range(_GROUPS - 1) if samples > 1 else ():
        gradients, _ = output_gradients(outputs, calls, weights * (group == k).unsqueeze(1))
        for c, g in enumerate(gradients):
            if g is not None:
                dims = calls[c].row_dims[1]
                possible[c] = [
                    entry
                    for entry in possible[c]
                    if not bool(entry.rows(g, dims, samples)[group != k].any())
                ]
    # What is zero fits everything, and so does an arrangement that two layouts describe. Of several
    # rows of a sample in one dimension, the data may say which they are.
    lasting = samples == 1 or all(
        len(entries) <= 1 and all(call.leading[entry.dim] == samples for entry in entries)
        for call, entries in zip(calls, possible, strict=True)
    )
    return [entries[0] if entries else None for entries in possible], lasting


def may_reorder(outputs: Tensor, samples: int) -> bool:
    """Whether something on the way to `outputs` has moved rows along a dimension that may count
    samples. Then the layers may see another order in the next batch, although all sizes are equal.
    """
    waiting, seen = [outputs.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            if _MOVING.match(node.name()) and _moves(node, samples):
                return True
            seen.add(node)
            waiting.extend(before for before, _ in node.next_functions)
    return False


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
