"""A small set of parameters with a plan over them, and the same steps by the ops themselves."""

from __future__ import annotations

import torch
from op_samples import Entry, assert_same_bits, lay_out, state_dtype, tensors_of

from clext import ops, reference
from clext.ops._extension import C
from clext.ops.plan import ReferencePlan

KEYS = (
    "anchor",
    "importance",
    "path",
    "fisher",
    "task_score",
    "score",
    "interval_start",
    "task_gradient",
    "step_start",
)
SIGNED = ("anchor", "path", "task_gradient", "step_start")
ENTRIES = (
    Entry((5, 3)),
    Entry((2, 3, 4, 5), layout="channels_last"),
    Entry((7,), torch.bfloat16),
    Entry((), torch.float64),
    Entry((0, 2)),
    Entry((40001,), layout="unaligned"),
)


class Problem:
    """A plan over random parameters and state."""

    def __init__(self, implementation, device="cpu", entries=ENTRIES, keys=KEYS):
        generator = torch.Generator().manual_seed(3)

        def values(entry):
            return torch.randn(entry.shape, generator=generator, dtype=torch.float64).to(device)

        self.params = [
            torch.nn.Parameter(lay_out(values(entry).to(entry.dtype), entry.layout))
            for entry in entries
        ]
        self.names = [f"layer{i}.weight" for i in range(len(entries))]
        self.state = {
            key: [
                torch.empty_like(theta, dtype=state_dtype(entry.dtype), requires_grad=False)
                .copy_(values(entry) if key in SIGNED else values(entry).abs())
                .detach()
                for theta, entry in zip(self.params, entries, strict=True)
            ]
            for key in keys
        }
        self.classes = {"compiled": C.ParameterPlan, "reference": ReferencePlan}
        self.plan = self.make(implementation)
        self.random = generator

    def make(self, implementation):
        return self.classes[implementation](self.names, self.params, self.state)

    def backward(self, *without):
        """New gradients for all parameters but those `without` one."""
        for index, theta in enumerate(self.params):
            theta.grad = None
            if index not in without:
                noise = torch.randn(theta.shape, generator=self.random).to(theta)
                theta.grad = torch.empty_like(theta).copy_(noise).detach()

    def optimize(self):
        with torch.no_grad():
            for theta in self.params:
                if theta.grad is not None:
                    theta.sub_(0.1 * theta.grad)

    def snapshot(self):
        grads = [theta.grad for theta in self.params if theta.grad is not None]
        copied = {"grads": [g.clone() for g in grads], "params": [p.clone() for p in self.params]}
        return tensors_of(copied | {k: [t.clone() for t in v] for k, v in self.state.items()})


class Twin:
    """The same steps by the ops themselves, on copies of the state, for comparison."""

    def __init__(self, problem, implementation):
        self.problem = problem
        self.module = ops if implementation == "compiled" else reference
        self.state = {key: [t.clone() for t in entries] for key, entries in problem.state.items()}

    def lists(self, *keys, active):
        return [[self.state[key][i] for i in active] for key in keys]

    def pull(self, strength):
        """Gradients after add_quadratic_penalty_grad_, and the value; keeps what the plan keeps."""
        params = self.problem.params
        self.kept = [i for i, p in enumerate(params) if p.grad is not None or p.requires_grad]
        grads = [
            torch.zeros_like(params[i]).detach()
            if params[i].grad is None
            else params[i].grad.clone()
            for i in self.kept
        ]
        for index, grad in zip(self.kept, grads, strict=True):
            self.state["task_gradient"][index].copy_(grad)
            self.state["step_start"][index].copy_(params[index].detach())
        lists = self.lists("anchor", "importance", active=self.kept)
        chosen = [params[i] for i in self.kept]
        value = self.module.add_quadratic_penalty_grad_(grads, chosen, *lists, strength)
        return value, dict(zip(self.kept, grads, strict=True))

    def walk(self, decay):
        params = [self.problem.params[i] for i in self.kept]
        path, fisher, *kept = self.lists(
            "path", "fisher", "step_start", "task_gradient", active=self.kept
        )
        self.module.accumulate_path_integral_(path, params, *kept)
        self.module.riemannian_walk_step_(path, fisher, params, *kept, decay)

    def score(self, eps):
        keys = ("task_score", "path", "interval_start", "fisher")
        lists = [self.state[key] for key in keys]
        self.module.accumulate_riemannian_walk_score_(*lists, self.problem.params, eps)


def run_step(problem, twin):
    """One step by the plan and by the ops: same gradients, same value, same state, to the bit."""
    value, grads = twin.pull(0.5)
    assert_same_bits({"value": problem.plan.add_quadratic_penalty_grad_(0.5)}, {"value": value})
    got = {i: p.grad for i, p in enumerate(problem.params) if p.grad is not None}
    assert_same_bits(got, grads)
    problem.optimize()
    for theta in problem.params:  # what becomes of the gradients after the pull does not matter
        if theta.grad is not None:
            theta.grad.mul_(0.1)
    twin.walk(0.9)
    problem.plan.accumulate_path_integral_()
    problem.plan.riemannian_walk_step_(0.9)
    twin.score(0.1)
    problem.plan.accumulate_riemannian_walk_score_(0.1)
    assert_same_bits(tensors_of(problem.state), tensors_of(twin.state))
    chosen = [twin.state["anchor"], twin.state["importance"]]
    with torch.no_grad():
        expected = twin.module.quadratic_penalty(problem.params, *chosen)
    assert_same_bits({"value": problem.plan.quadratic_penalty()}, {"value": expected})
