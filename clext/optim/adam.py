"""Adam and AdamW with a method in their pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Unpack

from clext.core.checks import flag, refuse, scalar
from clext.optim.base import FusedOptimizer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from clext.ops.plan import ReferencePlan
    from clext.optim.base import Shared


class Adam(FusedOptimizer):
    """torch.optim.Adam in one pass over the parameters, with a method's work in the same pass.

    Kingma and Ba 2015, arXiv:1412.6980.

    Args:
        params: parameters, (name, parameter) pairs or param groups.
        lr: learning rate, >= 0: a number, or a float tensor of one element.
        betas: weights of the old averages of the gradient and its square, in [0, 1).
        eps: added to the root of the second average, >= 0.
        weight_decay: >= 0.
        amsgrad, differentiable: must be False.
        maximize: climb instead.
        foreach, capturable, fused: taken for compatibility; the step is fused and can be captured.
        decoupled_weight_decay: beside the gradient (AdamW) rather than through it.
        shared: `method`, such as `clext.SI(model)`, `proximal`, `clear_grad` and `max_grad_norm`:
            see `FusedOptimizer`, also for errors.
    """

    state_keys: ClassVar[tuple[str, ...]] = ("step", "exp_avg", "exp_avg_sq")
    own_options: ClassVar[tuple[str, ...]] = ("betas", "eps")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **shared: Unpack[Shared],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **shared)

    def _check_group(self, group: dict[str, Any]) -> None:
        owner = type(self).__name__
        super()._check_group(group)
        refuse(owner, group, "amsgrad")
        flag(owner, "decoupled_weight_decay", group["decoupled_weight_decay"])
        group["eps"] = scalar(owner, "eps", group["eps"], minimum=0.0)
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"{owner}: betas must be two numbers, got {betas!r}")
        bounds = {"minimum": 0.0, "maximum": 1.0, "open_maximum": True}
        group["betas"] = tuple(
            scalar(owner, f"betas[{i}]", beta, **bounds) for i, beta in enumerate(betas)
        )

    def _run(self, plan: ReferencePlan, group: dict[str, Any], **shared: Any) -> Tensor | None:  # noqa: ANN401
        beta1, beta2 = group["betas"]
        return plan.adam_step_(
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            maximize=group["maximize"],
            **shared,
        )


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101).

    Arguments and errors are those of `Adam`; weight_decay is 1e-2 unless given.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Any,  # noqa: ANN401
    ) -> None:
        options["decoupled_weight_decay"] = True
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True  # whatever the loaded state was of
