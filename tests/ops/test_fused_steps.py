"""Fused optimizer steps: what the registry's entries leave open, by a plan and in plain torch."""

from __future__ import annotations

import itertools

import pytest
import torch
from op_arguments import STATE_KEYS
from op_registry import OPS
from op_samples import (
    Entry,
    assert_same_bits,
    check_against_reference,
    copy,
    lay_out,
    outputs_of,
    sample,
    tensors_of,
)
from step_registry import LEVELS, adam, sgd

from clext.ops._extension import C
from clext.ops.plan import ReferencePlan

STEPS = [op for op in OPS if op.fused]
FOLLOW_A_PATH = [op for op in STEPS if op.variant.split()[0] in ("path", "walk")]
ENTRIES = (
    Entry((5, 3)),
    Entry((1031,), torch.bfloat16),
    Entry((4, 6), torch.float64, "transposed"),
)

every_step = pytest.mark.parametrize("op", STEPS, ids=str)
every_step_with_path = pytest.mark.parametrize("op", FOLLOW_A_PATH, ids=str)
every_implementation = pytest.mark.parametrize("implementation", ["kernel", "reference"])


def run(op, arguments, implementation="kernel"):
    arguments = copy(arguments)
    return outputs_of(op, arguments, getattr(op, implementation)(arguments))


# ----------------------------------------------------------------------------- options


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "make",
    [sgd, lambda level: sgd(level, momentum=0.5, dampening=0.25), adam],
    ids=["sgd", "momentum", "adam"],
)
def test_every_combination_of_options(make, level, device):
    op = make(level)
    names = {arg.name for arg in op.args}
    flags = sorted(names & {"nesterov", "decoupled", "maximize", "proximal"})
    tensors = {"grad_scale": torch.full((1,), 4.0), "clip": torch.tensor(0.25)}
    for given in itertools.product((False, True), repeat=len(flags) + 3):
        arguments = sample(op, ENTRIES, device)
        arguments |= dict(zip(flags, given, strict=False))
        *chosen, decays = given[len(flags) :]
        arguments["weight_decay"] *= decays
        for (name, value), is_given in zip(tensors.items(), chosen, strict=True):
            arguments[name] = value.to(device) if is_given else None
        check_against_reference(op, arguments)


# ----------------------------------------------------------------------------- scaled gradients


@every_step
@every_implementation
def test_gradients_are_scaled_back(op, implementation, device):
    arguments = sample(op, ENTRIES, device)
    scaled = {**arguments, "grads": [8 * entry for entry in arguments["grads"]]}
    scaled["grad_scale"] = torch.full((1,), 8.0, device=device)
    assert_same_bits(run(op, scaled, implementation), run(op, arguments, implementation))


@every_step
@every_implementation
@pytest.mark.parametrize("found", [0.0, 3.0])
def test_found_inf_leaves_everything_alone(op, implementation, found, device):
    arguments = sample(op, ENTRIES, device)
    found_inf = {**arguments, "found_inf": torch.full((), found, device=device)}
    outputs = run(op, found_inf, implementation)
    if found == 0:
        assert_same_bits(outputs, run(op, arguments, implementation))
        return
    value = outputs.pop("returns", None)
    assert value is None or value.item() == 0
    assert_same_bits(outputs, {name: tensors_of(arguments)[name] for name in outputs})


@every_step_with_path
@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_clipped_gradient_moves_and_the_whole_one_is_measured(op, implementation, dtype, device):
    """With `clip` the step is that for clip * grads: to the bit, for a power of two."""
    arguments = sample(op, ENTRIES, device)
    clipped = {**arguments, "grads": [0.25 * grad for grad in arguments["grads"]]}
    expected = run(op, clipped, implementation)
    clip = torch.tensor(0.25, dtype=dtype, device=device)
    outputs = run(op, {**arguments, "clip": clip}, implementation)
    measured = ("path", "fisher")
    rest = {key: value for key, value in expected.items() if not key.startswith(measured)}
    assert_same_bits({key: outputs[key] for key in rest}, rest)
    for i, (before, grad) in enumerate(zip(arguments["path"], arguments["grads"], strict=True)):
        credit = (expected[f"path[{i}]"] - before) / 0.25
        torch.testing.assert_close(outputs[f"path[{i}]"], before + credit, rtol=1e-4, atol=1e-4)
        if arguments["fisher"]:
            old, decay = arguments["fisher"][i], arguments["decay"]
            average = decay * old + (1 - decay) * grad.to(before).square()
            torch.testing.assert_close(outputs[f"fisher[{i}]"], average)


@every_step
def test_a_rate_on_the_host_is_the_same_rate(op, device):
    arguments = sample(op, ENTRIES, device)
    expected = run(op, arguments)
    for rate in (arguments["lr"].cpu(), arguments["lr"].item()):
        assert_same_bits(run(op, {**arguments, "lr": rate}), expected)


@every_step_with_path
@every_implementation
def test_the_path_is_that_of_the_stored_parameters(op, implementation, device):
    """Most of a small step is rounded away; a path that counted it would never fit the way gone."""
    arguments = sample(op, (Entry((1031,), torch.bfloat16),), device)
    arguments["lr"] = torch.full_like(arguments["lr"], 1e-3)
    outputs = run(op, arguments, implementation)
    before = arguments["params"][0].float()
    moved = outputs["params[0]"].float() - before
    sign = -1 if arguments["maximize"] else 1
    expected = arguments["path"][0] - sign * arguments["grads"][0].float() * moved
    torch.testing.assert_close(outputs["path[0]"], expected, rtol=1e-6, atol=1e-6)
    assert bool(moved.eq(0).any())


# ----------------------------------------------------------------------------- arguments


def assert_refused(op, arguments, message, error=ValueError):
    before = copy(arguments)
    with pytest.raises(error, match=f"^{op.name}: {message}"):
        op.kernel(arguments)
    assert_same_bits(tensors_of(arguments), tensors_of(before))


def test_options_that_are_tensors(device):
    op = FOLLOW_A_PATH[0]
    arguments = sample(op, ENTRIES, device)

    def refused(message, error=ValueError, **changes):
        changes = {name: value.to(device) for name, value in changes.items()}
        assert_refused(op, {**arguments, **changes}, message, error)

    for name, expected in (
        ("lr", "float32 or float64"),
        ("clip", "float32 or float64"),
        ("grad_scale", "float32"),
        ("found_inf", "float32"),
    ):
        refused(rf"{name} has shape \[2\], expected one element", **{name: torch.ones(2)})
        half = torch.ones((), dtype=torch.float16)
        refused(rf"{name} has dtype \S+, expected {expected}", TypeError, **{name: half})
    for rate in (-1.0, float("nan"), float("inf")):
        changes = {**arguments, "lr": torch.tensor(rate)}
        assert_refused(op, changes, r"lr is \S+, expected a finite number >= 0")


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_options_on_the_host(device):
    op = FOLLOW_A_PATH[0]
    for name in ("clip", "grad_scale", "found_inf"):
        arguments = {**sample(op, ENTRIES, device), name: torch.ones(())}
        assert_refused(op, arguments, f"{name} is on cpu, expected cuda")


def test_what_the_plan_lacks(device):
    theta = torch.nn.Parameter(torch.ones(3, device=device))
    theta.grad = torch.ones_like(theta)
    op = next(op for op in STEPS if op.name == "adam_step_")
    options = {n: v for n, v in sample(op, (), device).items() if not isinstance(v, list)}
    state = {key: [torch.zeros(3, device=device)] for key in ("exp_avg", "exp_avg_sq")}
    with pytest.raises(ValueError, match="adam_step_: there are no steps; pass them"):
        C.ParameterPlan(["w"], [theta], state).adam_step_(**options)
    steps = [torch.zeros((), device=device)]
    with pytest.raises(ValueError, match="state has no list 'exp_avg_sq'"):
        C.ParameterPlan(["w"], [theta], {"exp_avg": state["exp_avg"]}, steps).adam_step_(**options)
    half = {**state, "path": [torch.zeros(3, device=device)]}
    with pytest.raises(ValueError, match="state has no list 'anchor'"):
        C.ParameterPlan(["w"], [theta], half, steps).adam_step_(**options)
    for counter, message in (
        (torch.zeros(1, device=device), r"shape \[1\]"),
        (torch.zeros((), device=device).double(), "dtype float64"),
    ):
        error = TypeError if "dtype" in message else ValueError
        with pytest.raises(error, match=rf"steps\[0\] of parameter 'w' has {message}"):
            C.ParameterPlan(["w"], [theta], state, [counter])


# ----------------------------------------------------------------------------- step after step


class Twins:
    """A plan over copies of an op's arguments, and the arguments themselves for single steps."""

    def __init__(self, op, implementation, device):
        self.op, self.implementation = op, implementation
        self.direct = sample(op, ENTRIES, device)
        own = copy(self.direct)
        self.params = [torch.nn.Parameter(entry) for entry in own["params"]]
        self.state = {key: own[name] for name, key in STATE_KEYS.items() if own.get(name)}
        self.steps = own["steps"]
        kind = C.ParameterPlan if implementation == "kernel" else ReferencePlan
        self.plan = kind(["a", "b", "c"], self.params, self.state, self.steps)
        self.options = {name: v for name, v in own.items() if not isinstance(v, list)}

    def step(self, without=(), clear=None):
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
        clear = self.options["clear_grad"] if clear is None else clear
        value = getattr(self.plan, self.op.name)(**{**self.options, "clear_grad": clear})
        if active:
            expected = getattr(self.op, self.implementation)({**chosen, "clear_grad": clear})
            assert_same_bits(tensors_of({"value": value}), tensors_of({"value": expected}))
        elif value is not None:
            assert value.item() == 0
        names = {STATE_KEYS.get(name, name): value for name, value in self.direct.items()}
        own = {"params": self.params, "steps": self.steps, **self.state}
        assert_same_bits(tensors_of(own), tensors_of({name: names[name] for name in own}))
        assert clear != any(bool(self.params[i].grad.any()) for i in active) or not active


@every_step
@every_implementation
def test_a_plan_takes_step_after_step(op, implementation, device):
    twins = Twins(op, implementation, device)
    for without in ((), (1,), (), (), (2,), (0, 2), (0, 1, 2), ()):
        twins.step(without)
    for clear in (True, False, False, True):
        twins.step(clear=clear)
