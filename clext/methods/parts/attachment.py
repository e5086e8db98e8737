"""The attachment of a method to an optimizer of torch: two hooks of that optimizer's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from clext.core.sharding import whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.optim import Optimizer

    from clext.methods.base import Method


class Attachment:
    """Pulls before each step of an optimizer, or after each evaluation of its closure.

    Args:
        method: `add_penalty_grad_` is called before a step, `update` after it.
        optimizer: any of torch's kind, for parameters of the method's model. A copy of it has no
            hooks: attach the copy again.

    Raises:
        ValueError: it has none of these parameters, or the method in its pass already.
    """

    def __init__(self, method: Method, optimizer: Optimizer) -> None:
        known = set(method.model.parameters())
        if all(known.isdisjoint(group["params"]) for group in optimizer.param_groups):
            raise ValueError(
                f"attach: {method.name} was made for a model that has none of the parameters of "
                f"this {type(optimizer).__name__}"
            )
        if method.fused is not None and getattr(optimizer, "method", None) is method:
            raise ValueError(
                f"attach: this {type(optimizer).__name__} was given the {method.name} when it was "
                "made, so its step does all of it; leave attach() out"
            )
        method._follow_model()
        self._method = method
        self.penalty: Tensor | None = None  # before the last step
        self._handles = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        for handle in self._handles:
            handle.remove()

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # args[0] is the optimizer, as step is called on the class.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._pull(optimizer)
            return None
        return (args[0], self._pulled(closure, optimizer), *args[2:]), {
            key: value for key, value in kwargs.items() if key != "closure"
        }

    def _pulled(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        """The closure with the pull in the gradients and the penalty in the loss."""

        def evaluate() -> Any:  # noqa: ANN401  (whatever the closure returns)
            loss = closure()
            penalty = self._pull(optimizer)
            return None if loss is None else loss + whole(penalty)

        return evaluate

    def _pull(self, optimizer: Optimizer) -> Tensor:
        # Where the optimizer unscales in its step, GradScaler has left it the scale.
        with torch.no_grad():
            self.penalty = self._method.add_penalty_grad_(getattr(optimizer, "grad_scale", None))
        return self.penalty

    def _after(self, *_step: object) -> None:
        self._method.update()
