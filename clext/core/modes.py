"""Modes of a model for a while: train or eval, eager, buffers of its own; then what was before."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn


@contextmanager
def module_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Train or eval mode inside; afterwards every submodule has its own mode back."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


_lock, _eager = threading.Lock(), ExitStack()
_inside = 0


@contextmanager
def run_eagerly() -> Iterator[None]:
    """Compiled models run eagerly inside: compiled code leaves out hooks that came after it.

    That is a setting of the process: the last of several threads puts it back.
    """
    global _inside
    if "torch._dynamo" not in sys.modules:
        yield  # nothing is compiled, and importing it takes seconds
        return
    with _lock:
        if not _inside:
            _eager.enter_context(torch.compiler.set_stance("force_eager"))
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _eager.close()


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Forward passes inside work on copies of the buffers: batch statistics do not move."""
    kept = [(module, dict(module._buffers)) for module in model.modules()]
    copies: dict[int, Tensor] = {}  # one for each, also where modules share it
    for module, buffers in kept:
        for name, buffer in buffers.items():
            if buffer is not None:
                copies.setdefault(id(buffer), buffer.clone())
                module._buffers[name] = copies[id(buffer)]
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers.clear()
            module._buffers.update(buffers)


class _Called(nn.Module):
    """A call of `model` by a function, as a module in which torch.func replaces parameters."""

    def __init__(self, model: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self._call = partial(call)  # no submodule: it may be the model itself

    def forward(self, *args: object) -> Tensor:
        return self._call(*args)


def call_with(
    model: nn.Module, values: Mapping[str, Tensor], call: Callable[..., Tensor], *args: object
) -> Tensor:
    """`call(*args)`, which calls `model`, with these values as its parameters and buffers."""
    named = {f"model.{name}": value for name, value in values.items()}
    found: Tensor = torch.func.functional_call(_Called(model, call), named, args)
    return found
