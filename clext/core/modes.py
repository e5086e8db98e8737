"""Modes of a model for a while: train or eval, eager, buffers of its own; then what was before."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

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


class _ProcessWide:
    """A setting of the process: the first of several threads makes it, the last puts it back."""

    def __init__(self, module: str, make: Callable[[], AbstractContextManager[object]]) -> None:
        self._module, self._make = module, make
        self._lock, self._made, self._inside = threading.Lock(), ExitStack(), 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if self._module not in sys.modules:
            yield  # nobody uses what it is a setting of; importing that may take seconds
            return
        with self._lock:
            if not self._inside:
                self._made.enter_context(self._make())
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._made.close()


@contextmanager
def _plain_checkpoints() -> Iterator[None]:
    from torch.utils import checkpoint

    # What both variants of `checkpoint` call, which models have imported by name.
    kind: Any = checkpoint.CheckpointFunction
    generator = checkpoint._checkpoint_without_reentrant_generator
    kind.apply = staticmethod(lambda function, _, *args: function(*args))
    checkpoint._checkpoint_without_reentrant_generator = lambda *_, **__: iter([None])
    try:
        yield
    finally:
        del kind.apply  # and has that of its base again
        checkpoint._checkpoint_without_reentrant_generator = generator


# Compiled models run eagerly inside: compiled code leaves out hooks that came after it.
run_eagerly = _ProcessWide("torch._dynamo", lambda: torch.compiler.set_stance("force_eager"))

# Activations are kept inside, not calculated again (torch.utils.checkpoint): the reentrant variant
# refuses `torch.autograd.grad`, the other runs again for each look at what it has saved.
without_checkpointing = _ProcessWide("torch.utils.checkpoint", _plain_checkpoints)


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
