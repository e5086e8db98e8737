"""Gradients of the penalty, and every op under the machinery of torch.compile."""

from __future__ import annotations

import pytest
import torch
from op_registry import OPS
from op_samples import DTYPES, Entry, assert_same_bits, copy, outputs_of, sample
from torch.library import opcheck

from clext import ops

PENALTY = next(op for op in OPS if op.name == "quadratic_penalty")
EXACT = (
    Entry((3, 2), torch.float64, "transposed"),
    Entry((), torch.float64),
    Entry((0,), torch.float64),
    Entry((5,), torch.float64, "unaligned"),
)

DISPATCHED = [op for op in OPS if not op.fused]

every_op = pytest.mark.parametrize("op", DISPATCHED, ids=str)


def penalty_lists(entries, device="cpu"):
    arguments = sample(PENALTY, entries, device)
    for theta in arguments["params"]:
        theta.requires_grad_()
    return list(arguments.values())


# ----------------------------------------------------------------------------- gradients


def test_gradient_of_the_penalty(device):
    params, anchors, importances = penalty_lists(EXACT, device)
    assert torch.autograd.gradcheck(
        lambda *thetas: ops.quadratic_penalty(list(thetas), anchors, importances), tuple(params)
    )


def test_second_derivative_of_the_penalty(device):
    params, anchors, importances = penalty_lists(EXACT, device)
    assert torch.autograd.gradgradcheck(
        lambda *thetas: ops.quadratic_penalty(list(thetas), anchors, importances), tuple(params)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_gradient_is_the_formula_in_the_parameters_dtype_and_layout(dtype, device):
    entries = (Entry((4, 6), dtype, "transposed"), Entry((2, 3, 4, 5), dtype, "channels_last"))
    params, anchors, importances = penalty_lists(entries, device)
    (-1.5 * ops.quadratic_penalty(params, anchors, importances)).backward()
    eps = torch.finfo(dtype).eps
    for theta, anchor, omega in zip(params, anchors, importances, strict=True):
        exact = -3.0 * omega.double() * (theta.detach().double() - anchor.double())
        assert theta.grad.stride() == theta.stride()
        torch.testing.assert_close(
            theta.grad.double(), exact, rtol=2 * eps, atol=min(100 * eps, 1e-6)
        )


def test_gradient_goes_to_the_parameters_that_ask_for_it(device):
    params, anchors, importances = penalty_lists((Entry((3,)), Entry((4,))), device)
    params[0].requires_grad_(False)
    ops.quadratic_penalty(params, anchors, importances).backward()
    assert params[0].grad is None
    expected = 2 * importances[1] * (params[1].detach() - anchors[1])
    torch.testing.assert_close(params[1].grad, expected)


def test_no_graph_where_nothing_requires_a_gradient(device):
    params, anchors, importances = penalty_lists((Entry((3,)),), device)
    with torch.no_grad():
        assert not ops.quadratic_penalty(params, anchors, importances).requires_grad
    assert not ops.quadratic_penalty([params[0].detach()], anchors, importances).requires_grad


@pytest.mark.parametrize("name", ["anchors", "importances"])
def test_constants_may_not_ask_for_a_gradient(name, device):
    arguments = sample(PENALTY, (Entry((3,)), Entry((3,))), device)
    arguments["params"][0].requires_grad_()
    arguments[name][1].requires_grad_()
    with pytest.raises(ValueError, match=rf"^quadratic_penalty: {name}\[1\] requires grad, expect"):
        PENALTY.kernel(arguments)


def test_state_that_changes_before_backward_is_an_error_not_a_wrong_gradient(device):
    params, anchors, importances = penalty_lists((Entry((3,)),), device)
    value = ops.quadratic_penalty(params, anchors, importances)
    ops.consolidate_importance_(importances, anchors, [torch.ones_like(anchors[0])], params, 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


# ----------------------------------------------------------------------------- torch.compile


@every_op
def test_schema_shape_function_and_tracing(op, device):
    entries = (Entry((3, 2)), Entry((4,), torch.bfloat16), Entry((5,), compact=True))
    arguments = sample(op, entries, device)
    if op is PENALTY:
        for theta in arguments["params"]:
            theta.requires_grad_()
    by_position, by_name = op.split(arguments)
    opcheck(getattr(torch.ops.clext, op.name).default, tuple(by_position), by_name)


@every_op
def test_shape_function_gives_what_the_kernel_gives(op):
    entries = (Entry((3, 2), torch.bfloat16, "transposed"), Entry((4,)), Entry((6,), compact=True))
    if op.mixed_dtypes:
        entries += (Entry((5,), torch.float64),)
    real = sample(op, entries)
    expected, actual = op.kernel(real), op.kernel(sample(op, entries, "meta"))
    if expected is None:
        assert actual is None
        return
    both = [value if isinstance(value, list) else [value] for value in (actual, expected)]
    for left, right in zip(*both, strict=True):
        assert left.device.type == "meta"
        assert (left.shape, left.dtype, left.stride()) == (right.shape, right.dtype, right.stride())


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()


def step(params, anchors, importances, grads):
    """The two ways to a penalty, among ops of torch that a compiler may move about."""
    scaled = [2 * grad for grad in grads]
    added = ops.add_quadratic_penalty_grad_(scaled, params, anchors, importances, 0.25)
    loss = sum((theta.float() ** 2).sum() for theta in params)
    loss = loss + 0.5 * ops.quadratic_penalty(params, anchors, importances)
    return loss, added + 1, [total + grad for total, grad in zip(scaled, grads, strict=True)]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_function_equals_eager(backend, fresh_compiler):
    results = []
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for function in (step, compiled):
        params, anchors, importances = penalty_lists((Entry((3, 2)), Entry((4,), torch.bfloat16)))
        grads = [torch.ones_like(theta).detach() for theta in params]
        loss, added, sums = function(params, anchors, importances, grads)
        loss.backward()
        assert all(torch.equal(grad, torch.ones_like(grad)) for grad in grads)
        results.append([loss, added, *sums, *(theta.grad for theta in params)])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    "op",
    [op for op in OPS if op.name in ("riemannian_walk_step_", "consolidate_all_anchors_")],
    ids=str,
)
def test_compiled_op_changes_the_same_tensors(op, fresh_compiler):
    arguments = sample(op, (Entry((3, 2)), Entry((4,))))
    eager, compiled = copy(arguments), copy(arguments)
    function = torch.compile(getattr(ops, op.name), fullgraph=True, backend="aot_eager")
    expected = outputs_of(op, eager, op.kernel(eager))
    by_position, by_name = op.split(compiled)
    returned = function(*by_position, **by_name)
    assert_same_bits(outputs_of(op, compiled, returned), expected)
