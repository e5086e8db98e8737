"""Autograd's graph of a pass: where in it parameters are used that no layer's rule covers.

Layers may give their parameters to functions (attention, recurrent layers), or compute with them
without a layer (position embeddings, layer scale). The graph knows: from a parameter it is followed
through selections of its entries to the nodes that use these, for which nodes.py has the rules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from clext.importance.call import DIRECT, Call, Path
from clext.importance.nodes import NODE_RULES, Argument, signed
from clext.importance.rules.derived import DerivedRule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch.autograd.graph import Node

    from clext.importance.nodes import NodeUse

# Nodes of which each entry of the output is one of the input's, and none of these comes twice.
_SELECTIONS = frozenset(
    f"{name}Backward{k}"
    for name in (
        *("T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Unsqueeze"),
        *("Squeeze", "Split", "SplitWithSizes", "UnsafeSplit", "UnsafeSplitWithSizes", "Unbind"),
        *("Slice", "Select", "Clone", "Alias", "ToCopy", "Cat", "Stack"),
    )
    for k in range(3)
)
_VIEWS = frozenset({"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"})
_SUMS = frozenset({"AddBackward0", "SubBackward0"})
# Nodes that make another tensor of a parameter, with a gradient that is linear in theirs. Of those
# in the second line, where the tensor has the parameter's shape: else they are uses.
_LINEAR = frozenset({"IndexBackward0", "WeightNormInterfaceBackward0"})
_LINEAR_BY_ENTRY = frozenset({"MulBackward0", "DivBackward0", "NegBackward0", "ExpBackward0"})
_SPREADING = frozenset({*_SUMS, "MulBackward0", "ExpandBackward0"})
_TURNED = "TBackward0"
_TABLE = "EmbeddingBackward0"


class Graph:
    """The nodes that `outputs` came by, and who uses what."""

    def __init__(self, outputs: Tensor) -> None:
        self.nodes: list[Node] = []
        # Of each node: those that use an output of it, which one, and as which of their inputs.
        self._users: dict[Node, list[tuple[Node, int, int]]] = {}
        waiting = [] if outputs.grad_fn is None else [outputs.grad_fn]
        seen = set(waiting)
        while waiting:
            node = waiting.pop()
            self.nodes.append(node)
            for place, (before, output) in enumerate(node.next_functions):
                if before is not None:
                    self._users.setdefault(before, []).append((node, output, place))
                    if before not in seen:
                        seen.add(before)
                        waiting.append(before)

    @property
    def structure(self) -> tuple[str, ...]:
        """The names of the nodes: whatever else happens in a pass shows there."""
        return tuple(node.name() for node in self.nodes)

    @property
    def scales_by_frequency(self) -> bool:
        """Whether a gradient is scaled by how often each token is in the whole batch."""
        return any(getattr(node, "_saved_scale_grad_by_freq", False) for node in self.nodes)

    def calls(self, params: Sequence[Tensor], chosen: Iterable[int], samples: int) -> list[Call]:
        """A call for each use of the parameters `chosen` that nodes.py has a rule for."""
        index = {id(params[i]): i for i in chosen}
        calls = []
        for node in self.nodes if index else ():
            i = index.get(id(getattr(node, "variable", None)))
            if i is not None:
                for argument, way in self._arguments(node, params[i], samples):
                    use = NODE_RULES[argument.node.name()](argument)
                    if use is not None:
                        calls.append(self._call(i, params[i], argument, use, way))
        return calls

    def _arguments(
        self, start: Node, parameter: Tensor, samples: int
    ) -> Iterator[tuple[Argument, list[_Step]]]:
        """Where the parameter arrives, and the selections from there back to it."""
        waiting: list[tuple[Node, int, list[_Step]]] = [(start, -1, [])]
        while waiting:
            node, came_by, way = waiting.pop()
            for user, output, place in self._users.get(node, ()):
                here = way if node is start else [_Step(node, output, came_by), *way]
                shape = parameter.shape if node is start else _shape(node, output)
                name = user.name()
                if name in _SELECTIONS or _derives(user, shape) or self._is_looked_up(user):
                    waiting.append((user, place, here))
                elif name in NODE_RULES:
                    yield Argument(user, place, shape, parameter.dtype, samples), here

    def _call(
        self, i: int, parameter: Tensor, argument: Argument, use: NodeUse, way: list[_Step]
    ) -> Call:
        """The call for parameter i, to which `way` leads back from the argument."""
        rule, rule_shape = use.rule, getattr(use.rule.layer, use.name).shape
        steps: list[Callable[[Tensor], Tensor]] = [*way]
        selects = all(step.selects for step in way)
        key: list[object] = [step.key for step in way]
        if use.turned and way and way[0].name == _TURNED:  # turned twice
            del steps[0], key[0]
        elif use.turned:
            steps.insert(0, Tensor.t)
            key.insert(0, _TURNED)
        elif rule_shape != argument.shape:
            steps.insert(0, lambda tensor: tensor.reshape(argument.shape))
            key.insert(0, argument.shape)
        node, output, inputs = argument.node, 0, use.inputs.detach()
        view = self._unflattening_view(node) if use.unflattens else None
        if view is not None:
            node = view
            inputs = inputs.reshape(*_shape(view)[:-1], inputs.shape[-1])
        if use.beside is not None:
            node, output = node.next_functions[use.beside]
        path = Path(tuple(steps), (rule_shape, *key), rule_shape) if steps else DIRECT
        if not selects:
            rule, path = DerivedRule(rule, path, parameter), DIRECT
        return Call(
            rule,
            {use.name: i},
            inputs,
            GradientEdge(node, output),
            _shape(node, output),
            path=path,
            order=use.order,
            kind=(argument.node.name(), argument.place, i, *(step.name for step in way)),
        )

    def _unflattening_view(self, node: Node) -> Node | None:
        """The only user of a matrix, if that takes its rows for several dimensions."""
        users = self._users.get(node, ())
        if len(users) != 1 or users[0][0].name() not in _VIEWS:
            return None
        view = users[0][0]
        return view if _shape(view)[-1:] == _shape(node)[-1:] else None

    def _is_looked_up(self, node: Node) -> bool:
        """Whether it takes rows of a table that are no sample's own: they are copied for the
        samples later.
        """
        if node.name() != _TABLE:
            return False
        waiting: list[Node] = [node]
        while waiting:
            before = waiting.pop()
            for user, output, _ in self._users.get(before, ()):
                size = _shape(before, output).numel()
                if user.name() in _SELECTIONS:
                    waiting.append(user)
                elif user.name() in _SPREADING and _shape(user).numel() > size:
                    return True
        return False


class _Step:
    """The way back from an output of a node to an input.

    `selects`: whether each entry of the output is one of the input's, and no two are the same.
    """

    def __init__(self, node: Any, output: int, place: int) -> None:  # noqa: ANN401
        self.name, self.output, self.place = node.name(), output, place
        self._node = node
        self._rows: list[int] = []  # of a table
        self.selects = self.name in _SELECTIONS
        self._is_identity = self.name.startswith("ToCopy")
        if self.name in _SUMS:
            first = place == 0 or (self.name == "AddBackward0" and node._saved_alpha == 1)
            self.selects = self._is_identity = first
        elif self.name == _TABLE:
            self._rows = node._saved_indices.flatten().tolist()
            padding = signed(node._saved_padding_idx)
            self.selects = len({padding, *self._rows}) == len(self._rows) + 1

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for selections of the same entries, of tensors of the same shape."""
        options = [getattr(self._node, name) for name in _options(type(self._node))]
        return (self.name, self.output, self.place, *self._rows, *options)

    def __call__(self, gradient: Tensor) -> Tensor:
        if self._is_identity:
            return gradient
        outputs = self._node._input_metadata
        if not self.selects:  # it calculates with what it has saved
            gradient = gradient.to(outputs[self.output].dtype)
        gradients: list[Tensor | None] = [None] * len(outputs)
        gradients[self.output] = gradient
        with torch.no_grad():
            found = self._node(*gradients)
        arrived: Tensor = found[self.place] if isinstance(found, tuple) else found
        return arrived.to_dense()  # an embedding may give a sparse one


_known_options: dict[type, tuple[str, ...]] = {}


def _options(kind: type) -> tuple[str, ...]:
    """The numbers that a kind of selection has saved: sizes, dimensions, places."""
    if kind not in _known_options:
        saved = (name for name in dir(kind) if name.startswith("_saved_"))
        _known_options[kind] = tuple(name for name in saved if name != "_saved_indices")
    return _known_options[kind]


def _shape(node: Any, output: int = 0) -> torch.Size:  # noqa: ANN401
    return torch.Size(node._input_metadata[output].shape)


def _derives(node: Any, shape: torch.Size) -> bool:  # noqa: ANN401
    """Whether it makes another tensor of an input of `shape` that is a parameter's."""
    name = node.name()
    if name == "NativeBatchNormBackward0":  # standardised weights: a batch of one
        return bool(node._saved_training) and _shape(node)[0] == 1
    by_entry = name in _SUMS or name in _LINEAR_BY_ENTRY
    return name in _LINEAR or (by_entry and _shape(node) == shape)
