"""What is compared: every op of clext beside the usual ways to write it in PyTorch.

A case is an op on the tensors of one model. It says how many bytes the op must move at least, and
gives the contestants, all of which change the same lists in place or return the same value:

- "loop": one parameter after the other with plain tensor expressions, as course notebooks do;
- "foreach": torch._foreach_*, as torch.optim does;
- "compile": the loop under torch.compile (for what runs at every step);
- "clext".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat

import torch
from torch import Tensor

from clext import ops
from clext.ops._extension import C

STRENGTH, DECAY, EPS, XI, SCALE, GAMMA = 1e-4, 0.9, 1e-3, 0.1, 0.5, 0.9

Contestants = dict[str, Callable[[], Tensor | None]]


@dataclass
class Lists:
    """The lists of one model: parameters, their gradients and the state of all methods."""

    params: list[Tensor]
    state: dict[str, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def make(cls, shapes: Iterable[tuple[int, ...]], device: str, names: Iterable[str]) -> Lists:
        generator = torch.Generator().manual_seed(0)
        shapes = list(shapes)

        def draw(low: float, high: float) -> list[Tensor]:
            return [
                torch.empty(s).uniform_(low, high, generator=generator).to(device) for s in shapes
            ]

        params = [tensor.requires_grad_() for tensor in draw(-0.1, 0.1)]
        lists = cls(params)
        for name in names:
            if name in ("importance", "fisher", "task_score", "score", "estimate"):
                lists.state[name] = draw(0.0, 1.0)  # what is never negative
            else:
                lists.state[name] = draw(-0.1, 0.1)
        for param, grad in zip(params, draw(-0.1, 0.1), strict=True):
            param.grad = grad
        return lists

    @property
    def grads(self) -> list[Tensor]:
        return [param.grad for param in self.params if param.grad is not None]

    def __getitem__(self, name: str) -> list[Tensor]:
        return self.state[name]

    def plan(self) -> C.ParameterPlan:
        state = {name: list_ for name, list_ in self.state.items() if name != "estimate"}
        return C.ParameterPlan([str(i) for i in range(len(self.params))], self.params, state)

    def plan_after_a_pull(self) -> C.ParameterPlan:
        """A plan whose path ops have something to work on; the lists are as they were."""
        before = [tensor.clone() for tensor in self.everything()]
        plan = self.plan()
        plan.add_quadratic_penalty_grad_(STRENGTH)
        torch._foreach_copy_(self.everything(), before)
        return plan

    def everything(self) -> list[Tensor]:
        return [*self.grads, *(tensor for list_ in self.state.values() for tensor in list_)]


@dataclass(frozen=True)
class Case:
    """`reads` and `writes` count lists of float32; together they are the least traffic."""

    reads: int
    writes: int
    state: tuple[str, ...]
    contestants: Callable[[Lists], Contestants]

    @property
    def bytes_per_element(self) -> int:
        return 4 * (self.reads + self.writes)


def quadratic_penalty(t: Lists) -> Contestants:
    params, anchors, importances = t.params, t["anchor"], t["importance"]
    plan = t.plan()

    def loop() -> Tensor:
        total = torch.zeros((), device=params[0].device)
        for p, a, o in zip(params, anchors, importances, strict=True):
            total = total + (o * (p - a) ** 2).sum()
        return total

    def foreach() -> Tensor:
        terms = torch._foreach_sub(params, anchors)
        torch._foreach_mul_(terms, terms)
        torch._foreach_mul_(terms, importances)
        return torch.stack([term.sum() for term in terms]).sum()

    return {
        "loop": loop,
        "foreach": foreach,
        "compile": torch.compile(loop),
        "clext": plan.quadratic_penalty,
    }


def quadratic_penalty_backward(t: Lists) -> Contestants:
    params, anchors, importances = t.params, t["anchor"], t["importance"]
    one = torch.ones((), device=params[0].device)

    def loop() -> None:
        for g, p, a, o in zip(t["out"], params, anchors, importances, strict=True):
            g.copy_(2 * one * o * (p - a))

    def foreach() -> None:
        grads = torch._foreach_sub(params, anchors)
        torch._foreach_mul_(grads, importances)
        torch._foreach_mul_(grads, 2.0)
        torch._foreach_copy_(t["out"], grads)

    def clext() -> None:
        t.state["out"] = ops.quadratic_penalty_backward(one, params, anchors, importances)

    return {"loop": loop, "foreach": foreach, "compile": torch.compile(loop), "clext": clext}


def add_quadratic_penalty_grad(t: Lists) -> Contestants:
    params, anchors, importances = t.params, t["anchor"], t["importance"]
    grads, plan = t.grads, t.plan()

    def course() -> Tensor:
        """The notebook's way: build the penalty, let autograd find its gradient."""
        with torch.enable_grad():
            total = torch.zeros((), device=params[0].device)
            for p, a, o in zip(params, anchors, importances, strict=True):
                total = total + (o * (p - a) ** 2).sum()
            total = STRENGTH * total
        total.backward()
        return total.detach()

    def loop() -> Tensor:
        total = torch.zeros((), device=params[0].device)
        for g, p, a, o in zip(grads, params, anchors, importances, strict=True):
            pull = STRENGTH * o * (p - a)
            g.add_(2 * pull)
            total = total + (pull * (p - a)).sum()
        return total

    def foreach() -> Tensor:
        differences = torch._foreach_sub(params, anchors)
        pulls = torch._foreach_mul(differences, importances)
        torch._foreach_add_(grads, pulls, alpha=2 * STRENGTH)
        torch._foreach_mul_(pulls, differences)
        return STRENGTH * torch.stack([pull.sum() for pull in pulls]).sum()

    return {
        "loop": course,
        "foreach": foreach,
        "compile": torch.compile(loop),
        "clext": partial(plan.add_quadratic_penalty_grad_, STRENGTH),
    }


def accumulate_path_integral(t: Lists) -> Contestants:
    path, params, starts, task_grads = t["path"], t.params, t["step_start"], t["task_gradient"]
    plan = t.plan_after_a_pull()

    def loop() -> None:
        for w, p, old, g in zip(path, params, starts, task_grads, strict=True):
            w.sub_(g * (p - old))

    def foreach() -> None:
        steps = torch._foreach_sub(params, starts)
        torch._foreach_addcmul_(path, task_grads, steps, -1.0)

    return {
        "loop": loop,
        "foreach": foreach,
        "compile": torch.compile(loop),
        "clext": plan.accumulate_path_integral_,
    }


def riemannian_walk_step(t: Lists) -> Contestants:
    path, fisher, params = t["path"], t["fisher"], t.params
    starts, task_grads = t["step_start"], t["task_gradient"]
    plan = t.plan_after_a_pull()

    def loop() -> None:
        for w, f, p, old, g in zip(path, fisher, params, starts, task_grads, strict=True):
            w.sub_(g * (p - old))
            f.copy_(DECAY * f + (1 - DECAY) * g**2)

    def foreach() -> None:
        steps = torch._foreach_sub(params, starts)
        torch._foreach_addcmul_(path, task_grads, steps, -1.0)
        torch._foreach_mul_(fisher, DECAY)
        torch._foreach_addcmul_(fisher, task_grads, task_grads, 1 - DECAY)

    return {
        "loop": loop,
        "foreach": foreach,
        "compile": torch.compile(loop),
        "clext": partial(plan.riemannian_walk_step_, DECAY),
    }


def accumulate_riemannian_walk_score(t: Lists) -> Contestants:
    score, path, start, fisher = t["task_score"], t["path"], t["interval_start"], t["fisher"]
    params, plan = t.params, t.plan()

    def loop() -> None:
        for s, w, old, f, p in zip(score, path, start, fisher, params, strict=True):
            s.add_(w.clamp(min=0) / (0.5 * f * (p - old) ** 2 + EPS))
            w.zero_()
            old.copy_(p)

    def foreach() -> None:
        distances = torch._foreach_sub(params, start)
        torch._foreach_mul_(distances, distances)
        torch._foreach_mul_(distances, fisher)
        torch._foreach_mul_(distances, 0.5)
        torch._foreach_add_(distances, EPS)
        gains = torch._foreach_clamp_min(path, 0.0)
        torch._foreach_addcdiv_(score, gains, distances)
        torch._foreach_zero_(path)
        torch._foreach_copy_(start, params)

    return {
        "loop": loop,
        "foreach": foreach,
        "clext": partial(plan.accumulate_riemannian_walk_score_, EPS),
    }


def accumulate_square(t: Lists) -> Contestants:
    acc, grads = t["estimate"], t.grads

    def loop() -> None:
        for a, g in zip(acc, grads, strict=True):
            a.add_(SCALE * g**2)

    return {
        "loop": loop,
        "foreach": lambda: torch._foreach_addcmul_(acc, grads, grads, SCALE),
        "compile": torch.compile(loop),
        "clext": partial(ops.accumulate_square_, acc, grads, SCALE),
    }


def accumulate_abs(t: Lists) -> Contestants:
    acc, grads = t["estimate"], t.grads

    def loop() -> None:
        for a, g in zip(acc, grads, strict=True):
            a.add_(SCALE * g.abs())

    def foreach() -> None:
        torch._foreach_add_(acc, torch._foreach_abs(grads), alpha=SCALE)

    return {
        "loop": loop,
        "foreach": foreach,
        "compile": torch.compile(loop),
        "clext": partial(ops.accumulate_abs_, acc, grads, SCALE),
    }


OUTPUTS, SLICES = 10, 100


def sliced_importance(t: Lists) -> Contestants:
    acc = t["estimate"]
    device = acc[0].device
    generator = torch.Generator().manual_seed(1)
    jacobian = [torch.randn(OUTPUTS, *a.shape, generator=generator).to(device) for a in acc]
    slices = torch.randn(SLICES, OUTPUTS, generator=generator).to(device)
    slices /= slices.norm(dim=1, keepdim=True)

    def loop() -> None:
        for a, j in zip(acc, jacobian, strict=True):
            for xi in slices:
                a.add_(torch.tensordot(xi, j, dims=1) ** 2 / SLICES)

    return {
        "loop": loop,
        "clext": partial(ops.sliced_importance_, acc, jacobian, slices, 1 / SLICES),
    }


def consolidate_importance(t: Lists) -> Contestants:
    importances, anchors, estimate, params = t["importance"], t["anchor"], t["estimate"], t.params

    def loop() -> None:
        for o, a, f, p in zip(importances, anchors, estimate, params, strict=True):
            o.copy_(GAMMA * o + f)
            a.copy_(p)

    def foreach() -> None:
        torch._foreach_mul_(importances, GAMMA)
        torch._foreach_add_(importances, estimate)
        torch._foreach_copy_(anchors, params)

    return {
        "loop": loop,
        "foreach": foreach,
        "clext": partial(t.plan().consolidate_importance_, estimate, GAMMA),
    }


def consolidate_all_anchors(t: Lists) -> Contestants:
    importances, anchors, estimate, params = t["importance"], t["anchor"], t["estimate"], t.params

    def loop() -> Tensor:
        constant = torch.zeros((), device=params[0].device)
        for o, a, f, p in zip(importances, anchors, estimate, params, strict=True):
            old = GAMMA * o
            o.copy_(old + f)
            weight = torch.where(o > 0, f / o, 1.0)
            constant = constant + (old * weight * (p - a) ** 2).sum()
            a.add_(weight * (p - a))
        return constant

    return {"loop": loop, "clext": partial(t.plan().consolidate_all_anchors_, estimate, GAMMA)}


def consolidate_path_integral(t: Lists) -> Contestants:
    importances, anchors, path, params = t["importance"], t["anchor"], t["path"], t.params

    def loop() -> None:
        for o, a, w, p in zip(importances, anchors, path, params, strict=True):
            o.add_(w.clamp(min=0) / ((p - a) ** 2 + XI))
            a.copy_(p)
            w.zero_()

    def foreach() -> None:
        distances = torch._foreach_sub(params, anchors)
        torch._foreach_mul_(distances, distances)
        torch._foreach_add_(distances, XI)
        torch._foreach_addcdiv_(importances, torch._foreach_clamp_min(path, 0.0), distances)
        torch._foreach_copy_(anchors, params)
        torch._foreach_zero_(path)

    return {
        "loop": loop,
        "foreach": foreach,
        "clext": partial(t.plan().consolidate_path_integral_, XI),
    }


def consolidate_riemannian_walk(t: Lists) -> Contestants:
    params, fisher, score, task_score = t.params, t["fisher"], t["score"], t["task_score"]
    importances, anchors = t["importance"], t["anchor"]

    def loop() -> None:
        for s, new in zip(score, task_score, strict=True):
            s.copy_(0.5 * s + 0.5 * new)
            new.zero_()
        maxima = repeat((_max(fisher), _max(score)))
        lists = (importances, anchors, fisher, score, params)
        for o, a, f, s, p, (max_f, max_s) in zip(*lists, maxima, strict=False):
            o.copy_(f / max_f + s / max_s)
            a.copy_(p)

    return {"loop": loop, "clext": partial(t.plan().consolidate_riemannian_walk_, 0.5)}


def _max(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.max() for tensor in tensors]).max()


PENALTY = ("anchor", "importance")
PATH = (*PENALTY, "path", "step_start", "task_gradient")
WALK = (*PATH, "fisher")

CASES: dict[str, Case] = {
    "quadratic_penalty": Case(3, 0, PENALTY, quadratic_penalty),
    "quadratic_penalty_backward": Case(3, 1, (*PENALTY, "out"), quadratic_penalty_backward),
    "add_quadratic_penalty_grad_": Case(4, 1, PENALTY, add_quadratic_penalty_grad),
    "accumulate_path_integral_": Case(4, 1, PATH, accumulate_path_integral),
    "riemannian_walk_step_": Case(5, 2, WALK, riemannian_walk_step),
    "accumulate_riemannian_walk_score_": Case(
        5, 3, ("task_score", "path", "interval_start", "fisher"), accumulate_riemannian_walk_score
    ),
    "accumulate_square_": Case(2, 1, ("estimate",), accumulate_square),
    "accumulate_abs_": Case(2, 1, ("estimate",), accumulate_abs),
    "sliced_importance_": Case(1 + OUTPUTS, 1, ("estimate",), sliced_importance),
    "consolidate_importance_": Case(3, 2, (*PENALTY, "estimate"), consolidate_importance),
    "consolidate_all_anchors_": Case(4, 2, (*PENALTY, "estimate"), consolidate_all_anchors),
    "consolidate_path_integral_": Case(4, 3, (*PENALTY, "path"), consolidate_path_integral),
    "consolidate_riemannian_walk_": Case(
        # The first pass reads and writes score and task_score, the second reads fisher for its
        # maximum, the third reads fisher, score and param and writes importance and anchor.
        6, 4, (*PENALTY, "fisher", "score", "task_score"), consolidate_riemannian_walk
    ),
}  # fmt: skip
