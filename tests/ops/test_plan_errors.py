"""What ParameterPlan refuses: at construction where it can, by the parameter's name, unchanged."""

from __future__ import annotations

import pytest
import torch
from helpers import Entry, assert_same_bits
from plan_problem import KEYS, Problem
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from clext.ops._extension import C

SMALL = (Entry((2, 3)), Entry((2, 3)))


@pytest.fixture(params=["compiled", "reference"])
def implementation(request):
    return request.param


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda t: t.t().contiguous(), ValueError, r"has shape \[3, 2\], expected \[2, 3\]"),
        (lambda t: t.half(), TypeError, r"has dtype \S*float16, expected \S*float32"),
        (lambda t: t.double(), TypeError, r"has dtype \S*float64, expected \S*float32"),
        (lambda t: t.t().contiguous().t(), ValueError, r"has strides \[1, 2\], expected \[3, 1\]"),
        (lambda t: t.to("meta"), ValueError, r"is on meta, expected \w+"),
        (lambda t: t.to_sparse(), TypeError, r"has layout \S+, expected a dense"),
    ],
    ids=["shape", "low precision", "precision", "strides", "device", "sparse"],
)
def test_state_that_does_not_fit_is_refused_at_construction(spoil, error, message, implementation):
    for key in KEYS:
        problem = Problem(implementation, entries=SMALL)
        problem.state[key][1] = spoil(problem.state[key][1])
        label = rf"^ParameterPlan: {key}\[1\] of parameter 'layer1.weight' "
        with pytest.raises(error, match=label + message):
            problem.make(implementation)


def test_lists_of_other_length_are_refused_at_construction(implementation):
    problem = Problem(implementation, entries=SMALL)
    problem.state["path"].pop()
    with pytest.raises(ValueError, match=r"ParameterPlan: path has 1 tensors, expected 2"):
        problem.make(implementation)
    problem.names.pop()
    with pytest.raises(ValueError, match=r"ParameterPlan: names has 1 entries, expected 2"):
        problem.make(implementation)
    problem.params.clear()
    with pytest.raises(ValueError, match=r"ParameterPlan: params is empty, expected at least one"):
        problem.make(implementation)


def test_state_that_is_the_parameter_is_refused_at_construction(implementation):
    """The saved weights of SI would follow the live ones, and the method would do nothing."""
    for key in KEYS:
        problem = Problem(implementation, entries=SMALL)
        problem.state[key][1] = problem.params[1].detach()
        with pytest.raises(ValueError, match=r"ParameterPlan: .*shares memory with .*clone"):
            problem.make(implementation)


def test_state_lists_that_share_memory_are_refused_at_construction(implementation):
    problem = Problem(implementation, entries=SMALL)
    problem.state["path"][0] = problem.state["fisher"][1]
    with pytest.raises(ValueError, match=r"(path\[0\]|fisher\[1\]).* shares memory with"):
        problem.make(implementation)


def test_a_missing_state_list_is_named(implementation):
    problem = Problem(implementation, entries=SMALL, keys=("anchor",))
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


def test_numbers_out_of_range(implementation):
    problem = Problem(implementation, entries=SMALL)
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


def test_a_parameter_of_another_dtype_later_on_is_refused_by_name(implementation):
    problem = Problem(implementation, entries=SMALL)
    problem.plan.quadratic_penalty()
    problem.params[1].data = problem.params[1].data.double()
    with pytest.raises(TypeError, match=r"\w+\[1\].* has dtype \S*float32, expected \S*float64"):
        problem.plan.quadratic_penalty()


def test_state_that_gets_new_memory_later_on_is_noticed(implementation):
    problem = Problem(implementation, entries=SMALL)
    problem.plan.quadratic_penalty()
    omega = problem.state["importance"][0]
    omega.data = omega.data * 0
    problem.state["importance"][1].zero_()
    assert problem.plan.quadratic_penalty().item() == 0


@pytest.mark.parametrize("calls_before", [0, 2])
def test_a_gradient_made_in_inference_mode_is_refused_unchanged(calls_before):
    problem = Problem("compiled", entries=SMALL)
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


def test_gradients_without_memory_are_refused():
    problem = Problem("compiled", entries=SMALL)
    problem.backward()
    problem.plan.add_quadratic_penalty_grad_(0.5)  # the launch is made, and finds what is new
    before = problem.snapshot()
    problem.params[1].grad = torch._efficientzerotensor((2, 3))
    message = r"grads\[1\] of parameter 'layer1.weight' has no memory of its own"
    with pytest.raises(TypeError, match=message):
        problem.plan.add_quadratic_penalty_grad_(0.5)
    with FakeTensorMode():
        fake = [nn.Parameter(torch.ones(3))]
        with pytest.raises(TypeError, match=r"params\[0\] of parameter 'w' has no memory"):
            C.ParameterPlan(["w"], fake, {})
    problem.params[1].grad = before["grads[1]"]
    assert_same_bits(problem.snapshot(), before)


def test_parameters_that_are_lazy_negatives_are_refused_where_they_are_written():
    theta = torch._neg_view(torch.ones(3)).requires_grad_()
    theta.grad = torch.ones(3)
    options = dict.fromkeys(("momentum", "dampening", "weight_decay", "strength", "decay"), 0.0)
    flags = dict.fromkeys(("nesterov", "maximize", "proximal", "clear_grad"), False)
    tensors = dict.fromkeys(("grad_scale", "found_inf", "clip"))
    with pytest.raises(ValueError, match=r"params\[0\] .* is the lazy negative of its memory"):
        C.ParameterPlan(["w"], [theta], {}).sgd_step_(lr=0.1, **options, **flags, **tensors)
    assert torch.equal(theta, -torch.ones(3))


def test_devices_without_kernels_are_refused():
    params = [torch.ones(3, device="meta")]
    with pytest.raises(
        ValueError, match=r"^ParameterPlan: params\[0\] of parameter 'w' is on meta"
    ):
        C.ParameterPlan(["w"], params, {"anchor": [torch.ones(3, device="meta")]})
