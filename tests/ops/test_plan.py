"""ParameterPlan does what the ops do, step after step, whatever happens to the parameters."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from op_samples import Entry, assert_same_bits, tensors_of
from plan_problem import Problem, Twin, run_step

from clext.ops import plan
from clext.ops._extension import C
from clext.ops.plan import ReferencePlan, has_kernels, make_plan

every_implementation = pytest.mark.parametrize("implementation", ["compiled", "reference"])


# ----------------------------------------------------------------------------- what may happen


def new_gradients_each_step(problem, step):
    problem.backward()


def gradients_kept_and_zeroed(problem, step):
    if step == 0:
        problem.backward()
    for theta in problem.params:
        theta.grad.copy_(torch.randn(theta.shape, generator=problem.random))


def one_parameter_never_has_a_gradient(problem, step):
    problem.backward(1)


def gradients_appear_later(problem, step):
    problem.backward(*([0, 2] if step < 2 else []))


def gradients_come_and_go(problem, step):
    # As many as before, but others.
    problem.backward(step % 3)


def no_gradient_at_all(problem, step):
    problem.backward(*range(len(problem.params)))


def parameters_get_new_memory(problem, step):
    problem.backward()
    if step == 2:
        for theta in problem.params[:2]:
            theta.data = theta.data.clone() + 1


def state_gets_new_memory(problem, step):
    problem.backward()
    if step == 2:
        for key in ("path", "importance"):
            problem.state[key][0].data = problem.state[key][0].data.clone()


def frozen_later(problem, step):
    if step == 2:
        problem.params[0].requires_grad_(False)
    problem.backward(*([0] if step >= 2 else []))


def frozen_at_first(problem, step):
    problem.params[0].requires_grad_(step >= 2)
    problem.backward(0)


def frozen_with_its_gradient(problem, step):
    problem.backward()
    problem.params[0].requires_grad_(False)


EVENTS = (
    new_gradients_each_step,
    gradients_kept_and_zeroed,
    one_parameter_never_has_a_gradient,
    gradients_appear_later,
    gradients_come_and_go,
    no_gradient_at_all,
    parameters_get_new_memory,
    state_gets_new_memory,
    frozen_later,
    frozen_at_first,
    frozen_with_its_gradient,
)


@every_implementation
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_steps_equal_the_ops(event, implementation, device):
    problem = Problem(implementation, device)
    twin = Twin(problem, implementation)
    for step in range(5):
        event(problem, step)
        run_step(problem, twin)


@every_implementation
def test_end_of_a_task_equals_the_ops(implementation, device):
    problem = Problem(implementation, device)
    module, params = Twin(problem, implementation).module, problem.params
    estimate = [entry.abs() for entry in problem.state["anchor"]]
    state = {key: [t.clone() for t in entries] for key, entries in problem.state.items()}
    merged = [state["importance"], state["anchor"]]
    plan = problem.plan

    plan.consolidate_importance_(estimate, 0.5)
    module.consolidate_importance_(*merged, estimate, params, 0.5)
    constant = plan.consolidate_all_anchors_(estimate, 0.5)
    expected = module.consolidate_all_anchors_(*merged, estimate, params, 0.5)
    assert_same_bits({"constant": constant}, {"constant": expected})
    plan.consolidate_path_integral_(0.1)
    module.consolidate_path_integral_(*merged, state["path"], params, 0.1)
    assert_same_bits(tensors_of(problem.state), tensors_of(state))
    plan.consolidate_riemannian_walk_(0.25)
    scores = [state[key] for key in ("score", "task_score", "fisher")]
    module.consolidate_riemannian_walk_(*merged, *scores, params, 0.25)
    assert_same_bits(tensors_of(problem.state), tensors_of(state))


def test_a_plan_is_compiled_where_there_are_kernels(device):
    problem = Problem("compiled", device)
    assert has_kernels(problem.params[0].device)
    plan = make_plan(problem.names, problem.params, problem.state)
    assert isinstance(plan, C.ParameterPlan)
    # "meta" stands for any device that has no kernels.
    nowhere = [torch.zeros(3, device="meta")]
    assert not has_kernels(nowhere[0].device)
    assert isinstance(make_plan(["w"], nowhere, {"anchor": nowhere}), ReferencePlan)


# ----------------------------------------------------------------------------- what the pull keeps


@every_implementation
def test_a_walk_follows_the_last_pull(implementation, device):
    """Gradients that are gone by then, and parameters frozen meanwhile, do not matter."""
    problem = Problem(implementation, device)
    twin = Twin(problem, implementation)
    for without in ((), (1,), ()):
        problem.backward(*without)
        for index, theta in enumerate(problem.params):
            theta.requires_grad_(index not in without)
        twin.pull(0.5)
        problem.plan.add_quadratic_penalty_grad_(0.5)
        problem.optimize()
        for index, theta in enumerate(problem.params):
            theta.grad = None
            theta.requires_grad_(index % 2 == 0)
        twin.walk(0.9)
        problem.plan.accumulate_path_integral_()
        problem.plan.riemannian_walk_step_(0.9)
        assert_same_bits(tensors_of(problem.state), tensors_of(twin.state))


@every_implementation
def test_a_walk_without_a_pull_is_an_error(implementation, device):
    problem = Problem(implementation, device)
    problem.backward()
    for name, arguments in (("accumulate_path_integral_", ()), ("riemannian_walk_step_", (0.9,))):
        message = f"^ParameterPlan.{name}: nothing has been kept of this step, expected add_quadra"
        with pytest.raises(RuntimeError, match=message):
            getattr(problem.plan, name)(*arguments)


# ----------------------------------------------------------------------------- gradients


@every_implementation
def test_missing_gradients_are_made_like_their_parameters(implementation, device):
    problem = Problem(implementation, device)
    problem.plan.add_quadratic_penalty_grad_(0.5)
    for theta, anchor, omega in zip(
        problem.params, problem.state["anchor"], problem.state["importance"], strict=True
    ):
        expected = (omega.double() * (theta.detach().double() - anchor)).to(theta.dtype)
        assert theta.grad.stride() == theta.stride()
        assert not theta.grad.requires_grad
        torch.testing.assert_close(theta.grad, expected)


def test_a_gradient_at_the_same_address_in_another_layout(device):
    """Allocators hand out the same memory again; only the strides tell."""
    problem = Problem("compiled", device, entries=(Entry((3, 2)),))
    memory = torch.randn(6, device=device)
    problem.params[0].grad = memory.view(3, 2)
    problem.plan.add_quadratic_penalty_grad_(0.5)
    problem.params[0].grad = memory.view(2, 3).t()
    with pytest.raises(ValueError, match=r"grads\[0\] of parameter 'layer0.weight' has strides"):
        problem.plan.add_quadratic_penalty_grad_(0.5)


def test_a_parameter_at_the_same_address_in_another_layout(device):
    problem = Problem("compiled", device, entries=(Entry((3, 2)),))
    problem.plan.quadratic_penalty()
    theta = problem.params[0]
    theta.data = theta.data.view(2, 3).t()
    (anchor,), (omega,) = problem.state["anchor"], problem.state["importance"]
    expected = (omega * (theta - anchor) ** 2).sum().detach()
    torch.testing.assert_close(problem.plan.quadratic_penalty(), expected)


def test_a_gradient_with_other_strides_where_they_do_not_matter(device):
    """A dimension of one element has a stride that nothing reads."""
    problem = Problem("compiled", device, entries=(Entry((3, 1)), Entry((1, 4))))
    twin = Twin(problem, "compiled")
    for step in range(4):
        problem.backward()
        if step % 2:
            for theta, strides in zip(problem.params, ((1, 7), (9, 1)), strict=True):
                theta.grad = theta.grad.clone().as_strided(theta.shape, strides)
        run_step(problem, twin)


@pytest.mark.parametrize("calls_before", [0, 2])
@pytest.mark.parametrize("shape", [(), (3, 2)], ids=str)
def test_gradients_that_are_lazy_negatives_have_their_sign(shape, calls_before, device):
    """As autograd leaves some gradients of complex arithmetic: the memory holds the negative."""
    problem = Problem("compiled", device, entries=(Entry(shape), Entry((4,))))
    for step in range(calls_before + 2):
        problem.backward()
        if step >= calls_before:
            problem.params[0].grad = torch._neg_view(-problem.params[0].grad)
            assert problem.params[0].grad.is_neg()
        twin = Twin(problem, "compiled")
        value, grads = twin.pull(0.5)
        assert torch.equal(problem.plan.add_quadratic_penalty_grad_(0.5), value)
        for index, gradient in grads.items():
            assert torch.equal(problem.params[index].grad, gradient)
        assert_same_bits(tensors_of(problem.state), tensors_of(twin.state))


def test_a_graph_that_has_saved_a_gradient_is_told_that_it_changed(device):
    """With create_graph=True; without a word the second derivative would be wrong."""
    problem = Problem("compiled", device, entries=(Entry((3,)),))
    for _ in range(2):
        problem.backward()
        weight = torch.ones(3, device=device, requires_grad=True)
        loss = (problem.params[0].grad * weight).sum()
        problem.plan.add_quadratic_penalty_grad_(0.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# ----------------------------------------------------------------------------- memory


def test_state_that_moves_to_shared_memory():
    """Its storage stays the same object and gets other memory."""
    problem = Problem("compiled")
    twin = Twin(problem, "compiled")
    for step in range(4):
        problem.backward()
        if step == 2:
            for key in ("path", "importance"):
                for tensor in problem.state[key]:
                    tensor.share_memory_()
        run_step(problem, twin)


def test_a_lazy_clone_of_what_is_written_keeps_its_values(device):
    """Copy on write: the memory is shared until one of the two is written."""
    problem = Problem("compiled", device, entries=(Entry((5, 3)), Entry((7,))))
    twin = Twin(problem, "compiled")
    for step in range(4):
        problem.backward() if step < 2 else None
        tensors = [problem.state["path"][0], problem.params[1].grad]
        clones = [torch._lazy_clone(tensor) for tensor in tensors]
        before = [clone.tolist() for clone in clones]
        run_step(problem, twin)
        assert [clone.tolist() for clone in clones] == before
        assert [tensor.tolist() for tensor in tensors] != before


def test_a_plan_keeps_its_tensors_alive(device):
    problem = Problem("compiled", device)
    expected = problem.plan.quadratic_penalty()
    plan = problem.plan
    del problem
    assert torch.equal(plan.quadratic_penalty(), expected)


def test_a_compiled_plan_is_not_copied():
    plan = Problem("compiled").plan
    with pytest.raises(TypeError, match="ParameterPlan"):
        copy.deepcopy(plan)
    with pytest.raises(TypeError, match="ParameterPlan"):
        pickle.dumps(plan)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_ten_thousand_calls_leak_no_memory():
    def resident_pages():
        return int(Path("/proc/self/statm").read_text().split()[1])

    problem = Problem("compiled", entries=(Entry((64,)), Entry((8, 8))))

    def calls(count):
        for _ in range(count):
            for theta in problem.params:
                theta.grad = torch.zeros_like(theta)
            problem.plan.add_quadratic_penalty_grad_(0.0)
            problem.plan.accumulate_path_integral_()

    calls(1000)
    before = resident_pages()
    calls(10_000)
    # Losing one of the values, 0-dim tensors, at each call would already cost 4 MB.
    assert (resident_pages() - before) * 4096 < 2**21


# ----------------------------------------------------------------------------- modes of torch


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.enable_grad, torch.inference_mode], ids=lambda mode: mode.__name__
)
@every_implementation
def test_nothing_is_recorded_for_autograd(mode, implementation, device):
    problem, expected = Problem(implementation, device), Problem(implementation, device)
    for each in (problem, expected):
        each.backward()
    with mode():
        value = problem.plan.add_quadratic_penalty_grad_(0.5)
        problem.plan.accumulate_path_integral_()
        alone = problem.plan.quadratic_penalty()
    expected.plan.add_quadratic_penalty_grad_(0.5)
    expected.plan.accumulate_path_integral_()
    assert not value.requires_grad
    assert not alone.requires_grad
    assert not any(theta.grad.requires_grad for theta in problem.params)
    assert not any(tensor.requires_grad for tensor in tensors_of(problem.state).values())
    assert_same_bits(problem.snapshot(), expected.snapshot())


@pytest.mark.parametrize(("version", "is_enough"), [(12000, False), (12010, True), (13000, True)])
def test_a_driver_without_large_kernel_parameters_is_named(version, is_enough, monkeypatch):
    monkeypatch.setattr(plan, "build_info", lambda: {"cuda": "12.8"})
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: version, raising=False)
    plan._check_driver.cache_clear()
    try:
        if is_enough:
            assert has_kernels(torch.device("cuda"))
        else:
            with pytest.raises(RuntimeError, match=r"CUDA 12.1 or newer \(530\), .* CUDA 12.0;"):
                has_kernels(torch.device("cuda"))
    finally:
        plan._check_driver.cache_clear()
