"""Capture of a forward pass: what goes into each layer with a rule, and where gradients arrive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.utils.rnn import PackedSequence

from clext.core.inputs import mapped
from clext.importance.call import Call
from clext.importance.rules import rule_for

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.autograd.graph import Node
    from torch.utils.hooks import RemovableHandle

    from clext.core.inputs import Inputs
    from clext.importance.passes import Forward
    from clext.importance.rule import LayerRule


class Capture:
    """Runs `forward`, watching the layers of `model` with rules for some of the trainable `params`.

    `without_rule` are the indices of the trainable parameters that a layer without a rule holds
    (also those that it shares with layers that have one). `packs` are the packed sequences that
    recurrent layers were given in the last forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[Tensor],
        forward: Forward,
        accept: Callable[[LayerRule], bool] = lambda _: True,
    ) -> None:
        self._forward = forward
        self._layers: dict[nn.Module, tuple[LayerRule, dict[str, int]]] = {}
        index = {id(entry): i for i, entry in enumerate(params) if entry.requires_grad}
        without_rule: set[int] = set()
        for module in model.modules():
            rule = rule_for(module)
            own = module.named_parameters(recurse=False, remove_duplicate=False)
            places = {name: index[id(entry)] for name, entry in own if id(entry) in index}
            if rule is None or not accept(rule) or not places.keys() <= {"weight", "bias"}:
                without_rule.update(places.values())
            elif places:
                self._layers[module] = (rule, places)
        self.without_rule = frozenset(without_rule)
        self.packs: list[PackedSequence] = []
        self._recurrent = [m for m in model.modules() if isinstance(m, nn.RNNBase)]

    def forward(self, x: Inputs) -> tuple[Any, list[Call]]:
        """The outputs, and the calls through which they may depend on parameters."""
        calls: list[Call] = []
        self.packs = []

        def look(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], PackedSequence):
                self.packs.append(args[0])

        def capture(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> None:
            if output.requires_grad:  # else it was called under no_grad
                rule, places = self._layers[module]
                inputs = args[0] if args else next(iter(kwargs.values()))
                call = Call(rule, places, inputs.detach(), _edge(output), output.shape, kind=rule)
                calls.append(call)

        handles: list[RemovableHandle] = []
        try:
            for module in self._layers:
                # First of all hooks, to see the layer's own output.
                handle = module.register_forward_hook(capture, prepend=True, with_kwargs=True)
                handles.append(handle)
            handles += [module.register_forward_pre_hook(look) for module in self._recurrent]
            outputs = self._forward(mapped(Tensor.clone, x))  # it may be changed in place
        finally:
            for handle in handles:
                handle.remove()
        return outputs, calls


def _edge(output: Tensor) -> GradientEdge:
    """Where the gradient by `output` arrives, as it is now: an in-place change may follow.

    Some layers return a reshaped view of what they computed. An in-place change of a view
    re-routes the gradient past it, to the tensor that it is a view of.
    """
    base = output._base
    if base is not None and base.is_contiguous() and output.is_contiguous():
        same = base.numel() == output.numel()
        return get_gradient_edge(base if same else output)
    return get_gradient_edge(output)


def output_gradients(
    outputs: Tensor,
    calls: Sequence[Call],
    cotangent: Tensor,
    params: Sequence[Tensor] = (),
    *,
    keep_graph: bool = True,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Of sum(outputs * cotangent): the gradients by each call's output, and by `params`.

    In the calls' state dtype; None where the outputs do not depend on it. `keep_graph`: for
    another cotangent.
    """
    if not outputs.requires_grad or not (calls or params):
        return [None] * len(calls), [None] * len(params)
    inputs: Any = [*(call.edge for call in calls), *params]
    found: Sequence[Tensor | None] = torch.autograd.grad(
        outputs,
        inputs,
        cotangent.to(outputs.dtype),
        retain_graph=keep_graph,
        allow_unused=True,
    )
    by_output = [
        None if g is None else _as_output(g, call) for g, call in zip(found, calls, strict=False)
    ]
    return by_output, list(found[len(calls) :])


def stream_output_gradients(
    outputs: Tensor,
    calls: Sequence[Call],
    ends: Sequence[Call],
    cotangent: Tensor,
    receive: Callable[[Call, Tensor], None],
    *,
    keep_graph: bool,
) -> None:
    """Give `receive` each call and the gradient by its output, once it is there.

    As `output_gradients`, but not all gradients are in memory at the same time. `ends`: see below.
    Without `keep_graph` what is on the way is given back as the backward pass goes.
    """
    if not outputs.requires_grad:
        return
    this_pass: list[int] = []

    def begin(_: object) -> None:
        if not this_pass:
            this_pass.append(torch._C._current_graph_task_id())

    def hook(call: Call) -> Callable[[tuple[Tensor | None, ...]], None]:
        def deliver(gradients: tuple[Tensor | None, ...]) -> None:
            # A hook of the model's own may go through the same nodes, in a pass inside this one.
            g = gradients[call.edge.output_nr]
            if g is not None and torch._C._current_graph_task_id() in this_pass:
                receive(call, _as_output(g, call))

        return deliver

    assert outputs.grad_fn is not None
    handles = [outputs.grad_fn.register_prehook(begin)]
    # On its way to the ends, the backward pass comes through all the others.
    passed = [call for call in calls if call not in ends]
    handles += [call.edge.node.register_prehook(hook(call)) for call in passed]
    try:
        found, _ = output_gradients(outputs, ends, cotangent, keep_graph=keep_graph)
    finally:
        for handle in handles:
            handle.remove()
    for call, g in zip(ends, found, strict=True):
        if g is not None:
            receive(call, g)


def ends_of(calls: Sequence[Call]) -> list[Call]:
    """The calls from which the way back does not come to another call."""
    nodes = {call.edge.node for call in calls}
    leads_on: dict[Node, bool] = {}
    for call in calls:
        waiting = [call.edge.node]
        while waiting:
            node = waiting[-1]
            if node in leads_on:
                waiting.pop()
                continue
            before = [entry for entry, _ in node.next_functions if entry is not None]
            if any(entry in nodes or leads_on.get(entry) for entry in before):
                leads_on[waiting.pop()] = True
            elif unknown := [entry for entry in before if entry not in leads_on]:
                waiting.extend(unknown)
            else:
                leads_on[waiting.pop()] = False
    return [call for call in calls if not leads_on[call.edge.node]]


def _as_output(g: Tensor, call: Call) -> Tensor:
    """A gradient that arrived at the call's edge, shaped as its output, in the rule's dtype."""
    g = g.reshape(call.output_shape).to(call.dtype)
    return g if call.order is None else g.permute(call.order)
