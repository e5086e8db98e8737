"""The plan in plain torch: it reads gradients at each call and names parameters in messages."""

from __future__ import annotations

import pytest
import torch

from clext import reference


def like(params):
    """A state list for `params`."""
    return [torch.rand(entry.shape).to(entry.device) + 0.1 for entry in params]


def make_plan(device, *, keys=("anchor", "importance", "path", "previous", "fisher")):
    params = [torch.randn(2, 3, device=device), torch.randn(3, device=device)]
    params = [torch.nn.Parameter(entry) for entry in params]
    state = {key: like(params) for key in keys}
    return reference.ReferencePlan(["weight", "bias"], params, state), params, state


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


def test_plan_leaves_out_parameters_without_gradient(device):
    plan, params, state = make_plan(device)
    params[1].grad = torch.ones_like(params[1])
    before = {key: [entry.clone() for entry in entries] for key, entries in state.items()}
    plan.accumulate_path_integral_(1.0)
    plan.riemannian_walk_step_(1.0, 0.9)
    for key in ("path", "previous", "fisher"):
        assert torch.equal(state[key][0], before[key][0])
        assert not torch.equal(state[key][1], before[key][1])


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
    plan = reference.ReferencePlan(["table.weight"], params, state)
    with pytest.raises(TypeError, match=r"grads\[0\] of parameter 'table.weight' has layout"):
        plan.add_quadratic_penalty_grad_(1.0)


def test_plan_says_which_state_it_lacks(device):
    plan, _, _ = make_plan(device, keys=("anchor", "importance"))
    with pytest.raises(ValueError, match="state has no list 'path'"):
        plan.accumulate_path_integral_(1.0)


def test_plan_checks_its_state_once_and_names_the_parameter(device):
    params = [torch.nn.Parameter(torch.zeros(2, device=device))]
    with pytest.raises(ValueError, match=r"anchor\[0\] of parameter 'bias' has shape \[3\]"):
        reference.ReferencePlan(["bias"], params, {"anchor": [torch.zeros(3, device=device)]})
    with pytest.raises(ValueError, match="names has 0 entries, expected 1"):
        reference.ReferencePlan([], params, {})
    with pytest.raises(ValueError, match="params is empty"):
        reference.ReferencePlan([], [], {})
