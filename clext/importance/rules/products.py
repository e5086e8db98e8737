"""Rules of layers that multiply with matrices: linear layers and convolutions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from clext.importance.rule import LayerRule, at_once, identity, product_sums

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from clext.importance.rule import Function


class LinearRule(LayerRule):
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
            acc.add_(product_sums(outputs, inputs, function)[0])

    def joins(self, other: LayerRule) -> bool:
        return isinstance(other, LinearRule)

    gives_single_rows = True

    def gradient_of_rows(
        self, features: Tensor, g: Tensor, samples: Tensor, rows: Tensor
    ) -> Tensor:
        found = features.new_empty(len(rows), features.shape[2])
        places = samples.argsort(stable=True).split(samples.bincount(minlength=len(g)).tolist())
        for n, place in enumerate(places):
            found[place] = g[n, :, rows[place]].T @ features[n]
        return found

    gives_rows = True

    def add_rows_(self, rows: Tensor, name: str, features: Tensor, g: Tensor) -> None:
        if name == "bias":
            rows.add_(g.sum(1))
        else:
            rows.baddbmm_(g.transpose(1, 2), features.expand(len(g), -1, -1))

    multiplies = True

    def input_columns(self, rows: Tensor) -> Iterator[Tensor]:
        yield rows.T

    def output_columns(self, g: Tensor) -> Tensor:
        return g.T


class ConvRule(LayerRule):
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

    def room(self, name: str, like: Tensor) -> Tensor | None:
        if name == "bias" or self.layer.groups > 1:
            return None
        # As the sums of products lie: [channels * kernel, outputs].
        return like.new_zeros(like[0].numel(), len(like)).T.view(like.shape)

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
            sums = product_sums(features, by_group, function).transpose(1, 2)
            acc.unflatten(0, sums.shape[:2]).add_(sums.unflatten(2, acc.shape[1:]))

    @property
    def multiplies(self) -> bool:  # type: ignore[override]
        """Not with a matrix for each group."""
        return bool(self.layer.groups == 1)

    def input_columns(self, rows: Tensor) -> Iterator[Tensor]:
        row = self.layer.weight[0]
        # At most so many windows as inputs, but for padding.
        for some in rows.split(at_once(rows, rows[0, 0].numel() * row.numel())):
            windows = self.features(some.unsqueeze(1))[:, 0].movedim(0, row.dim())
            yield windows.reshape(row.numel(), -1)

    def output_columns(self, g: Tensor) -> Tensor:
        return g.transpose(0, 1).flatten(1)


class ConvTransposedRule(ConvRule):
    """Weight gradient: as a convolution's, with input and output gradient in each other's place."""

    multiplies = False

    def features(self, inputs: Tensor) -> Tensor:
        return inputs

    def samples_at_once(self, inputs: Tensor) -> int:
        return len(inputs)

    def scratch(self, name: str, features: Tensor) -> int:
        """Besides the gradient, the windows: for each input those of the kernel's channels."""
        weight, groups = self.layer.weight, self.layer.groups
        windows = features[:1].numel() // len(weight) * groups * weight[0].numel()
        return LayerRule.scratch(self, name, features) + (0 if name == "bias" else windows)

    def gradient(self, name: str, features: Tensor, g: Tensor) -> Tensor:
        if name == "bias":
            return super().gradient(name, features, g)
        return super().gradient(name, self._windows(features, g), features)

    def add_(self, acc: Tensor, name: str, features: Tensor, g: Tensor, function: Function) -> None:
        if name == "bias":
            super().add_(acc, name, features, g, function)
        else:
            super().add_(acc, name, self._windows(features, g), features, function)

    def _windows(self, inputs: Tensor, g: Tensor) -> Tensor:
        """Those of the output's gradient; output padding may make more of them than inputs."""
        windows = super().features(g)
        for dim, size in enumerate(inputs.shape[3:], 3 - inputs.dim()):
            windows = windows.narrow(dim, 0, size)
        return windows


def _each(option: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """An option of a convolution for each dimension; one number counts for all."""
    each = (option,) if isinstance(option, int) else tuple(option)
    return each * dims if len(each) == 1 else each
