"""Rules of autograd's nodes: how each uses a parameter, in terms of a layer rule.

A function here is given an argument: a node, and the number of the input that a parameter came by.
What the layer rule reads of its layer (options, the weight's shape) is put into a stand-in for it,
what it is called with are the tensors that the node has saved. None: there is no rule for the use.
A use that is not understood makes an estimate slow, not wrong: rules are compared with autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clext.importance.rules.embeddings import EmbeddingBagRule, EmbeddingRule
from clext.importance.rules.norms import ScaleRule
from clext.importance.rules.products import ConvRule, ConvTransposedRule, LinearRule

if TYPE_CHECKING:
    from clext.importance.rule import LayerRule


@dataclass(frozen=True)
class Argument:
    """The tensor that a parameter has become: input `place` of `node`, for so many `samples`."""

    node: Any  # Node, of which each has attributes of its own
    place: int
    shape: torch.Size
    dtype: torch.dtype
    samples: int

    def like(self, shape: Sequence[int]) -> Tensor:
        """A stand-in for a parameter of that shape."""
        return torch.empty(tuple(shape), dtype=self.dtype, device="meta")

    @property
    def output_shape(self) -> torch.Size:
        """Of the node's first output."""
        return torch.Size(self.node._input_metadata[0].shape)

    @property
    def device(self) -> torch.device:
        """Of the same."""
        device: torch.device = self.node._input_metadata[0].device
        return device


@dataclass(frozen=True)
class NodeUse:
    """A use as a call of `rule` with `inputs`, for its layer's parameter `name`.

    `order`: of the node's output's dimensions, as the rule counts them. `turned`: the rule's
    parameter is the argument transposed. `unflattens`: the rows of the output may be arranged in
    more dimensions. `beside`: the gradient is that of this input of the node, not of its output.
    """

    rule: LayerRule
    name: str
    inputs: Tensor
    order: tuple[int, ...] | None = None
    turned: bool = False
    unflattens: bool = False
    beside: int | None = None


# ------------------------------------------------------------------ products of matrices


def _matmul(argument: Argument, left: Tensor | None, right: Tensor | None) -> NodeUse | None:
    """`argument` is the left factor of a matrix product if `left` is None, else the right one."""
    weight = argument.like(argument.shape if left is None else argument.shape[::-1])
    rule = LinearRule(SimpleNamespace(weight=weight))
    if left is not None:
        return NodeUse(rule, "weight", left, turned=True, unflattens=True)
    assert right is not None
    return NodeUse(rule, "weight", right.T, order=(1, 0))


def _mm(argument: Argument) -> NodeUse | None:
    node = argument.node
    if argument.place == 0:
        return _matmul(argument, None, node._saved_mat2)
    return _matmul(argument, node._saved_self, None)


def _addmm(argument: Argument) -> NodeUse | None:
    node = argument.node
    if node._saved_alpha != 1 or node._saved_beta != 1:
        return None
    if argument.place == 0:
        return _scaled(argument, argument.shape, None, unflattens=True)
    if argument.place == 1:
        return _matmul(argument, None, node._saved_mat2)
    return _matmul(argument, node._saved_mat1, None)


def _convolution(argument: Argument) -> NodeUse | None:
    node, space = argument.node, len(argument.output_shape) - 2
    if argument.place != 1:
        return _scaled(argument, _of_channels(argument), None)
    layer = SimpleNamespace(
        weight=argument.like(argument.shape),
        kernel_size=argument.shape[2:],
        stride=node._saved_stride,
        padding=node._saved_padding,
        dilation=node._saved_dilation,
        groups=node._saved_groups,
        padding_mode="zeros",
    )
    rule = ConvTransposedRule(layer) if node._saved_transposed else ConvRule(layer)
    return NodeUse(rule, "weight", node._saved_input) if space > 0 else None


# ------------------------------------------------------------------ tables


def _embedding(argument: Argument) -> NodeUse | None:
    node = argument.node
    if node._saved_scale_grad_by_freq:
        return None
    table = argument.like(argument.shape)
    layer = SimpleNamespace(weight=table, padding_idx=signed(node._saved_padding_idx))
    return NodeUse(EmbeddingRule(layer), "weight", node._saved_indices)


_MAX = 2  # the mode of an EmbeddingBag; the others are sums and means


def _embedding_bag(argument: Argument) -> NodeUse | None:
    node, device = argument.node, argument.node._saved_indices.device
    if argument.place != 0 or node._saved_mode == _MAX or node._saved_scale_grad_by_freq:
        return None
    tokens, offsets = node._saved_indices.long(), node._saved_offsets.long()
    bags, padding = argument.output_shape[0], signed(node._saved_padding_idx)
    place = torch.arange(len(tokens), device=device)
    bag = torch.searchsorted(offsets, place, right=True) - 1
    place = place - offsets[bag]
    shape = (bags, int(place.max()) + 1 if len(place) else 0)
    weights = node._saved_per_sample_weights
    share = (tokens != padding).to(argument.dtype) if weights is None else weights.detach()
    shares = share.new_zeros(shape).index_put_((bag, place), share)
    if node._saved_mode:
        shares /= shares.sum(1, keepdim=True).clamp_(min=1)
    layer = SimpleNamespace(
        weight=argument.like(argument.shape),
        padding_idx=padding,
        tokens=tokens.new_full(shape, padding).index_put_((bag, place), tokens),
        shares=shares,
    )
    return NodeUse(EmbeddingBagRule(layer), "weight", torch.arange(bags, device=device))


def signed(number: int) -> int:
    """Autograd has no sign for some of the integers that it saves."""
    return number - 2**64 if number >= 2**63 else number


# ------------------------------------------------------------------ parameters by themselves


def _scaled(
    argument: Argument, shape: Sequence[int], factor: Tensor | None, *, unflattens: bool = False
) -> NodeUse | None:
    """The argument, of `shape`, is broadcast to the output and multiplied with `factor` (or 1)."""
    output = argument.output_shape
    full = (1,) * (len(output) - len(shape)) + tuple(shape)
    kept = [d for d, size in enumerate(full) if size != 1]
    spread = [d for d, size in enumerate(full) if size == 1]
    # Dimensions behind the parameter's own are added up first; unless they count the samples.
    behind = [d for d in spread if kept and d > kept[-1]]
    leading = [d for d in spread if d not in behind]
    if not any(output[d] % argument.samples == 0 for d in leading):
        leading, behind = spread, []
    if not spread or any(full[d] != output[d] for d in kept):  # repeated within itself
        return None
    order = (*leading, *kept, *behind)
    parameter = argument.like([full[d] for d in kept])
    layer = SimpleNamespace(
        weight=parameter, bias=parameter, parameter_dims=len(kept), row_dims=len(kept) + len(behind)
    )
    inputs = torch.ones((), dtype=argument.dtype, device=argument.device)
    inputs = (inputs if factor is None else factor.detach()).expand(output).permute(order)
    name = "bias" if factor is None else "weight"
    turned = None if order == tuple(range(len(order))) else order
    return NodeUse(ScaleRule(layer), name, inputs, order=turned, unflattens=unflattens)


def _of_channels(argument: Argument) -> tuple[int, ...]:
    """The shape as which a parameter for each channel is broadcast to [batch, channels, ...]."""
    return (*argument.shape, *(1,) * (len(argument.output_shape) - 2))


def _sum(argument: Argument) -> NodeUse | None:
    """Sums and differences, of which the second term has a factor."""
    sign = -1 if argument.node.name().startswith("Sub") else 1
    factor = sign * argument.node._saved_alpha if argument.place else 1
    one = None if factor == 1 else torch.tensor(factor, dtype=argument.dtype).to(argument.device)
    return _scaled(argument, argument.shape, one)


def _product(argument: Argument) -> NodeUse | None:
    node = argument.node
    factor = node._saved_self if argument.place else node._saved_other
    return _scaled(argument, argument.shape, factor)


def _spread(argument: Argument) -> NodeUse | None:
    """Copies for the samples."""
    return _scaled(argument, argument.shape, None)


def _gates(argument: Argument) -> NodeUse | None:
    """The bias of a recurrent layer's step in one kernel, which adds it to other gates."""
    if argument.place < 3:
        return None
    beside = argument.place - 3
    before, output = argument.node.next_functions[beside]
    samples = before._input_metadata[output].shape[0]
    parameter = argument.like(argument.shape)
    layer = SimpleNamespace(bias=parameter, parameter_dims=1, row_dims=1)
    ones = torch.ones((), dtype=argument.dtype, device=argument.device)
    return NodeUse(ScaleRule(layer), "bias", ones.expand(samples, *argument.shape), beside=beside)


def _prelu(argument: Argument) -> NodeUse | None:
    return _scaled(argument, argument.shape, argument.node._saved_self.clamp(max=0))


def _normalised(
    argument: Argument, shape: Sequence[int], mean: Tensor | None, scale: Tensor
) -> NodeUse | None:
    """The weight, input 1, or the bias, input 2, of a normalisation."""
    if argument.place == 2:
        return _scaled(argument, shape, None)
    inputs = argument.node._saved_input.detach().to(scale.dtype).reshape(argument.output_shape)
    centred = inputs if mean is None else inputs - mean
    return _scaled(argument, shape, centred * scale)


def _layer_norm(argument: Argument) -> NodeUse | None:
    node = argument.node
    return _normalised(argument, argument.shape, node._saved_result1, node._saved_result2)


def _rms_norm(argument: Argument) -> NodeUse | None:
    return _normalised(argument, argument.shape, None, argument.node._saved_result1)


def _group_norm(argument: Argument) -> NodeUse | None:
    node, output = argument.node, argument.output_shape
    samples, channels, groups = output[0], output[1], node._saved_group
    # The statistics of its group for each channel.
    mean, scale = (
        entry.view(samples, groups, 1)
        .expand(-1, -1, channels // groups)
        .reshape(samples, channels, *(1,) * (len(output) - 2))
        for entry in (node._saved_result1, node._saved_result2)
    )
    return _normalised(argument, _of_channels(argument), mean, scale)


def _batch_norm(argument: Argument) -> NodeUse | None:
    node, shape = argument.node, _of_channels(argument)
    if node._saved_training:  # by the statistics of the batch
        return None
    eps = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon
    mean, variance = node._saved_running_mean, node._saved_running_var
    return _normalised(argument, shape, mean.view(shape), (variance + eps).rsqrt().view(shape))


NODE_RULES: dict[str, Callable[[Argument], NodeUse | None]] = {
    "MmBackward0": _mm,
    "AddmmBackward0": _addmm,
    "ConvolutionBackward0": _convolution,
    "EmbeddingBackward0": _embedding,
    "EmbeddingBagBackward0": _embedding_bag,
    "AddBackward0": _sum,
    "SubBackward0": _sum,
    "MulBackward0": _product,
    "ExpandBackward0": _spread,
    "RepeatBackward0": _spread,
    "PreluKernelBackward0": _prelu,
    "ThnnFusedLstmCellBackward0": _gates,
    "ThnnFusedGruCellBackward0": _gates,
    "NativeLayerNormBackward0": _layer_norm,
    "FusedRmsNormBackward0": _rms_norm,
    "NativeGroupNormBackward0": _group_norm,
    "NativeBatchNormBackward0": _batch_norm,
    "CudnnBatchNormBackward0": _batch_norm,
}
