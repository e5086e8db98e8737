"""Stochastic gradient descent with a method in its pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Unpack

from clext.core.checks import flag, scalar
from clext.optim.base import FusedOptimizer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from clext.ops.plan import ReferencePlan
    from clext.optim.base import Shared


class SGD(FusedOptimizer):
    """torch.optim.SGD in one pass over the parameters, with a method's work in the same pass.

    Args:
        params: parameters, (name, parameter) pairs or param groups.
        lr: learning rate, >= 0: a number, or a float tensor of one element.
        momentum: >= 0.
        dampening: of the gradient's entry into the momentum.
        weight_decay: >= 0, through the gradient.
        nesterov: look ahead; needs momentum and no dampening.
        maximize: climb instead.
        foreach, fused: taken for compatibility; the step is always fused.
        differentiable: must be False.
        shared: `method`, such as `clext.SI(model)`, `proximal`, `clear_grad` and `max_grad_norm`:
            see `FusedOptimizer`, also for errors.
    """

    state_keys: ClassVar[tuple[str, ...]] = ("step", "momentum_buffer")
    own_options: ClassVar[tuple[str, ...]] = ("momentum", "dampening")
    takes_sparse: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **shared)

    def _check_group(self, group: dict[str, Any]) -> None:
        owner = type(self).__name__
        super()._check_group(group)
        group["momentum"] = scalar(owner, "momentum", group["momentum"], minimum=0.0)
        group["dampening"] = scalar(owner, "dampening", group["dampening"])
        if flag(owner, "nesterov", group["nesterov"]) and (
            group["momentum"] == 0 or group["dampening"] != 0
        ):
            raise ValueError(
                f"{owner}: nesterov needs momentum > 0 and dampening 0, got momentum "
                f"{group['momentum']:g} and dampening {group['dampening']:g}"
            )

    @classmethod
    def _keys_of(cls, group: dict[str, Any]) -> tuple[str, ...]:
        return cls.state_keys if group["momentum"] else ()

    def _run(self, plan: ReferencePlan, group: dict[str, Any], **shared: Any) -> Tensor | None:  # noqa: ANN401
        options = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
        return plan.sgd_step_(**{option: group[option] for option in options}, **shared)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for entries in self.state.values():
            if entries.get("momentum_buffer") is not None:
                entries.setdefault("step", 1.0)  # torch's SGD does not count what it has seen
