"""Rules of layers that scale and shift: normalisations, and parameters by themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clext.importance.rule import LayerRule


class NormRule(LayerRule):
    """Weight gradient: output gradient times normalised input, summed within each channel."""

    def joins(self, other: LayerRule) -> bool:
        return isinstance(other, NormRule) and other.parameter_dims == self.parameter_dims

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


class BatchNormRule(NormRule):
    def holds(self) -> bool:
        # By the statistics of the batch, a sample has no gradient of its own.
        return self.layer.running_mean is not None and not self.layer.training

    def normalised(self, inputs: Tensor) -> Tensor:
        mean, variance = self.layer.running_mean.to(inputs), self.layer.running_var.to(inputs)
        return F.batch_norm(inputs, mean, variance, eps=self.layer.eps)


class InstanceNormRule(BatchNormRule):
    def holds(self) -> bool:
        return not self.layer.training

    def row_dims(self, dims: int) -> tuple[int, int]:  # noqa: ARG002
        row = self.layer._get_no_batch_dim()
        return row, row

    def normalised(self, inputs: Tensor) -> Tensor:
        if self.layer.running_mean is not None:
            return super().normalised(inputs)
        return F.instance_norm(inputs, eps=self.layer.eps)


class GroupNormRule(NormRule):
    def normalised(self, inputs: Tensor) -> Tensor:
        return F.group_norm(inputs, self.layer.num_groups, eps=self.layer.eps)


class LayerNormRule(NormRule):
    @property
    def parameter_dims(self) -> int:
        return len(self.layer.normalized_shape)

    def row_dims(self, dims: int) -> tuple[int, int]:  # noqa: ARG002
        return self.parameter_dims, self.parameter_dims

    def normalised(self, inputs: Tensor) -> Tensor:
        return F.layer_norm(inputs, self.layer.normalized_shape, eps=self.layer.eps)


class RMSNormRule(LayerNormRule):
    def normalised(self, inputs: Tensor) -> Tensor:
        # The default depends on the dtype that the layer works in.
        eps = torch.finfo(self.layer.weight.dtype).eps if self.layer.eps is None else self.layer.eps
        return F.rms_norm(inputs, self.layer.normalized_shape, eps=eps)


class ScaleRule(NormRule):
    """Parameters by themselves that are multiplied with, or added to, something of more dimensions.

    For a node of autograd's graph. The input is what `weight` is multiplied with, in the shape of
    the output; its last `layer.row_dims` dimensions begin with the parameter's own.
    """

    @property
    def parameter_dims(self) -> int:
        return int(self.layer.parameter_dims)

    def row_dims(self, dims: int) -> tuple[int, int]:  # noqa: ARG002
        return self.layer.row_dims, self.layer.row_dims

    def features(self, inputs: Tensor) -> Tensor:
        return inputs
