"""What ParameterPlan refuses: at construction where it can, by the parameter's name, unchanged."""

from __future__ import annotations

import pytest
import torch
from op_samples import Entry, assert_same_bits
from plan_problem import KEYS, Problem
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from clext.ops._extension import C

SMALL = (Entry((2, 3)), Entry((2, 3)))


def problem_of(**changes):
    return Problem("compiled", entries=SMALL, **changes)


# ----------------------------------------------------------------------------- construction


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda t: t.t().contiguous(), ValueError, r"has shape \[3, 2\], expected \[2, 3\]"),
        (lambda t: t.half(), TypeError, r"has dtype float16, expected float32"),
        (lambda t: t.double(), TypeError, r"has dtype float64, expected float32"),
        (lambda t: t.t().contiguous().t(), ValueError, r"has strides \[1, 2\], expected \[3, 1\]"),
        (lambda t: t.to("meta"), ValueError, r"is on meta, expected cpu"),
        (lambda t: t.to_sparse(), TypeError, r"has layout \S+, expected a dense"),
    ],
    ids=["shape", "low precision", "precision", "strides", "device", "sparse"],
)
def test_state_that_does_not_fit(spoil, error, message):
    for key in KEYS:
        problem = problem_of()
        problem.state[key][1] = spoil(problem.state[key][1])
        label = rf"^ParameterPlan: {key}\[1\] of parameter 'layer1.weight' "
        with pytest.raises(error, match=label + message):
            problem.make("compiled")


def test_lists_of_other_length():
    problem = problem_of()
    problem.state["path"].pop()
    with pytest.raises(ValueError, match=r"ParameterPlan: path has 1 tensors, expected 2"):
        problem.make("compiled")
    problem.names.pop()
    with pytest.raises(ValueError, match=r"ParameterPlan: names has 1 entries, expected 2"):
        problem.make("compiled")
    problem.params.clear()
    with pytest.raises(ValueError, match=r"ParameterPlan: params is empty, expected at least one"):
        problem.make("compiled")


@pytest.mark.parametrize("wrong", [None, 1.0, "x"], ids=str)
def test_something_else_than_tensors(wrong):
    got = type(wrong).__name__
    theta = torch.ones(3)
    lists = {"params": [theta], "path": [theta.clone()], "steps": [torch.zeros(())]}

    def plan_of(**changes):
        now = {**lists, **changes}
        return C.ParameterPlan(["w"], now["params"], {"path": now["path"]}, now["steps"])

    for name in lists:
        with pytest.raises(
            TypeError, match=rf"^ParameterPlan: {name}\[1\] is of type {got}, expected a tensor$"
        ):
            plan_of(**{name: [theta, wrong]})
    for name in lists if wrong != "x" else ():
        message = f"^ParameterPlan: {name} is of type {got}, expected a list of tensors$"
        with pytest.raises(TypeError, match=message):
            plan_of(**{name: wrong})
    problem = problem_of()
    for name in ("consolidate_importance_", "consolidate_all_anchors_"):
        message = rf"^{name}: estimate\[0\] is of type {got}, expected a tensor$"
        with pytest.raises(TypeError, match=message):
            getattr(problem.plan, name)([wrong, theta], 0.5)


def test_state_that_is_the_parameter_or_another_state():
    """The saved weights of a method would follow the live ones, and it would do nothing."""
    for key in KEYS:
        problem = problem_of()
        problem.state[key][1] = problem.params[1].detach()
        with pytest.raises(ValueError, match=r"ParameterPlan: .*shares memory with .*clone"):
            problem.make("compiled")
    problem = problem_of()
    problem.state["path"][0] = problem.state["fisher"][1]
    with pytest.raises(ValueError, match=r"(path\[0\]|fisher\[1\]).* shares memory with"):
        problem.make("compiled")


def test_devices_without_kernels():
    with pytest.raises(
        ValueError, match=r"^ParameterPlan: params\[0\] of parameter 'w' is on meta"
    ):
        C.ParameterPlan(["w"], [torch.ones(3, device="meta")], {})


# ----------------------------------------------------------------------------- calls


def test_a_missing_state_list_is_named():
    problem = problem_of(keys=("anchor",))
    problem.backward()
    calls = {
        "quadratic_penalty": (),
        "add_quadratic_penalty_grad_": (0.5,),
        "accumulate_riemannian_walk_score_": (0.1,),
        "consolidate_importance_": (problem.state["anchor"], 0.5),
        "consolidate_all_anchors_": (problem.state["anchor"], 0.5),
        "consolidate_path_integral_": (0.1,),
        "consolidate_riemannian_walk_": (0.5,),
    }
    for name, arguments in calls.items():
        with pytest.raises(
            ValueError, match=rf"^ParameterPlan.{name}: state has no list '\w+'; pass"
        ):
            getattr(problem.plan, name)(*arguments)
    problem = problem_of(keys=("anchor", "importance", "path"))
    problem.plan.add_quadratic_penalty_grad_(0.5)
    with pytest.raises(ValueError, match=r"^ParameterPlan.accumulate_path_integral_: state has no"):
        problem.plan.accumulate_path_integral_()


def test_numbers_out_of_range():
    problem = problem_of()
    problem.backward()
    problem.plan.add_quadratic_penalty_grad_(0.5)
    before = problem.snapshot()
    nan, estimate = float("nan"), problem.state["score"]
    for name, arguments, what in (
        ("add_quadratic_penalty_grad_", (-1.0,), "strength is -1"),
        ("riemannian_walk_step_", (1.5,), "decay is 1.5"),
        ("accumulate_riemannian_walk_score_", (0.0,), "eps is 0"),
        ("consolidate_importance_", (estimate, -0.5), "gamma is -0.5"),
        ("consolidate_all_anchors_", (estimate, 2.0), "gamma is 2"),
        ("consolidate_path_integral_", (0.0,), "xi is 0"),
        ("consolidate_riemannian_walk_", (nan,), "mix is nan"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: {what}.*, expected a "):
            getattr(problem.plan, name)(*arguments)
    assert_same_bits(problem.snapshot(), before)


@pytest.mark.parametrize("calls_before", [0, 2])
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda g: g.to_sparse(), TypeError, "has layout .*sparse=False"),
        (lambda g: g.t().contiguous().t(), ValueError, "has strides"),
        (lambda _: torch._efficientzerotensor((2, 3)), TypeError, "has no memory of its own"),
    ],
    ids=["sparse", "strides", "zero"],
)
def test_a_gradient_that_does_not_fit(spoil, error, message, calls_before):
    problem = problem_of()
    problem.backward()
    for _ in range(calls_before):  # the launch is made, and finds what is new
        problem.plan.add_quadratic_penalty_grad_(0.5)
    problem.backward(0)
    good = problem.params[1].grad
    before = problem.snapshot()
    problem.params[1].grad = spoil(good)
    with pytest.raises(error, match=rf"grads\[1\] of parameter 'layer1.weight' {message}"):
        problem.plan.add_quadratic_penalty_grad_(0.5)
    assert problem.params[0].grad is None  # a refused call makes none
    problem.params[1].grad = good
    assert_same_bits(problem.snapshot(), before)


@pytest.mark.parametrize("calls_before", [0, 2])
def test_a_gradient_made_in_inference_mode_is_refused_unchanged(calls_before):
    problem = problem_of()
    problem.backward()
    for _ in range(calls_before):
        problem.plan.add_quadratic_penalty_grad_(0.5)
    with torch.inference_mode():
        gradient = torch.ones(2, 3)
    problem.params[1].grad = gradient
    message = r"grads\[1\] of parameter 'layer1.weight' was made in torch.inference_mode"
    with pytest.raises(ValueError, match=message):
        problem.plan.add_quadratic_penalty_grad_(0.5)
    assert torch.equal(gradient, torch.ones(2, 3))
    with torch.inference_mode():
        problem.plan.add_quadratic_penalty_grad_(0.5)
    assert not torch.equal(gradient, torch.ones(2, 3))


def test_parameters_that_hold_no_elements_of_their_own():
    with FakeTensorMode():
        fake = [nn.Parameter(torch.ones(3))]
        with pytest.raises(TypeError, match=r"params\[0\] of parameter 'w' has no memory"):
            C.ParameterPlan(["w"], fake, {})
    theta = torch._neg_view(torch.ones(3)).requires_grad_()
    theta.grad = torch.ones(3)
    options = dict.fromkeys(("momentum", "dampening", "weight_decay", "strength", "decay"), 0.0)
    flags = dict.fromkeys(("nesterov", "maximize", "proximal", "clear_grad"), False)
    tensors = dict.fromkeys(("grad_scale", "found_inf", "clip"))
    with pytest.raises(ValueError, match=r"params\[0\] .* is the lazy negative of its memory"):
        C.ParameterPlan(["w"], [theta], {}).sgd_step_(lr=0.1, **options, **flags, **tensors)
    assert torch.equal(theta, -torch.ones(3))


def test_a_parameter_of_another_dtype_later_on_is_refused_by_name():
    problem = problem_of()
    problem.plan.quadratic_penalty()
    problem.params[1].data = problem.params[1].data.double()
    with pytest.raises(TypeError, match=r"\w+\[1\].* has dtype float32, expected float64"):
        problem.plan.quadratic_penalty()
