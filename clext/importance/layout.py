"""Layouts of a batch: which rows of a layer's tensors belong to which sample."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.autograd.graph import Node
    from torch.nn.utils.rnn import PackedSequence

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

    def rows_each(self, leading: Sequence[int], samples: int) -> int:
        """How many rows a sample has."""
        return math.prod(leading) // samples


WHOLE = Layout(0, True)  # of one sample, which everything belongs to


@dataclass(frozen=True)
class PackedLayout:
    """The leading dimension counts rows of samples of different lengths, as PackedSequence does.

    Row r is number `places[r]` of sample `owners[r]`. What is filled up is zero.
    """

    owners: Tensor = field(compare=False)
    places: Tensor = field(compare=False)
    length: int = field(compare=False)  # of the longest sample

    def rows(self, tensor: Tensor, row_dims: int, samples: int) -> Tensor:  # noqa: ARG002
        """As `Layout.rows`."""
        filled = tensor.new_zeros(samples, self.length, *tensor.shape[1:])
        filled[self.owners, self.places] = tensor
        return filled

    def rows_each(self, leading: Sequence[int], samples: int) -> int:  # noqa: ARG002
        """As `Layout.rows_each`."""
        return self.length


AnyLayout = Layout | PackedLayout


def possible_layouts(
    leading: Sequence[int], samples: int, packs: Iterable[PackedSequence] = ()
) -> list[AnyLayout]:
    """Those that the sizes of the leading dimensions allow, or one of the `packs` of the pass."""
    if samples == 1:
        return [WHOLE]
    found: list[AnyLayout] = [
        Layout(dim, major)
        for dim, size in enumerate(leading)
        if size > 0 and size % samples == 0
        for major in ((True, False) if size > samples else (True,))
    ]
    if len(leading) == 1:
        found += [entry for pack in packs for entry in _packed_layouts(leading[0], samples, pack)]
    return found


def _packed_layouts(rows: int, samples: int, pack: PackedSequence) -> list[AnyLayout]:
    """Of all rows of `pack`, or those of one of its steps, if there are as many."""
    sizes, own = pack.batch_sizes, torch.arange(samples, device=pack.data.device)
    order = own if pack.sorted_indices is None else pack.sorted_indices
    if len(order) != samples:
        return []
    if rows == len(pack.data):
        owners = torch.cat([order[:size] for size in sizes.tolist()])
        places = torch.arange(len(sizes)).repeat_interleave(sizes).to(order.device)
        return [PackedLayout(owners, places, len(sizes))]
    # Of all samples in their own order, that is the first of the layouts without a pack.
    if rows not in sizes.tolist() or (rows == samples and torch.equal(order, own)):
        return []
    return [PackedLayout(order[:rows], torch.zeros_like(order[:rows]), 1)]


def moving(nodes: Iterable[Node], samples: int) -> list[Node]:
    """Those that have moved rows along a dimension that may count samples.

    Then the layers may see another order in the next batch, although all sizes are equal.
    """
    return [node for node in nodes if _MOVING.match(node.name()) and _moves(node, samples)]


def moves_samples(node: Node, dim: int | None) -> bool:
    """Whether one of those moves rows along dimension `dim`, or may do so if that is None."""
    if dim is None:
        return True
    along = _dim_of(node)
    if along is not None:
        return along % len(_moved_sizes(node)) == dim
    return not _is_index(node) or _is_moved_by_index(node, dim)


def _moves(node: Node, samples: int) -> bool:
    sizes = _moved_sizes(node)
    along = _dim_of(node)
    if along is not None:
        return sizes[along] % samples == 0
    return not _is_index(node) or any(
        size % samples == 0 and _is_moved_by_index(node, dim) for dim, size in enumerate(sizes)
    )


def _is_index(node: Node) -> bool:
    return node.name().startswith(("IndexBackward", "IndexPutBackward"))


def _moved_sizes(node: Any) -> Sequence[int]:  # noqa: ANN401
    sizes: Sequence[int] = getattr(node, "_saved_self_sym_sizes", node._input_metadata[0].shape)
    return sizes


def _dim_of(node: Any) -> int | None:  # noqa: ANN401
    dim: int | None = getattr(node, "_saved_dim", None)
    return dim if dim is None or dim < 2**63 else dim - 2**64  # saved without sign


def _is_moved_by_index(node: Any, dim: int) -> bool:  # noqa: ANN401
    """But to take one token of each sample, say, is an index by 0, 1, 2, ... in dimension `dim`."""
    indices = getattr(node, "_saved_indices", ())
    index = indices[dim] if dim < len(indices) else None
    if index is None:
        return False
    return not torch.equal(
        index.flatten(), torch.arange(_moved_sizes(node)[dim], device=index.device)
    )
