"""The rule for Linear layers: what one backward pass knows about every single sample.

The weight gradient of sample n is the outer product g_n a_n^T of the layer's output gradient and
its input. So sum_n of its squares is (G*G)^T (A*A), and of its absolute values |G|^T |A|, over the
batch matrices G and A: one matrix product, instead of one backward pass per sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from clext.importance.evaluation import gradients
from clext.tensor_lists import state_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

# How far the rule's gradient may be from autograd's, relative to its own terms: far above the
# rounding of half precision, far below what a second use of a layer changes.
_TOLERANCE = 0.02


@dataclass
class LayerPass:
    """One layer's part in one forward pass; `places`: name of a parameter -> its index."""

    module: nn.Linear
    places: dict[str, int]
    inputs: Tensor
    edge: GradientEdge


class LinearRule:
    """Captures input and output gradient of each trainable Linear layer of a model.

    For models whose trainable parameters all belong to plain nn.Linear layers. `forward` tells
    for each batch whether the rule holds: each layer called at most once, on a matrix with one row
    per sample. Uses of a weight that no hook sees (functional or shared) are found by comparing
    with autograd, the first time that this set of layers is called.
    """

    def __init__(
        self, model: nn.Module, params: Sequence[Tensor], places: dict[nn.Linear, dict[str, int]]
    ) -> None:
        self._model, self._params, self._places = model, params, places
        self._verified: set[frozenset[nn.Linear]] = set()

    @classmethod
    def of(cls, model: nn.Module, params: Sequence[Tensor]) -> LinearRule | None:
        """The rule for `model`, or None if some trainable parameter is not a Linear layer's own."""
        index = {id(entry): i for i, entry in enumerate(params) if entry.requires_grad}
        owned: set[int] = set()
        places: dict[nn.Linear, dict[str, int]] = {}
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in index:
                    continue  # frozen
                if type(module) is not nn.Linear or id(parameter) in owned:
                    return None  # another kind of layer, or a parameter tied between layers
                owned.add(id(parameter))
                places.setdefault(module, {})[name] = index[id(parameter)]
        return cls(model, params, places) if len(owned) == len(index) else None

    def forward(self, x: Tensor) -> tuple[Any, list[LayerPass] | None]:
        """The model's outputs, and the layers' passes, or None where the rule does not hold."""
        passes: list[LayerPass] = []
        holds = True

        def capture(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> None:
            nonlocal holds
            assert isinstance(module, nn.Linear)
            inputs = args[0] if args else kwargs["input"]
            new = all(entry.module is not module for entry in passes)
            if not new or inputs.dim() != 2 or len(inputs) != len(x) or not output.requires_grad:
                holds = False
                return
            # The edge, not the tensor: an in-place activation would change what the tensor means.
            edge = get_gradient_edge(output)
            passes.append(LayerPass(module, self._places[module], inputs.detach(), edge))

        handles: list[RemovableHandle] = []
        try:
            for module in self._places:
                # First of all hooks, to see the layer's own output.
                handle = module.register_forward_hook(capture, prepend=True, with_kwargs=True)
                handles.append(handle)
            outputs = self._model(x)
        finally:
            for handle in handles:
                handle.remove()
        return outputs, passes if holds and passes else None

    def output_gradients(
        self, outputs: Tensor, passes: list[LayerPass], cotangent: Tensor
    ) -> list[Tensor]:
        """For each layer the gradient of sum(outputs * cotangent) by its output, [samples, out]."""
        edges = [entry.edge for entry in passes]
        found: Sequence[Tensor | None] = torch.autograd.grad(
            outputs, edges, cotangent.to(outputs.dtype), retain_graph=True, allow_unused=True
        )
        dtypes = [state_dtype(entry.module.weight.dtype) for entry in passes]
        return [
            entry.inputs.new_zeros((len(entry.inputs), entry.module.out_features), dtype=dtype)
            if gradient is None
            else gradient.to(dtype)
            for gradient, entry, dtype in zip(found, passes, dtypes, strict=True)
        ]

    def verify(self, outputs: Tensor, passes: list[LayerPass], cotangent: Tensor) -> bool:
        """Whether the layers' own passes explain the whole gradient that autograd finds."""
        called = frozenset(entry.module for entry in passes)
        if called in self._verified:
            return True
        explained = self._explained(passes, self.output_gradients(outputs, passes, cotangent))
        for i, gradient in gradients(outputs, self._params, cotangent).items():
            rule, size = explained.get(i, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
            if not bool((gradient.to(rule.dtype) - rule).norm() <= _TOLERANCE * size.norm()):
                return False
        self._verified.add(called)
        return True

    @staticmethod
    def _explained(
        passes: list[LayerPass], output_gradients: list[Tensor]
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Per parameter: its gradient by the rule, and the size of the terms it is the sum of."""
        explained = {}
        for entry, g in zip(passes, output_gradients, strict=True):
            a = entry.inputs.to(g.dtype)
            if "weight" in entry.places:
                explained[entry.places["weight"]] = (g.T @ a, g.abs().T @ a.abs())
            if "bias" in entry.places:
                explained[entry.places["bias"]] = (g.sum(0), g.abs().sum(0))
        return explained
