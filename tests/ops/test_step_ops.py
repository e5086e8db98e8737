"""The optimizers' steps by themselves: what the registry's entries leave open, and their plan."""

from __future__ import annotations

import pytest
import torch
from helpers import OPS, Entry, assert_same_bits, copy, lay_out, outputs_of, sample, tensors_of

from clext import ops
from clext.ops._extension import C
from clext.ops.plan import ReferencePlan

STEPS = [op for op in OPS if op.name in ("sgd_step_", "adam_step_")]
ENTRIES = (
    Entry((5, 3)),
    Entry((1031,), torch.bfloat16),
    Entry((4, 6), torch.float64, "transposed"),
)

every_step = pytest.mark.parametrize("op", STEPS, ids=str)
every_implementation = pytest.mark.parametrize("implementation", ["kernel", "reference"])


def run(op, arguments, implementation="kernel"):
    arguments = copy(arguments)
    return outputs_of(op, arguments, getattr(op, implementation)(arguments))


# ----------------------------------------------------------------------------- scaled gradients


@every_step
@every_implementation
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_gradients_are_scaled_back(op, implementation, shape, device):
    arguments = sample(op, ENTRIES, device)
    scale = torch.full(shape, 8.0, device=device)
    scaled = {**arguments, "grads": [8 * entry for entry in arguments["grads"]]}
    assert_same_bits(
        run(op, {**scaled, "grad_scale": scale}, implementation),
        run(op, arguments, implementation),
    )


@every_step
@every_implementation
@pytest.mark.parametrize("found", [0.0, 1.0, 3.0])
def test_found_inf_leaves_everything_alone(op, implementation, found, device):
    arguments = sample(op, ENTRIES, device)
    found_inf = {**arguments, "found_inf": torch.full((), found, device=device)}
    outputs = run(op, found_inf, implementation)
    if found == 0:
        assert_same_bits(outputs, run(op, arguments, implementation))
        return
    assert outputs.pop("returns").item() == 0
    assert_same_bits(outputs, {name: tensors_of(arguments)[name] for name in outputs})


@every_step
def test_lr_may_be_read_on_the_host(op, device):
    arguments = sample(op, ENTRIES, device)
    assert_same_bits(run(op, {**arguments, "lr": arguments["lr"].cpu()}), run(op, arguments))


# ----------------------------------------------------------------------------- low precision


@every_step
@every_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_path_is_that_of_the_stored_parameters(op, implementation, dtype, device):
    """Most of a small step is rounded away; a path that counted it would never fit the way gone."""
    arguments = sample(op, (Entry((1031,), dtype),), device)
    if not arguments["path"]:
        pytest.skip("follows no path")
    arguments["lr"] = torch.full_like(arguments["lr"], 1e-3)
    outputs = run(op, arguments, implementation)
    before = arguments["params"][0].float()
    moved = outputs["params[0]"].float() - before
    sign = -1 if arguments["maximize"] else 1
    expected = arguments["path"][0] - sign * arguments["grads"][0].float() * moved
    torch.testing.assert_close(outputs["path[0]"], expected, rtol=1e-6, atol=1e-6)
    assert bool(moved.eq(0).any())


# ----------------------------------------------------------------------------- arguments


def assert_refused(op, implementation, arguments, message, error=ValueError):
    before = copy(arguments)
    with pytest.raises(error, match=f"^{op.name}: {message}"):
        getattr(op, implementation)(arguments)
    assert_same_bits(tensors_of(arguments), tensors_of(before))


@every_step
@every_implementation
def test_options_that_are_tensors(op, implementation, device):
    arguments = sample(op, ENTRIES, device)

    def refused(message, error=ValueError, **changes):
        changes = {name: value.to(device) for name, value in changes.items()}
        assert_refused(op, implementation, {**arguments, **changes}, message, error)

    refused(r"lr has shape \[1\], expected a 0-dim tensor", lr=torch.ones(1))
    refused(r"lr has dtype \S+, expected float32 or float64", TypeError, lr=torch.tensor(1))
    for name in ("grad_scale", "found_inf"):
        refused(rf"{name} has shape \[2\], expected one element", **{name: torch.ones(2)})
        refused(
            rf"{name} has dtype \S+, expected float32", TypeError, **{name: torch.ones(()).double()}
        )
    refused(r"clip has shape \[2\], expected one element", clip=torch.ones(2))
    refused("clip has dtype .*expected float32 or", TypeError, clip=torch.ones(()).half())
    for rate in (-1.0, float("nan"), float("inf")):
        changes = {**arguments, "lr": torch.tensor(rate)}
        assert_refused(op, implementation, changes, r"lr is \S+, expected a finite number >= 0")


@every_implementation
@pytest.mark.parametrize("op", [op for op in STEPS if "steps" in op.written], ids=str)
def test_steps(op, implementation, device):
    arguments = sample(op, ENTRIES, device)
    for change, message, error in (
        (lambda s: s.pop(), r"steps has 2 tensors, expected 3 \(as many as params\)", ValueError),
        (lambda s: s.__setitem__(1, s[1].reshape(1)), r"steps\[1\] has shape \[1\]", ValueError),
        (lambda s: s.__setitem__(0, s[0].double()), r"steps\[0\] has dtype \S*float64", TypeError),
        (lambda s: s.__setitem__(2, s[2].long()), r"steps\[2\] has dtype \S*int64", TypeError),
    ):
        changed = copy(arguments)
        change(changed["steps"])
        assert_refused(op, implementation, changed, message, error)


@every_implementation
@pytest.mark.parametrize("op", [op for op in STEPS if "walk" in op.variant], ids=str)
@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (("anchors",), "importances without anchors"),
        (("importances",), "anchors without importances"),
        (("anchors", "importances"), "path without anchors and importances"),
        (("path",), "fisher without path"),
    ],
)
def test_protection_that_is_incomplete(op, implementation, missing, message, device):
    arguments = {**sample(op, ENTRIES, device), **{name: [] for name in missing}}
    assert_refused(op, implementation, arguments, message)


@every_implementation
def test_momentum_and_its_lists_come_together(implementation, device):
    with_momentum = next(op for op in STEPS if op.variant == "walk momentum")
    arguments = sample(with_momentum, ENTRIES, device)
    for change, message in (
        ({"momentum": 0.0}, "momentum_buffers has 3 and steps 3 tensors, expected none of either"),
        ({"momentum_buffers": []}, "momentum_buffers has 0 tensors, expected 3"),
    ):
        assert_refused(with_momentum, implementation, {**arguments, **change}, message)


# ----------------------------------------------------------------------------- the plan


# State of a plan by the op's name for it.
KEYS = {
    "momentum_buffers": "momentum_buffer",
    "exp_avgs": "exp_avg",
    "exp_avg_sqs": "exp_avg_sq",
    "path": "path",
    "fisher": "fisher",
    "anchors": "anchor",
    "importances": "importance",
}


class Twins:
    """A plan over copies of an op's arguments, and the arguments themselves for the op."""

    def __init__(self, op, implementation, device):
        self.op, self.implementation = op, implementation
        self.direct = sample(op, ENTRIES, device)
        own = copy(self.direct)
        self.params = [torch.nn.Parameter(entry) for entry in own["params"]]
        self.state = {key: own[name] for name, key in KEYS.items() if own.get(name)}
        self.steps = own["steps"]
        kind = C.ParameterPlan if implementation == "kernel" else ReferencePlan
        self.plan = kind(["a", "b", "c"], self.params, self.state, self.steps)
        self.options = {name: v for name, v in own.items() if not isinstance(v, list)}

    def step(self, without=()):
        """One step by both, with new gradients for all but those `without` one."""
        active = [i for i in range(3) if i not in without]
        for i, (theta, entry) in enumerate(zip(self.params, ENTRIES, strict=True)):
            noise = torch.randn(entry.shape).to(theta)
            theta.grad = lay_out(noise, entry.layout) if i in active else None
        chosen = {
            name: [value[i] for i in active] if isinstance(value, list) and value else value
            for name, value in self.direct.items()
        }
        chosen["grads"] = [self.params[i].grad.clone() for i in active]
        value = getattr(self.plan, self.op.name)(**self.options)
        expected = getattr(self.op, self.implementation)(chosen)
        if self.direct["anchors"]:
            assert_same_bits({"value": value.reshape(())}, {"value": expected.to(value.dtype)})
        else:
            assert value is None
        self.compare()
        if self.options["clear_grad"]:
            assert not any(self.params[i].grad.any() for i in active)

    def compare(self):
        own = {"params": self.params, "steps": self.steps, **self.state}
        names = {KEYS.get(name, name): value for name, value in self.direct.items()}
        assert_same_bits(tensors_of(own), tensors_of({name: names[name] for name in own}))


@every_step
@every_implementation
def test_the_plan_does_what_the_op_does(op, implementation, device):
    twins = Twins(op, implementation, device)
    for without in ((), (1,), (), (), (2,), (0, 2), ()):
        twins.step(without)


@every_step
@every_implementation
def test_the_plan_without_any_gradient(op, implementation, device):
    twins = Twins(op, implementation, device)
    twins.step((0, 1, 2))


@every_implementation
def test_what_the_plan_lacks(implementation, device):
    theta = torch.nn.Parameter(torch.ones(3, device=device))
    theta.grad = torch.ones_like(theta)
    kind = C.ParameterPlan if implementation == "kernel" else ReferencePlan
    op = next(op for op in STEPS if op.name == "adam_step_")
    options = {n: v for n, v in sample(op, (), device).items() if not isinstance(v, list)}
    state = {key: [torch.zeros(3, device=device)] for key in ("exp_avg", "exp_avg_sq")}
    with pytest.raises(ValueError, match="adam_step_: there are no steps; pass them"):
        kind(["w"], [theta], state).adam_step_(**options)
    steps = [torch.zeros((), device=device)]
    with pytest.raises(ValueError, match="state has no list 'exp_avg_sq'"):
        kind(["w"], [theta], {"exp_avg": state["exp_avg"]}, steps).adam_step_(**options)
    with pytest.raises(ValueError, match=r"steps\[0\] of parameter 'w' has shape \[1\]"):
        kind(["w"], [theta], state, [torch.zeros(1, device=device)])


def test_the_ops_take_the_rates_of_torch():
    """A step of Adam from nothing is the learning rate, whatever the gradient."""
    theta, zeros = torch.zeros(3), [torch.zeros(3) for _ in range(2)]
    ops.adam_step_(
        [theta],
        [torch.tensor([1.0, -2.0, 1e-3])],
        [zeros[0]],
        [zeros[1]],
        [torch.zeros(())],
        [],
        [],
        [],
        [],
        lr=torch.tensor(0.1),
        beta1=0.9,
        beta2=0.999,
        eps=0.0,
    )
    torch.testing.assert_close(theta, torch.tensor([-0.1, 0.1, -0.1]))
