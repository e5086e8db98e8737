"""Layer rules, one for each type: gradients of single samples from input and output gradient.

What they have in common is in rule.py. A new layer needs a class like those below and an
entry in RULES.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clext.importance.rule import LayerRule, add_products_, at_once, identity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clext.importance.rule import Function


class _Linear(LayerRule):
    """Weight gradient: the sum over rows of g a^T."""

    def row_dims(self, dims: int) -> tuple[int, int]:  # noqa: ARG002
        return 1, 1

    def gradient(self, name: str, features: Tensor, g: Tensor) -> Tensor:
        return g.sum(1) if name == "bias" else torch.bmm(g.transpose(1, 2), features)

    def separable(self, rows: int) -> bool:
        return rows == 1

    def add_(self, acc: Tensor, name: str, features: Tensor, g: Tensor, function: Function) -> None:
        if function is identity:  # rows may as well be samples
            features, g = (tensor.flatten(0, 1).unsqueeze(1) for tensor in (features, g))
        # With one row a sample, sum_n f(g_n a_n^T) = f(G)^T f(A): one matrix product.
        separable = self.separable(features.shape[1])
        if separable and name == "bias":
            acc.add_(function(g).sum((0, 1)))
        elif separable:
            acc.addmm_(function(g).squeeze(1).T, function(features).squeeze(1))
        elif name == "bias":
            super().add_(acc, name, features, g, function)
        else:
            inputs, outputs = (tensor.transpose(1, 2).unsqueeze(1) for tensor in (features, g))
            add_products_(acc, inputs, outputs, function)

    gives_rows = True

    def add_rows_(self, rows: Tensor, name: str, features: Tensor, g: Tensor) -> None:
        if name == "bias":
            rows.add_(g.sum(1))
        else:
            rows.baddbmm_(g.transpose(1, 2), features.expand(len(g), -1, -1))


class _Conv(LayerRule):
    """Weight gradient: output gradient times the input's windows (im2col), group by group."""

    def row_dims(self, dims: int) -> tuple[int, int]:  # noqa: ARG002
        row = 1 + len(self.layer.kernel_size)
        return row, row

    def features(self, inputs: Tensor) -> Tensor:
        """What each offset in the kernel meets at each output, as a view of the padded input.

        [samples, groups, channels of the group, *kernel, rows, *outputs].
        """
        layer, (samples, rows) = self.layer, inputs.shape[:2]
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(inputs.flatten(0, 1), self._padding(), mode)
        channels, *kernel = layer.weight.shape[1:]
        strides, dilations = (
            _each(option, len(kernel)) for option in (layer.stride, layer.dilation)
        )
        options = zip(kernel, strides, dilations, strict=True)
        outputs = [
            (size - dilation * (width - 1) - 1) // stride + 1
            for size, (width, stride, dilation) in zip(padded.shape[2:], options, strict=True)
        ]
        batch, channel, *space = padded.stride()
        offsets = [step * d for step, d in zip(space, dilations, strict=True)]
        positions = [step * s for step, s in zip(space, strides, strict=True)]
        return padded.as_strided(
            (samples, layer.groups, channels, *kernel, rows, *outputs),
            (rows * batch, channels * channel, channel, *offsets, batch, *positions),
        )

    def _padding(self) -> list[int]:
        """What is added before and after the last dimension, the one before it, and so on.

        From what the forward pass reads, which may have been changed since the layer was made.
        """
        layer = self.layer
        if layer.padding_mode != "zeros":
            return list(layer._reversed_padding_repeated_twice)
        kernel = layer.weight.shape[2:]
        if layer.padding == "valid":
            return [0, 0] * len(kernel)
        if layer.padding == "same":
            pairs = zip(_each(layer.dilation, len(kernel)), kernel, strict=True)
            sums = [dilation * (width - 1) for dilation, width in pairs]
            return [side for s in reversed(sums) for side in (s // 2, s - s // 2)]
        return [side for p in reversed(_each(layer.padding, len(kernel))) for side in (p, p)]

    def samples_at_once(self, inputs: Tensor) -> int:
        return at_once(inputs, inputs[:1].numel()) if any(self._padding()) else len(inputs)

    def scratch(self, name: str, features: Tensor) -> int:
        windows = 0 if name == "bias" else features[:1].numel()
        return windows + super().scratch(name, features)

    def gradient(self, name: str, features: Tensor, g: Tensor) -> Tensor:
        if name == "bias":
            return g.flatten(3).sum((1, 3))
        weight, groups = self.layer.weight, self.layer.groups
        windows = features.reshape(len(g) * groups, weight[0].numel(), -1)
        by_channel = g.transpose(1, 2).reshape(len(windows), len(weight) // groups, -1)
        # The larger matrix first, which is faster for few channels.
        product = torch.bmm(windows, by_channel.transpose(1, 2))
        return product.transpose(1, 2).reshape(len(g), *weight.shape)

    def add_(self, acc: Tensor, name: str, features: Tensor, g: Tensor, function: Function) -> None:
        if name == "bias":
            super().add_(acc, name, features, g, function)
        else:
            # [samples, groups, channels of the group, rows, *outputs]
            by_group = g.unflatten(2, (self.layer.groups, -1)).movedim(1, 3)
            add_products_(acc, features, by_group, function)


def _each(option: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """An option of a convolution for each dimension; one number counts for all."""
    each = (option,) if isinstance(option, int) else tuple(option)
    return each * dims if len(each) == 1 else each


class _Embedding(LayerRule):
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
        kept = self._kept(features)
        keys = features * len(g) + _number(features)
        keys, sums = _sum_by_key(keys[kept], g[kept])
        tokens, sums = _sum_by_key(keys // len(g), function(sums))
        acc.index_add_(0, tokens, sums)

    def _kept(self, tokens: Tensor) -> Tensor:
        padding = self.layer.padding_idx
        return torch.ones_like(tokens, dtype=torch.bool) if padding is None else tokens != padding


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


class _Norm(LayerRule):
    """Weight gradient: output gradient times normalised input, summed within each channel."""

    @property
    def parameter_dims(self) -> int:
        """Of weight and bias, of which one may be missing."""
        return 1

    def row_dims(self, dims: int) -> tuple[int, int]:
        return dims - 1, dims - 1

    def features(self, inputs: Tensor) -> Tensor:
        return self.normalised(inputs.flatten(0, 1)).reshape(inputs.shape)

    def normalised(self, inputs: Tensor) -> Tensor:
        """What `gradient` takes for `inputs` [batch, *row]: them, but for the weight and bias, as
        the layer puts them out.
        """
        raise NotImplementedError

    def scratch(self, name: str, features: Tensor) -> int:  # noqa: ARG002
        return features[:1].numel()

    def gradient(self, name: str, features: Tensor, g: Tensor) -> Tensor:
        channel = 2 + self.parameter_dims
        if name == "bias":
            return g.sum([1, *range(channel, g.dim())])
        if g.dim() == channel:
            return (g * features).sum(1)
        # Product and sum in one pass: the products would be as large as the activations.
        products: Tensor = torch.linalg.vecdot(g.flatten(channel), features.flatten(channel))
        return products.sum(1)


class _BatchNorm(_Norm):
    def holds(self) -> bool:
        # By the statistics of the batch, a sample has no gradient of its own.
        return self.layer.running_mean is not None and not self.layer.training

    def normalised(self, inputs: Tensor) -> Tensor:
        mean, variance = self.layer.running_mean.to(inputs), self.layer.running_var.to(inputs)
        return F.batch_norm(inputs, mean, variance, eps=self.layer.eps)


class _InstanceNorm(_BatchNorm):
    def holds(self) -> bool:
        return not self.layer.training

    def row_dims(self, dims: int) -> tuple[int, int]:  # noqa: ARG002
        row = self.layer._get_no_batch_dim()
        return row, row

    def normalised(self, inputs: Tensor) -> Tensor:
        if self.layer.running_mean is not None:
            return super().normalised(inputs)
        return F.instance_norm(inputs, eps=self.layer.eps)


class _GroupNorm(_Norm):
    def normalised(self, inputs: Tensor) -> Tensor:
        return F.group_norm(inputs, self.layer.num_groups, eps=self.layer.eps)


class _LayerNorm(_Norm):
    @property
    def parameter_dims(self) -> int:
        return len(self.layer.normalized_shape)

    def row_dims(self, dims: int) -> tuple[int, int]:  # noqa: ARG002
        return self.parameter_dims, self.parameter_dims

    def normalised(self, inputs: Tensor) -> Tensor:
        return F.layer_norm(inputs, self.layer.normalized_shape, eps=self.layer.eps)


class _RMSNorm(_LayerNorm):
    def normalised(self, inputs: Tensor) -> Tensor:
        # The default depends on the dtype that the layer works in.
        eps = torch.finfo(self.layer.weight.dtype).eps if self.layer.eps is None else self.layer.eps
        return F.rms_norm(inputs, self.layer.normalized_shape, eps=eps)


RULES: dict[type[nn.Module], type[LayerRule]] = {
    nn.Linear: _Linear,
    nn.Conv1d: _Conv,
    nn.Conv2d: _Conv,
    nn.Conv3d: _Conv,
    nn.Embedding: _Embedding,
    nn.BatchNorm1d: _BatchNorm,
    nn.BatchNorm2d: _BatchNorm,
    nn.BatchNorm3d: _BatchNorm,
    nn.InstanceNorm1d: _InstanceNorm,
    nn.InstanceNorm2d: _InstanceNorm,
    nn.InstanceNorm3d: _InstanceNorm,
    nn.GroupNorm: _GroupNorm,
    nn.LayerNorm: _LayerNorm,
    nn.RMSNorm: _RMSNorm,
}


def rule_for(layer: nn.Module) -> LayerRule | None:
    """The rule of exactly this type: a subclass may compute something else."""
    rule = RULES.get(type(layer))
    if rule is None:
        return None
    made = rule(layer)
    return made if made.holds() else None
