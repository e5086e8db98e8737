"""Layer rule: a layer's gradients of single samples, and sums over samples of functions of them.

A rule sees a call of its layer as rows: `features` [samples, rows, ...], what the output gradient
is multiplied with to give the parameter gradient, and that gradient, `g` [samples, rows, ...]. Each
sample has the same number of rows (tokens, frames, windows); its gradient is the sum over them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clext import ops

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    # Of each entry of a gradient: itself, its square or its absolute value.
    Function = Callable[[Tensor], Tensor]
    # One use of a parameter: rule, name in the layer, features, output gradient.
    Use = tuple["LayerRule", str, Tensor, Tensor]

# Bound on what one step of a sum over samples allocates: what stays in a core's cache, or what is
# enough work for a GPU. One sample is always taken.
CHUNK_BYTES = {"cpu": 2**21}
LARGE_CHUNK_BYTES = 256 * 2**20


def at_once(like: Tensor, elements: int) -> int:
    """How many samples to take at a time that allocate so many elements each, of the dtype and on
    the device of `like`.
    """
    limit = CHUNK_BYTES.get(like.device.type, LARGE_CHUNK_BYTES)
    return max(1, limit // max(1, elements * like.element_size()))


def identity(tensor: Tensor) -> Tensor:
    """The function for the plain sum of gradients."""
    return tensor


class LayerRule:
    """The rule of one layer, whose parameters are `weight` and `bias`."""

    def __init__(self, layer: Any) -> None:  # noqa: ANN401  (each rule knows its own)
        self.layer = layer

    def holds(self) -> bool:
        """Whether there is a rule for the layer's options and mode."""
        return True

    def row_dims(self, dims: int) -> tuple[int, int]:
        """How many of the last dimensions of input and output make up one row.

        The dimensions before them count samples and rows. `dims`: how many the input has in all.
        """
        raise NotImplementedError

    def features(self, inputs: Tensor) -> Tensor:
        """From the layer's input, as [samples, rows, ...]."""
        return inputs

    def samples_at_once(self, inputs: Tensor) -> int:
        """For how many samples to make the features at a time: fewer than all where these are a
        copy that is better used while it is in the cache.
        """
        return len(inputs)

    def gradient(self, name: str, features: Tensor, g: Tensor) -> Tensor:
        """The gradient of each sample by the parameter `name`, [samples, *parameter.shape]."""
        raise NotImplementedError

    def scratch(self, name: str, features: Tensor) -> int:  # noqa: ARG002
        """Elements allocated for each sample: its gradient and the function of that."""
        parameter: Tensor = getattr(self.layer, name)
        return 2 * parameter.numel()

    def separable(self, rows: int) -> bool:  # noqa: ARG002
        """Whether, with so many rows a sample, a function (square or absolute value) of the
        gradient is the gradient for the functions of features and g.
        """
        return False

    def room(self, name: str, like: Tensor) -> Tensor | None:  # noqa: ARG002
        """Zeros for `add_`, of the shape and dtype of `like`, where another layout in memory than
        the parameter's makes that faster.
        """
        return None

    def add_(self, acc: Tensor, name: str, features: Tensor, g: Tensor, function: Function) -> None:
        """Add the sum over samples of function(gradient) by the parameter `name` to `acc`."""
        add_joint_(acc, [(self, name, features, g)], function)

    def joins(self, other: LayerRule) -> bool:  # noqa: ARG002
        """Whether rows of a call by the rule `other` may be taken for more rows of this one's."""
        return False

    # Whether it asks nodes of the graph, which do not answer inside of a backward pass.
    asks_nodes = False

    # Whether a sample's gradient is zero but for some of the parameter's rows: `single_rows`.
    looks_up = False

    def single_rows(self, features: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those rows of all samples: the samples they are of, their numbers, the gradients."""
        raise NotImplementedError

    # Whether `gradient_of_rows` is there.
    gives_single_rows = False

    def gradient_of_rows(
        self, features: Tensor, g: Tensor, samples: Tensor, rows: Tensor
    ) -> Tensor:
        """The gradient of sample samples[k] by row rows[k] of the weight, for each k."""
        raise NotImplementedError

    # Whether `add_rows_` is there.
    gives_rows = False

    def add_rows_(self, rows: Tensor, name: str, features: Tensor, g: Tensor) -> None:
        """Add the gradient for g[k] to rows[k]: features [n, ...], g [K, n, ...], all samples."""
        raise NotImplementedError

    # Whether a row's gradient is output times input, for which `input_columns` and `output_columns`
    # are there.
    multiplies = False

    def input_columns(self, rows: Tensor) -> Iterator[Tensor]:
        """What is multiplied with the weight, [in, ...], some at a time, of inputs [rows, ...]."""
        raise NotImplementedError

    def output_columns(self, g: Tensor) -> Tensor:
        """The gradients by its products, [out, ...], of an output gradient [rows, ...]."""
        raise NotImplementedError


# What `ops.per_sample_sum` calls the functions.
_NAMES: dict[Function, str] = {torch.square: "square", torch.abs: "absolute", identity: "identity"}


def product_sums(features: Tensor, grads: Tensor, function: Function) -> Tensor:
    """The sum over samples of function(sum over rows of features times grads).

    Tensors and result as in `ops.per_sample_sum`.
    """
    if math.prod(grads.shape[3:]) == 1:
        # With one row, the function of a product is the product of the functions.
        left, right = (
            function(tensor).reshape(*tensor.shape[:2], -1).transpose(0, 1)
            for tensor in (features, grads)
        )
        return torch.bmm(left.transpose(1, 2), right)
    return ops.per_sample_sum(features, grads, function=_NAMES[function])


def add_uses_(acc: Tensor, uses: Sequence[Use], function: Function) -> None:
    """Add the sum over samples of function(sum over uses of gradient) to `acc`."""
    groups: list[list[Use]] = []
    for use in uses:
        alike = next((group for group in groups if _joins(group[0], use)), None)
        if alike is None:
            groups.append([use])
        else:
            alike.append(use)
    joined = [_joined(group) for group in groups]
    joined.sort(key=lambda use: use[0].looks_up)
    if len(joined) == 1:
        rule, name, features, g = joined[0]
        rule.add_(acc, name, features, g, function)
    elif len(joined) == 2 and joined[0][0].gives_single_rows and joined[1][0].looks_up:
        _add_tied_(acc, joined[0], joined[1], function)
    else:
        add_joint_(acc, joined, function)


def _joins(first: Use, second: Use) -> bool:
    """Whether two uses differ in their rows alone."""
    (rule, name, *tensors), (other, other_name, *others) = first, second
    return (
        name == other_name
        and rule.joins(other)
        and all(a.shape[2:] == b.shape[2:] for a, b in zip(tensors, others, strict=True))
    )


def _joined(uses: Sequence[Use]) -> Use:
    """One use with the rows of all."""
    rule, name, features, g = uses[0]
    if len(uses) > 1:
        features = torch.cat([use[2] for use in uses], 1)
        g = torch.cat([use[3] for use in uses], 1)
    return rule, name, features, g


def _add_tied_(acc: Tensor, product: Use, lookup: Use, function: Function) -> None:
    """As `add_uses_`, for a table that is multiplied with too (tied embeddings).

    A sample looks up few rows: only there the function is not that of the product's gradient.
    """
    rule, name, features, g = product
    table, _, tokens, by_token = lookup
    rule.add_(acc, name, features, g, function)
    samples, rows, looked_up = table.single_rows(tokens, by_token)
    multiplied = rule.gradient_of_rows(features, g, samples, rows)
    acc.index_add_(0, rows, function(multiplied + looked_up) - function(multiplied))


def add_joint_(acc: Tensor, uses: Sequence[Use], function: Function) -> None:
    """Add the sum over samples of function(sum over uses of gradient) to `acc`."""
    samples = len(uses[0][-1])
    elements = sum(rule.scratch(name, features) for rule, name, features, _ in uses)
    size = at_once(acc, elements)
    for start in range(0, samples, size):
        chunk = slice(start, start + size)
        gradients = [
            rule.gradient(name, features[chunk], g[chunk]) for rule, name, features, g in uses
        ]
        total = gradients[0]
        for gradient in gradients[1:]:
            total = total + gradient
        # In the order of memory, which is not that of the dimensions for every rule.
        order = sorted(range(acc.dim()), key=lambda d: -total.stride(1 + d))
        laid_out = function(total).permute(0, *(1 + d for d in order))
        acc.permute(order).add_(laid_out.sum(0))
