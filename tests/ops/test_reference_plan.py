"""The plan in plain torch: it reads gradients at each call and names parameters in messages."""

from __future__ import annotations

import pytest
import torch

from clext import reference
from clext.ops.plan import ReferencePlan


def like(params):
    """A state list for `params`."""
    return [torch.rand(entry.shape).to(entry.device) + 0.1 for entry in params]


def make_plan(device, *, keys=("anchor", "importance", "path")):
    params = [torch.randn(2, 3, device=device), torch.randn(3, device=device)]
    params = [torch.nn.Parameter(entry) for entry in params]
    state = {key: like(params) for key in keys}
    return ReferencePlan(["weight", "bias"], params, state), params, state


def test_plan_adds_the_gradient_of_its_own_value(device):
    plan, params, state = make_plan(device)
    params[0].grad = torch.ones_like(params[0])
    value = plan.add_quadratic_penalty_grad_(2.0)
    expected = 2 * reference.quadratic_penalty(params, state["anchor"], state["importance"])
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(value, 2 * plan.quadratic_penalty())
    for parameter, gradient in zip(params, torch.autograd.grad(expected, params), strict=True):
        before = 1.0 if parameter is params[0] else 0.0
        torch.testing.assert_close(parameter.grad, gradient + before)


def test_plan_makes_no_gradient_for_a_frozen_parameter(device):
    plan, params, _ = make_plan(device)
    params[0].requires_grad_(False)
    plan.add_quadratic_penalty_grad_(1.0)
    assert params[0].grad is None
    assert params[1].grad is not None


def test_plan_names_the_parameter_of_a_sparse_gradient(device):
    embedding = torch.nn.Embedding(4, 2, sparse=True, device=device)
    embedding(torch.tensor([1, 2], device=device)).sum().backward()
    params = [embedding.weight]
    state = {key: like(params) for key in ("anchor", "importance")}
    plan = ReferencePlan(["table.weight"], params, state)
    with pytest.raises(TypeError, match=r"grads\[0\] of parameter 'table.weight' has layout"):
        plan.add_quadratic_penalty_grad_(1.0)


def test_plan_says_which_state_it_lacks(device):
    plan, _, _ = make_plan(device, keys=("anchor", "importance"))
    with pytest.raises(ValueError, match="state has no list 'task_score'"):
        plan.accumulate_riemannian_walk_score_(1.0)


def test_plan_checks_its_state_once_and_names_the_parameter(device):
    params = [torch.nn.Parameter(torch.zeros(2, device=device))]
    with pytest.raises(ValueError, match=r"anchor\[0\] of parameter 'bias' has shape \[3\]"):
        ReferencePlan(["bias"], params, {"anchor": [torch.zeros(3, device=device)]})
    with pytest.raises(ValueError, match="names has 0 entries, expected 1"):
        ReferencePlan([], params, {})
    with pytest.raises(ValueError, match="params is empty"):
        ReferencePlan([], [], {})
