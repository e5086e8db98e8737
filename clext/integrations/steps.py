"""The steps of an optimizer that a framework drives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clext.methods.base import Method
from clext.optim.base import FusedOptimizer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle


class Steps:
    """From `begin` to `end` the method looks at each step that is taken, and at none skipped.

    What is left to an adapter is to add the pull where its framework has the task's gradients
    complete, and has not clipped them yet.

    Args:
        owner: the adapter, for errors.
        method: `update` is called after each step.

    Raises:
        TypeError: it is no method of clext.
    """

    def __init__(self, owner: str, method: Method) -> None:
        if not isinstance(method, Method):
            raise TypeError(f"{owner}: expected a method of clext, got {type(method).__name__}")
        self._owner, self._method = owner, method
        self.optimizer: Optimizer | None = None  # the one whose steps they are
        self._handle: RemovableHandle | None = None

    def begin(self, optimizers: Iterable[Optimizer]) -> None:
        """Follow the one of these that steps the method's parameters.

        Raises:
            ValueError: none does, or several do, or it makes the pull in its own step.
        """
        self.end()
        known = set(self._method.model.parameters())
        chosen = [
            entry
            for entry in optimizers
            if any(not known.isdisjoint(group["params"]) for group in entry.param_groups)
        ]
        if len(chosen) != 1:
            raise ValueError(
                f"{self._owner}: {len(chosen)} optimizers step parameters of the model that "
                f"{self._method.name} was made for, expected one; make the method of the model "
                "that is trained, and one optimizer with a param group for each part of it"
            )
        (optimizer,) = chosen
        if isinstance(optimizer, FusedOptimizer) and optimizer.method is not None:
            raise ValueError(
                f"{self._owner}: this {type(optimizer).__name__} was given a method and pulls in "
                f"its own step, after gradients were clipped; make it without method="
            )
        self._method._follow_model()
        self.optimizer = optimizer
        self._handle = optimizer.register_step_post_hook(lambda *_: self._method.update())

    def end(self) -> None:
        """Leave the optimizer as it was."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = self.optimizer = None
