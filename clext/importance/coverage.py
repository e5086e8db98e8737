"""Coverage of a pass by the layer rules: of which parameters they give the samples' gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from clext.core.inputs import taken
from clext.importance.agreement import rules_agree
from clext.importance.call import Call, Piece, pieces_of
from clext.importance.capture import output_gradients
from clext.importance.graph import Graph
from clext.importance.layout import (
    AnyLayout,
    Layout,
    PackedLayout,
    moves_samples,
    moving,
    possible_layouts,
)
from clext.importance.passes import flat
from clext.importance.rules.norms import ScaleRule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.autograd.graph import Node
    from torch.nn.utils.rnn import PackedSequence

    from clext.core.inputs import Inputs
    from clext.importance.capture import Capture

_LOW_PRECISION_TOLERANCE = 0.1

# How far outputs of a smaller batch may be off, relative to how much those of samples differ: each
# layer may be rounded otherwise.
_SAME_TOLERANCE = {torch.float64: 1e-6, torch.float32: 0.02}
_GROUPS = 4  # in which the samples run once more

# All groups of samples but one are probed, by a backward pass each. Of two samples that changed
# places, that shows the one whose group is probed, unless the other is in the same.
_PROBED_GROUPS = 3

# Of each call those that its rows may have.
Layouts = dict[Call, list[AnyLayout]]

# Of each parameter that the rules cover: what uses which part of it.
Uses = dict[int, list[Piece]]


@dataclass(frozen=True)
class Coverage:
    """What the rules cover of a pass, which has `calls`.

    `layouts`: of each call, None if its rows do not belong to samples. `covered`: the parameters
    whose gradients the rules give. `singly`: those that need torch.func. `mixed`: the samples of a
    batch even change each other's outputs. `unsettled`: parameters without a gradient so far, of
    which nothing is known yet. `sample_dims`: where rows are moved, which dimension counts samples.
    """

    calls: Sequence[Call] = ()
    layouts: Sequence[AnyLayout | None] = ()
    samples: int = 1
    covered: frozenset[int] = frozenset()
    singly: frozenset[int] = frozenset()
    mixed: bool = False
    unsettled: frozenset[int] = frozenset()
    sample_dims: tuple[int | None, ...] = ()

    def uses(self) -> Uses:
        """The uses of the parameters covered; from now on their calls tell rows by sample."""
        found: dict[int, list[tuple[Call, str]]] = {}
        for call, layout in zip(self.calls, self.layouts, strict=False):
            if layout is not None:
                call.layout, call.samples = layout, self.samples
                for name, i in call.places.items():
                    if i in self.covered:
                        found.setdefault(i, []).append((call, name))
        return {i: pieces_of(uses) for i, uses in found.items()}


class CoverageFinder:
    """Finds the coverage of each batch's pass, once for each kind of pass.

    Two passes are of one kind if their graphs have the same nodes, they make the same calls in the
    same order, and the sizes allow the same layouts. The first one is probed: its rows are matched
    to samples by which samples move them, and the gradient by the rules is compared with
    autograd's, so that uses of a parameter that no rule sees are noticed. A parameter that had no
    gradient in it is compared again until it has one. Where the data may arrange the rows (a sample
    has several rows in one dimension, or rows are moved by an index), every pass is probed.

    Where layers do not give all of a parameter's uses, the graph is asked for them instead.
    """

    def __init__(self, capture: Capture, params: Sequence[Tensor]) -> None:
        self._capture, self._params = capture, params
        self._trainable = frozenset(i for i, p in enumerate(params) if p.requires_grad)
        self._by_graph = capture.without_rule  # the parameters that the graph is asked for
        self._known: dict[object, Coverage] = {}
        self._unmixed: set[object] = set()  # structures of passes

    def find(self, x: Inputs, outputs: Tensor, calls: Sequence[Call], samples: int) -> Coverage:
        """The coverage of the pass of `x` that made `outputs` [rows, outputs] and `calls`.

        Its rows are told apart by `samples`: all, or 1 to take all of them as one sample's.
        """
        graph, packs = Graph(outputs), self._capture.packs
        hooked, calls = calls, self._with_graph(graph, calls, samples, packs)
        moves = moving(graph.nodes, samples) if samples > 1 else []
        possible = _possible(calls, samples, packs)
        structure = (samples, len(outputs), graph.structure)
        moved = tuple(node.name() for node in moves)
        kind = _kind((structure, moved), calls, possible)
        known = self._known.get(kind)
        if known is not None and not _any_moves(moves, known):
            known = replace(known, calls=calls)
            return self._settle(outputs, known, kind) if known.unsettled else known
        if structure not in self._unmixed and mixes(self._capture, x, outputs):
            found, lasting = Coverage(singly=self._trainable, mixed=True), True
        else:
            found, lasting = self._probe(outputs, calls, possible, moves, samples)
            if samples > 1 and not found.singly <= self._by_graph:
                self._by_graph |= found.singly
                calls = self._with_graph(graph, hooked, samples, packs)
                possible = _possible(calls, samples, packs)
                kind = _kind((structure, moved), calls, possible)
                found, lasting = self._probe(outputs, calls, possible, moves, samples)
            self._unmixed.add(structure)
        if lasting and not _any_moves(moves, found):
            self._known[kind] = replace(found, calls=())  # which would keep the pass's tensors
        return found

    def _with_graph(
        self, graph: Graph, calls: Sequence[Call], samples: int, packs: Sequence[PackedSequence]
    ) -> list[Call]:
        """The calls, those of the graph in the place of what the layers do not give in full."""
        if samples == 1:
            return list(calls)  # all rows are its own, wherever they are
        fitting = [
            call
            for call in calls
            # With one row in front it is broadcast to the samples later, as positions are.
            if call.leading[:1] != (1,) and possible_layouts(call.leading, samples, packs)
        ]
        self._by_graph |= self._trainable - {i for call in fitting for i in call.places.values()}
        kept = []
        for call in calls:
            call.places = {name: i for name, i in call.places.items() if i not in self._by_graph}
            if call.places:
                kept.append(call)
        return kept + graph.calls(self._params, self._by_graph, samples)

    def _probe(
        self,
        outputs: Tensor,
        calls: Sequence[Call],
        possible: Layouts,
        moves: Sequence[Node],
        samples: int,
    ) -> tuple[Coverage, bool]:
        """The coverage, and whether all passes of this kind have it."""
        before = [_moved(node) for node in moves]
        watched = [call for call in before if call is not None]
        possible = _find_layouts(outputs, {**possible, **_possible(watched, samples)}, samples)
        layouts = [possible[call][0] if possible[call] else None for call in calls]
        dims = {call: _sample_dim(call, found, samples) for call, found in possible.items()}
        # What is zero fits everything, and so does an arrangement that two layouts describe. Of
        # several rows of a sample in one dimension, the data may say which they are.
        lasting = all(not possible[call] or dims[call] is not None for call in calls)
        singly: set[int] = set()
        for call, layout in zip(calls, layouts, strict=True):
            singly.update(call.places.values() if layout is None else ())
        coverage = Coverage(
            calls,
            layouts,
            samples,
            singly=frozenset(singly),
            sample_dims=tuple(None if call is None else dims[call] for call in before),
        )
        found = self._compare(outputs, coverage, self._trainable - singly)
        return found, lasting or samples == 1

    def _settle(self, outputs: Tensor, known: Coverage, kind: object) -> Coverage:
        """What this pass says of parameters of which nothing was known."""
        found = self._compare(outputs, known, known.unsettled)
        self._known[kind] = replace(found, calls=())
        return found

    def _compare(self, outputs: Tensor, coverage: Coverage, chosen: frozenset[int]) -> Coverage:
        """`coverage` with what a comparison with autograd tells of the parameters `chosen`."""
        uses = replace(coverage, covered=chosen).uses()
        calls = list({call: None for ps in uses.values() for p in ps for call, _ in p.uses})
        indices = sorted(chosen)
        by_output, by_parameter = output_gradients(
            outputs, calls, _weights(outputs), [self._params[i] for i in indices]
        )
        arrived = dict(zip(calls, by_output, strict=True))
        right: set[int] = set()
        wrong: set[int] = set()
        settled: set[int] = set()
        for i, gradient in zip(indices, by_parameter, strict=True):
            if gradient is None:  # the layer was called to no avail, or the parameter not used
                continue
            gradient = gradient.to_dense()
            explained = rules_agree(gradient, uses.get(i, []), arrived)
            (right if explained else wrong).add(i)
            if not explained or bool(gradient.any()):
                settled.add(i)
        return replace(
            coverage,
            covered=(coverage.covered - chosen) | right,
            singly=coverage.singly | wrong,
            unsettled=chosen - settled,
        )


def _kind(structure: object, calls: Sequence[Call], possible: Layouts) -> object:
    """Equal for passes that have the same coverage."""
    parts: dict[int, set[object]] = {}
    for call in calls:
        for i in call.places.values():
            parts.setdefault(i, set()).add(call.path.key)
    return (
        structure,
        *((call.kind, *call.places.items(), *possible[call]) for call in calls),
        *((i, frozenset(keys)) for i, keys in parts.items() if len(keys) > 1),
    )


def _weights(outputs: Tensor) -> Tensor:
    """What outputs are weighted with in a probe: a gradient must not vanish by chance."""
    draws = torch.Generator().manual_seed(0)
    return torch.randn(outputs.shape, generator=draws).to(outputs)


def _possible(calls: Sequence[Call], samples: int, packs: Sequence[PackedSequence] = ()) -> Layouts:
    """What the sizes allow."""
    return {call: possible_layouts(call.leading, samples, packs) for call in calls}


def _find_layouts(outputs: Tensor, possible: Layouts, samples: int) -> Layouts:
    """Those of the layouts that the rows of each call may have.

    Where only some samples' outputs are differentiated, the rows of all others have no gradient:
    not even one of rounding.
    """
    draws = torch.Generator().manual_seed(0)
    group = torch.randperm(samples, generator=draws) % _PROBED_GROUPS
    left = dict(possible)
    for k in range(_PROBED_GROUPS - 1) if samples > 1 else ():
        _keep_fitting(outputs, left, list(left), group == k)
    # The order of a packed sequence may differ from the samples' own in two of the same group.
    number = torch.arange(samples)
    for bit in range((samples - 1).bit_length()):
        unclear = [call for call, layouts in left.items() if len(layouts) > 1]
        unclear = [c for c in unclear if any(isinstance(e, PackedLayout) for e in left[c])]
        if unclear:
            _keep_fitting(outputs, left, unclear, (number >> bit) % 2 == 1)
    return left


def _keep_fitting(outputs: Tensor, left: Layouts, calls: Sequence[Call], chosen: Tensor) -> None:
    """Keep of the layouts of `calls` those by which only samples `chosen` have a gradient, where
    only their outputs are differentiated.
    """
    chosen = chosen.to(outputs.device)
    found, _ = output_gradients(outputs, calls, _weights(outputs) * chosen.unsqueeze(1))
    for call, g in zip(calls, found, strict=True):
        if g is not None:
            dims, samples = call.row_dims[1], len(chosen)
            left[call] = [
                layout
                for layout in left[call]
                if not bool(layout.rows(g, dims, samples)[~chosen].any())
            ]


def _sample_dim(call: Call, layouts: Sequence[AnyLayout], samples: int) -> int | None:
    """The dimension of the call that counts samples, and nothing else; None if it is not known."""
    if len(layouts) == 1 and isinstance(layouts[0], Layout):
        dim = layouts[0].dim
        return dim if call.leading[dim] == samples else None
    return None


def _moved(node: Node) -> Call | None:
    """What `node` moves, as a call without parameters; None if no gradient arrives there."""
    before, output = node.next_functions[0]
    if before is None:
        return None
    shape = torch.Size(before._input_metadata[output].shape)
    rule = ScaleRule(SimpleNamespace(row_dims=0))
    return Call(rule, {}, torch.zeros(()).expand(shape), GradientEdge(before, output), shape)


def _any_moves(moves: Sequence[Node], coverage: Coverage) -> bool:
    """Whether the samples are moved: then they are in the order that each batch's data says."""
    if coverage.mixed:
        return bool(moves)
    pairs = zip(moves, coverage.sample_dims, strict=True)
    return any(moves_samples(node, dim) for node, dim in pairs)


def mixes(capture: Capture, x: Inputs, outputs: Tensor) -> bool:
    """Whether samples change each other's outputs: a few in another order are compared with all.

    `outputs` are those of `x`. All passes have gradients: some layers calculate otherwise without.
    """
    whole, count = outputs.detach(), len(outputs)
    if count == 1:
        return False
    # Relative to how much samples differ: what all have in common tells nothing.
    spread = (whole - whole.mean(0)).abs().max()
    tolerance = _SAME_TOLERANCE.get(whole.dtype, _LOW_PRECISION_TOLERANCE)
    rounding = 16 * torch.finfo(whole.dtype).eps * whole.abs().max()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(whole.device)
    for group in order.chunk(_GROUPS):
        try:
            few, _ = capture.forward(taken(x, group))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a model for one size of batches
            few, _ = capture.forward(taken(x, group.repeat(count)[:count]))
            few = few[: len(group)]
        if not isinstance(few, Tensor) or flat(few).shape != whole[group].shape:
            return True
        if bool((flat(few).detach() - whole[group]).abs().max() > tolerance * spread + rounding):
            return True
    return False
