"""Stochastic gradient descent with a method in its pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from clext.core.checks import flag, learning_rate, refuse, scalar
from clext.optim.base import FusedOptimizer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from clext.methods.base import Method
    from clext.ops.plan import ReferencePlan


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
        foreach: taken for compatibility; the step is always fused.
        differentiable: must be False.
        fused: taken for compatibility.
        method: a method of clext, such as `clext.SI(model)`: the step pulls to its anchor and
            follows its path integral in the same pass, so its `add_penalty_grad_` and `update` are
            not to be called. See `FusedOptimizer`.
        proximal: solve for the pull after the step rather than follow its gradient: stable at any
            strength, see `FusedOptimizer`.
        clear_grad: set the gradients to zero in the same pass.

    Raises:
        ValueError: an option is out of range, or the method knows none of the parameters.
    """

    own_options: ClassVar[tuple[str, ...]] = ("momentum", "dampening")

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
        method: Method | None = None,
        proximal: bool = False,
        clear_grad: bool = False,
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
        super().__init__(params, defaults, method=method, proximal=proximal, clear_grad=clear_grad)

    def _check_group(self, group: dict[str, Any]) -> None:
        owner = type(self).__name__
        refuse(owner, group, "differentiable")
        group["lr"] = learning_rate(owner, group["lr"])
        for option in ("momentum", "weight_decay"):
            group[option] = scalar(owner, option, group[option], minimum=0.0)
        group["dampening"] = scalar(owner, "dampening", group["dampening"])
        flag(owner, "maximize", group["maximize"])
        if flag(owner, "nesterov", group["nesterov"]) and (
            group["momentum"] == 0 or group["dampening"] != 0
        ):
            raise ValueError(
                f"{owner}: nesterov needs momentum > 0 and dampening 0, got momentum "
                f"{group['momentum']:g} and dampening {group['dampening']:g}"
            )

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("step", "momentum_buffer") if group["momentum"] else ()

    def _run(self, plan: ReferencePlan, group: dict[str, Any], **shared: Any) -> Tensor | None:  # noqa: ANN401
        return plan.sgd_step_(
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            **shared,
        )
