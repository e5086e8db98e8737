"""Layer rule: a layer's gradients of single samples, and sums over samples of functions of them.

A rule sees a call of its layer as rows: `features` [samples, rows, ...], what the output gradient
is multiplied with to give the parameter gradient, and that gradient, `g` [samples, rows, ...]. Each
sample has the same number of rows (tokens, frames, windows); its gradient is the sum over them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clext import ops

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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

    def add_(self, acc: Tensor, name: str, features: Tensor, g: Tensor, function: Function) -> None:
        """Add the sum over samples of function(gradient) by the parameter `name` to `acc`."""
        add_joint_(acc, [(self, name, features, g)], function)

    # Whether the second dimension of features and g counts rows alone, of any number.
    sums_rows = False

    # Whether `add_rows_` is there.
    gives_rows = False

    def add_rows_(self, rows: Tensor, name: str, features: Tensor, g: Tensor) -> None:
        """Add the gradient for g[k] to rows[k]: features [n, ...], g [K, n, ...], all samples."""
        raise NotImplementedError


# What `ops.per_sample_sum` calls the functions.
_NAMES: dict[Function, str] = {torch.square: "square", torch.abs: "absolute", identity: "identity"}


def add_products_(acc: Tensor, features: Tensor, grads: Tensor, function: Function) -> None:
    """Add the sum over samples of function(sum over rows of grads times features) to `acc`.

    As in `ops.per_sample_sum`, for a weight of [groups * outputs, *inputs].
    """
    sums = ops.per_sample_sum(features, grads, function=_NAMES[function])
    if len(sums) == 1:
        # Turned as a matrix first: by blocks, not each entry from another line of the cache.
        acc.add_(sums[0].T.contiguous().view(acc.shape))
    else:
        acc.add_(sums.transpose(1, 2).reshape(acc.shape))


def add_uses_(acc: Tensor, uses: Sequence[Use], function: Function) -> None:
    """Add the sum over samples of function(sum over uses of gradient) to `acc`.

    Uses in which the rule sums over rows, of as many samples and of rows of the same shape, are one
    use with the rows of all.
    """
    rule, name, features, g = uses[0]
    if len(uses) > 1 and all(_continues(uses[0], use) for use in uses[1:]):
        features = torch.cat([use[2] for use in uses], 1)
        g = torch.cat([use[3] for use in uses], 1)
    elif len(uses) > 1:
        add_joint_(acc, uses, function)
        return
    rule.add_(acc, name, features, g, function)


def _continues(first: Use, second: Use) -> bool:
    (rule, name, *tensors), (other, other_name, *others) = first, second
    return (
        rule.sums_rows
        and type(rule) is type(other)
        and name == other_name
        and all(a.shape[2:] == b.shape[2:] for a, b in zip(tensors, others, strict=True))
    )


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
