"""Call of a layer: the parameters it uses, its tensors as rows, where its gradient arrives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from clext.core.lists import widest
from clext.importance.layout import WHOLE, AnyLayout

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch
    from torch.autograd.graph import GradientEdge

    from clext.importance.rule import LayerRule, Use


@dataclass(frozen=True)
class Path:
    """How a parameter became the tensor that a call uses: by selections alone.

    Each entry of the tensor is one of the parameter's, and none of them comes twice: so a function
    of each entry of a gradient goes back as the gradient does. `steps`: back to the parameter.
    `key`: equal for equal selections. `shape`: of the tensor, as the call's rule has it.
    """

    steps: tuple[Callable[[Tensor], Tensor], ...] = ()
    key: tuple[object, ...] = ()
    shape: tuple[int, ...] = ()

    def back(self, gradient: Tensor) -> Tensor:
        """From entries of the tensor to those of the parameter; zero where there are none."""
        for step in self.steps:
            gradient = step(gradient)
        return gradient


DIRECT = Path()


@dataclass(eq=False)
class Call:
    """One call of a layer in a forward pass: its tensors as rows of samples, see rule.py.

    `places`: name of a parameter -> its index. `path`: to the parameters, where they are not used
    as they are. `order`: the output's dimensions as the rule counts them. `kind`: equal for calls
    that may take each other's place. As long as nothing else is said, all rows are those of one
    sample.
    """

    rule: LayerRule
    places: dict[str, int]
    inputs: Tensor
    edge: GradientEdge
    output_shape: torch.Size
    path: Path = DIRECT
    order: tuple[int, ...] | None = None
    kind: object = None
    layout: AnyLayout = WHOLE
    samples: int = 1

    @property
    def leading(self) -> torch.Size:
        """The sizes of the input's dimensions that count rows."""
        return self.inputs.shape[: self.inputs.dim() - self.row_dims[0]]

    @property
    def separable(self) -> bool:
        """Whether a function of the gradient is the gradient of the functions."""
        return self.rule.separable(self.layout.rows_each(self.leading, self.samples))

    @property
    def dtype(self) -> torch.dtype:
        """What the rule calculates in: the state dtype of the layer's parameters."""
        return widest(getattr(self.rule.layer, name) for name in self.places)

    @property
    def row_dims(self) -> tuple[int, int]:
        """How many of the last dimensions of input and output make up one row."""
        return self.rule.row_dims(self.inputs.dim())

    def rows(self, g: Tensor) -> Tensor:
        """The gradient by the output as [samples, rows, ...]."""
        return self.layout.rows(g, self.row_dims[1], self.samples)

    def features(self) -> Tensor:
        """What the output gradient is multiplied with, [samples, rows, ...]."""
        return self.rule.features(self._input_rows())

    def parts(self, g: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and output gradients, for as many samples at a time as the rule wants."""
        inputs = self._input_rows()
        size = self.rule.samples_at_once(inputs)
        for some, gradients in zip(inputs.split(size), g.split(size), strict=True):
            yield self.rule.features(some), gradients

    def input_columns(self) -> Iterator[Tensor]:
        """Of all rows what the rule multiplies with, see `LayerRule.multiplies`."""
        return self.rule.input_columns(self._input_rows().flatten(0, 1))

    def output_columns(self, g: Tensor) -> Tensor:
        """Of all rows the gradient by what the rule multiplies with."""
        return self.rule.output_columns(self.rows(g).flatten(0, 1))

    def use(self, name: str, rows: Tensor) -> Use:
        """The parameter `name` in this call, for the output gradient `rows`."""
        return self.rule, name, self.features(), rows

    def release(self) -> None:
        """Give the memory of the input back: from then on there is none."""
        del self.inputs

    def _input_rows(self) -> Tensor:
        rows = self.layout.rows(self.inputs, self.row_dims[0], self.samples)
        return rows.to(self.dtype) if rows.is_floating_point() else rows


@dataclass
class Piece:
    """What uses the same part of one parameter: calls, and the parameter's name in each."""

    path: Path
    uses: list[tuple[Call, str]] = field(default_factory=list)

    def room(self, parameter: Tensor) -> Tensor | None:
        """Zeros to sum up in, of the dtype of `parameter`; None to do that in its own shape and
        layout.
        """
        call, name = self.uses[0]
        shape = self.path.shape if self.path.steps else parameter.shape
        like = parameter.new_zeros(()).expand(shape)
        room = call.rule.room(name, like)
        return like.new_zeros(shape) if room is None and self.path.steps else room


def pieces_of(uses: Iterable[tuple[Call, str]]) -> list[Piece]:
    """The uses of one parameter, those of the same part together."""
    found: dict[object, Piece] = {}
    for call, name in uses:
        found.setdefault(call.path.key, Piece(call.path)).uses.append((call, name))
    return list(found.values())
