"""Plans: the parameters of a model and the state that goes with them, for the ops of every step."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from clext.core.sharding import Mesh, gradient_part, is_sharded, local, number_of_parts, sharded_as
from clext.ops import reference
from clext.ops._extension import C, build_info
from clext.ops.reference.arithmetic import total

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from clext.core.lists import TensorList

_OLDEST_DRIVER = 12010  # as CUDA counts: 12.1


class ReferencePlan:
    """The interface of the compiled ParameterPlan, in plain torch for devices without kernels.

    `names`: one per parameter. `state`: lists as long as `params`, each entry laid out like its
    parameter and in the state dtype ("anchor" and "importance" may be bfloat16 for float32), by the
    keys that the methods below take. `steps`: one 0-dim state tensor per parameter for the steps of
    an optimizer, or none.
    """

    def __init__(
        self,
        names: Sequence[str],  # noqa: ARG002  (for the messages of the compiled plan)
        params: TensorList,
        state: Mapping[str, TensorList],
        steps: TensorList = (),
    ) -> None:
        self._lists = {"params": list(params), "steps": list(steps)}
        self._lists |= {key: list(tensors) for key, tensors in state.items()}
        self._pulled: list[int] | None = None  # the parameters that the last pull was added to

    def _of(self, keys: str, chosen: Sequence[int] | None = None) -> list[list[Tensor]]:
        """The lists of these keys: the entries of `chosen` parameters, or all of them."""
        lists = [self._lists[key] for key in keys.split()]
        return lists if chosen is None else [[entries[i] for i in chosen] for entries in lists]

    def quadratic_penalty(self) -> Tensor:
        """The penalty's value without strength, without autograd (0-dim)."""
        with torch.no_grad():
            return reference.quadratic_penalty(*self._of("params anchor importance"))

    def add_quadratic_penalty_grad_(self, strength: float) -> Tensor:
        """Add the gradient of strength * penalty to every `.grad`; returns the value (0-dim).

        A missing `.grad` is made; frozen parameters without one are left out. A state with the
        lists "task_gradient" and "step_start" keeps there the gradients before the pull and the
        parameters.
        """
        everything = enumerate(self._lists["params"])
        pulled = [i for i, p in everything if p.grad is not None or p.requires_grad]
        params, anchors, importances = self._of("params anchor importance", pulled)
        grads = [torch.zeros_like(p.detach()) if p.grad is None else p.grad for p in params]
        if "task_gradient" in self._lists:
            kept, starts = self._of("task_gradient step_start", pulled)
            for grad, theta, task_grad, start in zip(grads, params, kept, starts, strict=True):
                task_grad.copy_(grad.detach())
                start.copy_(theta.detach())
        value = reference.add_quadratic_penalty_grad_(grads, params, anchors, importances, strength)
        for theta, grad in zip(params, grads, strict=True):
            theta.grad = grad
        self._pulled = pulled
        return value

    def accumulate_path_integral_(self) -> None:
        """One step of SI, of the parameters that the last pull was added to."""
        self._after_pull(reference.accumulate_path_integral_, "path params")

    def riemannian_walk_step_(self, decay: float) -> None:
        """One step of RWalk, of the parameters that the last pull was added to."""
        self._after_pull(reference.riemannian_walk_step_, "path fisher params", decay)

    def _after_pull(self, op: Callable[..., None], keys: str, *numbers: float) -> None:
        if self._pulled is None:
            raise RuntimeError(
                f"ParameterPlan.{op.__name__}: nothing has been kept of this step, expected "
                "add_quadratic_penalty_grad_ first"
            )
        op(*self._of(f"{keys} step_start task_gradient", self._pulled), *numbers)

    def accumulate_riemannian_walk_score_(self, eps: float) -> None:
        """Close an interval of RWalk."""
        score, path, starts, fisher, params = self._of(
            "task_score path interval_start fisher params"
        )
        reference.accumulate_riemannian_walk_score_(score, path, starts, fisher, params, eps)

    def consolidate_importance_(self, estimate: TensorList, gamma: float) -> None:
        """Set importance to gamma * importance + estimate, anchor to the parameter."""
        importances, anchors, params = self._of("importance anchor params")
        reference.consolidate_importance_(importances, anchors, estimate, params, gamma)

    def consolidate_all_anchors_(self, estimate: TensorList, gamma: float) -> Tensor:
        """Merge the estimate around the parameters into the old quadratic; returns the constant."""
        importances, anchors, params = self._of("importance anchor params")
        return reference.consolidate_all_anchors_(importances, anchors, estimate, params, gamma)

    def consolidate_path_integral_(self, xi: float, clamp_total: bool = False) -> None:
        """End of a task for SI."""
        importances, anchors, path, params = self._of("importance anchor path params")
        reference.consolidate_path_integral_(
            importances, anchors, path, params, xi, clamp_total=clamp_total
        )

    def consolidate_riemannian_walk_(self, mix: float) -> None:
        """End of a task for RWalk."""
        importances, anchors, score, task_score, fisher, params = self._of(
            "importance anchor score task_score fisher params"
        )
        reference.consolidate_riemannian_walk_(
            importances, anchors, score, task_score, fisher, params, mix
        )

    def sgd_step_(self, **options: Any) -> Tensor | None:  # noqa: ANN401
        """One step of SGD; the penalty's value before it, or None where nothing is protected.

        Parameters without gradient are left out. The keys of the state tell how to protect; the
        options are those of `clext.ops.reference.sgd_step_`.
        """
        own = ("momentum_buffer", "steps") if options["momentum"] else ("", "")
        return self._step(reference.sgd_step_, own, options)

    def adam_step_(self, **options: Any) -> Tensor | None:  # noqa: ANN401
        """One step of Adam, or of AdamW if `decoupled`; otherwise as `sgd_step_`."""
        return self._step(reference.adam_step_, ("exp_avg", "exp_avg_sq", "steps"), options)

    def _step(
        self, op: Callable[..., Tensor], own: tuple[str, ...], options: dict[str, Any]
    ) -> Tensor | None:
        active = [i for i, p in enumerate(self._lists["params"]) if p.grad is not None]
        (params,) = self._of("params", active)
        grads = [p.grad for p in params]
        protection = [
            key if key in self._lists else "" for key in ("path", "fisher", "anchor", "importance")
        ]
        lists = [self._of(key, active)[0] if key else [] for key in (*own, *protection)]
        value = op(params, grads, *lists, **options)
        return value if "anchor" in self._lists else None


class ShardedPlan:
    """The same over the parts that this process has of parameters, which sends nothing.

    What an op returns is a number still to be summed over the processes: by whoever calls
    `full_tensor()` of it.
    """

    def __init__(
        self,
        names: Sequence[str],
        params: TensorList,
        state: Mapping[str, TensorList],
        steps: TensorList,
    ) -> None:
        self._params, self._mesh = list(params), Mesh(params)
        # Tensors in the same memory, for ops that know parameters with gradients.
        self._parts = [local(entry).detach() for entry in params]
        self._lists = {key: list(map(local, entries)) for key, entries in state.items()}
        self._plans: list[tuple[int, list[int], ReferencePlan]] = []
        counts = [number_of_parts(entry) for entry in params]
        for count in dict.fromkeys(counts):
            chosen = [i for i, other in enumerate(counts) if other == count]
            plan = make_plan(
                [names[i] for i in chosen],
                [self._parts[i] for i in chosen],
                {key: [entries[i] for i in chosen] for key, entries in self._lists.items()},
                [steps[i] for i in chosen] if steps else (),
            )
            self._plans.append((count, chosen, plan))

    def __getattr__(self, op: str) -> Callable[..., Tensor | None]:
        if op.startswith("_"):
            raise AttributeError(op)

        def call(*arguments: Any, **options: Any) -> Tensor | None:  # noqa: ANN401
            self._take_gradients()
            values = []
            for count, chosen, plan in self._plans:
                own = [
                    [local(entry[i]) for i in chosen] if isinstance(entry, list) else entry
                    for entry in arguments
                ]
                value = getattr(plan, op)(*own, **options)
                if value is not None:
                    values.append(self._mesh.share(value, count))
            self._give_gradients()
            return self._mesh.total(total(values)) if values else None

        return call

    def consolidate_riemannian_walk_(self, mix: float) -> None:
        """End of a task for RWalk, with the maxima over all processes."""
        reference.consolidate_riemannian_walk_(
            self._lists["importance"],
            self._lists["anchor"],
            self._lists["score"],
            self._lists["task_score"],
            self._lists["fisher"],
            self._parts,
            mix,
            largest=self._mesh.largest,
        )

    def _take_gradients(self) -> None:
        for parameter, part in zip(self._params, self._parts, strict=True):
            now = local(parameter)
            if part.data_ptr() != now.data_ptr():
                part.data = now  # the model was loaded
            part.requires_grad_(parameter.requires_grad)
            part.grad = gradient_part(parameter)

    def _give_gradients(self) -> None:
        """To parameters that had none."""
        for parameter, part in zip(self._params, self._parts, strict=True):
            if parameter.grad is None and part.grad is not None:
                parameter.grad = sharded_as(parameter, part.grad)


def has_kernels(device: torch.device) -> bool:
    """Whether clext was built with kernels for `device`; elsewhere the ops run in plain torch.

    RuntimeError for CUDA with a driver that is too old for them.
    """
    if device.type != "cuda":
        return device.type == "cpu"
    if build_info()["cuda"] is None:
        return False
    _check_driver()
    return True


@cache
def _check_driver() -> None:
    """RuntimeError for an NVIDIA driver without 32 KB of kernel parameters (before 530)."""
    version: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    if version < _OLDEST_DRIVER:
        raise RuntimeError(
            f"clext's CUDA kernels need an NVIDIA driver for CUDA 12.1 or newer (530), got one for "
            f"CUDA {version // 1000}.{version % 1000 // 10}; update it, or build clext with "
            "CLEXT_CUDA=0"
        )


def make_plan(
    names: Sequence[str],
    params: Sequence[Tensor],
    state: Mapping[str, Sequence[Tensor]],
    steps: Sequence[Tensor] = (),
) -> ReferencePlan:
    """A plan over `params` and `state`: the compiled one where the device has kernels.

    `steps`: for an optimizer's steps, the counter of each parameter. The compiled ParameterPlan has
    the interface of `ReferencePlan`, which is why that is the declared type.
    """
    if any(map(is_sharded, params)):
        return cast("ReferencePlan", ShardedPlan(names, params, state, steps))
    if params and has_kernels(params[0].device):
        lists = {key: list(entries) for key, entries in state.items()}
        plan = C.ParameterPlan(list(names), list(params), lists, list(steps))
        return cast("ReferencePlan", plan)
    return ReferencePlan(names, params, state, steps)
