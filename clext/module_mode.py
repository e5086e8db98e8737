"""Train and eval mode for a while, and back to exactly what was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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
