"""The ops in plain torch against their formulas, one element at a time in Python floats."""

from __future__ import annotations

import math

import pytest
import torch

from clext import reference
from clext.core.lists import state_dtype

SHAPES = [(3, 4), (5,), (), (2, 0), (2, 3, 2, 2)]
DTYPES = [torch.float64, torch.bfloat16]


def tolerance(dtype):
    return 1e-12 if dtype == torch.float64 else 2e-6


def make_params(dtype, device):
    """Parameters in several shapes, the last one channels_last."""
    params = [torch.randn(shape).to(device, dtype) for shape in SHAPES]
    params[-1] = params[-1].to(memory_format=torch.channels_last)
    return params


def like(params, *, positive=False):
    """A state list for `params`."""
    lists = []
    for entry in params:
        values = torch.rand(entry.shape) + 0.1 if positive else torch.randn(entry.shape)
        lists.append(torch.empty_like(entry, dtype=state_dtype(entry.dtype)).copy_(values))
    return lists


def grads_of(params):
    return [torch.empty_like(entry).copy_(torch.randn(entry.shape)) for entry in params]


def elements(*lists):
    """Element by element, the values of all lists as Python floats, in the shapes' own order."""
    columns = [
        [v for t in entry for v in t.detach().double().flatten().tolist()] for entry in lists
    ]
    return list(zip(*columns, strict=True))


def assert_elements(tensors, expected, rtol):
    got = [value for tensor in tensors for value in tensor.double().flatten().tolist()]
    assert got == pytest.approx(list(expected), rel=rtol, abs=rtol)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def params(dtype, device):
    return make_params(dtype, device)


def test_penalty_is_the_weighted_sum_of_squares(params, dtype):
    anchors, importances = like(params), like(params, positive=True)
    value = reference.quadratic_penalty(params, anchors, importances)
    expected = sum(w * (p - a) ** 2 for p, a, w in elements(params, anchors, importances))
    assert value.shape == ()
    assert value.dtype == state_dtype(dtype)
    assert value.item() == pytest.approx(expected, rel=10 * tolerance(dtype))


def test_penalty_is_float64_if_one_entry_is(device):
    params = [torch.randn(2, device=device), torch.randn(3, device=device, dtype=torch.float64)]
    value = reference.quadratic_penalty(params, like(params), like(params))
    assert value.dtype == torch.float64


def test_penalty_backward_is_its_derivative(params, dtype):
    anchors, importances = like(params), like(params, positive=True)
    grad = torch.tensor(1.5, dtype=state_dtype(dtype), device=params[0].device)
    grads = reference.quadratic_penalty_backward(grad, params, anchors, importances)
    expected = [3.0 * w * (p - a) for p, a, w in elements(params, anchors, importances)]
    assert all(
        g.dtype == dtype and g.stride() == p.stride() for g, p in zip(grads, params, strict=False)
    )
    rounding = torch.finfo(dtype).eps
    assert_elements(grads, expected, max(rounding, tolerance(dtype)))


def test_penalty_is_differentiable_when_called_directly(device):
    params = [p.requires_grad_() for p in make_params(torch.float64, device)]
    anchors, importances = like(params), like(params, positive=True)
    assert torch.autograd.gradcheck(
        lambda *p: reference.quadratic_penalty(p, anchors, importances), params
    )


def test_add_penalty_grad_adds_gradient_and_returns_value(params, dtype):
    anchors, importances, grads = like(params), like(params, positive=True), grads_of(params)
    before = elements(grads, params, anchors, importances)
    value = reference.add_quadratic_penalty_grad_(grads, params, anchors, importances, 0.7)
    assert value.item() == pytest.approx(
        0.7 * sum(w * (p - a) ** 2 for _, p, a, w in before), rel=10 * tolerance(dtype)
    )
    expected = [g + 1.4 * w * (p - a) for g, p, a, w in before]
    assert_elements(grads, expected, max(torch.finfo(dtype).eps, tolerance(dtype)))


def test_path_integral_is_the_task_gradient_along_the_step(params, dtype):
    path, starts, task_grads = like(params), like(params), like(params)
    before = elements(path, params, starts, task_grads)
    reference.accumulate_path_integral_(path, params, starts, task_grads)
    expected = [s - g * (p - q) for s, p, q, g in before]
    assert_elements(path, expected, 10 * tolerance(dtype))


def test_riemannian_walk_step_averages_the_squared_task_gradient(params, dtype):
    path, fisher = like(params), like(params, positive=True)
    starts, task_grads = like(params), like(params)
    before = elements(path, fisher, params, starts, task_grads)
    reference.riemannian_walk_step_(path, fisher, params, starts, task_grads, 0.9)
    rtol = 20 * tolerance(dtype)
    assert_elements(path, [s - g * (p - q) for s, _, p, q, g in before], rtol)
    assert_elements(fisher, [0.9 * f + 0.1 * g * g for _, f, _, _, g in before], rtol)


def test_riemannian_walk_score_counts_only_falls_of_the_loss(params, dtype):
    score, path, start = like(params, positive=True), like(params), like(params)
    fisher = like(params, positive=True)
    before = elements(score, path, start, fisher, params)
    reference.accumulate_riemannian_walk_score_(score, path, start, fisher, params, 1e-2)
    expected = [s + max(0.0, g) / (0.5 * f * (p - b) ** 2 + 1e-2) for s, g, b, f, p in before]
    assert_elements(score, expected, 100 * tolerance(dtype))
    assert_elements(path, [0.0] * len(before), 0.0)
    assert_elements(start, [p for *_, p in before], 0.0)


@pytest.mark.parametrize(
    ("op", "power"),
    [(reference.accumulate_square_, lambda g: g * g), (reference.accumulate_abs_, abs)],
)
def test_accumulate_square_and_abs(params, dtype, op, power):
    acc, grads = like(params, positive=True), grads_of(params)
    before = elements(acc, grads)
    op(acc, grads, 0.25)
    assert_elements(acc, [s + 0.25 * power(g) for s, g in before], tolerance(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str, indirect=True)
def test_sliced_importance_sums_squared_projections(params, dtype):
    acc = like(params, positive=True)
    jacobian = [torch.randn(3, *entry.shape, dtype=dtype, device=entry.device) for entry in acc]
    slices = torch.randn(4, 3, dtype=dtype, device=params[0].device)
    rows = elements(*[[entry[k] for entry in jacobian] for k in range(3)])
    expected = [
        s
        + 0.5
        * sum(sum(x * j for x, j in zip(xi, row, strict=False)) ** 2 for xi in slices.tolist())
        for (s,), row in zip(elements(acc), rows, strict=False)
    ]
    reference.sliced_importance_(acc, jacobian, slices, 0.5)
    assert_elements(acc, expected, 20 * tolerance(dtype))


def test_consolidate_importance_decays_adds_and_anchors(params, dtype):
    importances, anchors = like(params, positive=True), like(params)
    estimate = like(params, positive=True)
    before = elements(importances, estimate, params)
    reference.consolidate_importance_(importances, anchors, estimate, params, 0.8)
    assert_elements(importances, [0.8 * w + f for w, f, _ in before], tolerance(dtype))
    assert_elements(anchors, [p for *_, p in before], 0.0)


def test_consolidate_all_anchors_keeps_the_sum_of_quadratics(params, dtype):
    importances, anchors = like(params, positive=True), like(params)
    estimate = like(params, positive=True)
    for free in (importances, estimate):
        free[0][0] = 0.0  # nothing important here, before or now
    before = elements(importances, anchors, estimate, params)
    added = reference.consolidate_all_anchors_(importances, anchors, estimate, params, 0.8)
    after = elements(importances, anchors)
    for (_w, _a, _f, p), (total, center) in zip(before, after, strict=True):
        assert math.isfinite(center)
        if total == 0:
            assert center == pytest.approx(p, rel=1e-5)
    rtol = 1e-10 if dtype == torch.float64 else 1e-4
    for probe in (-2.0, 0.0, 1.3):
        expected = sum(0.8 * w * (probe - a) ** 2 + f * (probe - p) ** 2 for w, a, f, p in before)
        merged = sum(total * (probe - center) ** 2 for total, center in after)
        assert merged + added.item() == pytest.approx(expected, rel=rtol)


def test_consolidate_path_integral_takes_negative_contributions_from_the_total(params, dtype):
    importances, anchors, path = like(params, positive=True), like(params), like(params)
    before = elements(importances, anchors, path, params)
    reference.consolidate_path_integral_(importances, anchors, path, params, 0.1, clamp_total=True)
    expected = [max(0.0, w + s / ((p - a) ** 2 + 0.1)) for w, a, s, p in before]
    assert 0.0 in expected
    assert any(0 < new < w for new, (w, *_) in zip(expected, before, strict=True))
    assert_elements(importances, expected, 100 * tolerance(dtype))
    assert_elements(anchors, [p for *_, p in before], 0.0)
    assert_elements(path, [0.0] * len(before), 0.0)


def test_consolidate_path_integral_drops_negative_contributions(params, dtype):
    importances, anchors, path = like(params, positive=True), like(params), like(params)
    before = elements(importances, anchors, path, params)
    reference.consolidate_path_integral_(importances, anchors, path, params, 0.1)
    expected = [w + max(0.0, s) / ((p - a) ** 2 + 0.1) for w, a, s, p in before]
    assert_elements(importances, expected, 10 * tolerance(dtype))
    assert_elements(anchors, [p for *_, p in before], 0.0)
    assert_elements(path, [0.0] * len(before), 0.0)


@pytest.mark.parametrize("nothing_learned", [False, True])
def test_consolidate_riemannian_walk_normalises_over_all_tensors(params, dtype, nothing_learned):
    importances, anchors = like(params), like(params)
    score, task_score = like(params, positive=True), like(params, positive=True)
    fisher = like(params, positive=True)
    if nothing_learned:
        for entry in (*score, *task_score, *fisher):
            entry.zero_()
    before = elements(score, task_score, fisher, params)
    reference.consolidate_riemannian_walk_(
        importances, anchors, score, task_score, fisher, params, 0.25
    )
    merged = [0.75 * s + 0.25 * t for s, t, _, _ in before]
    top_score, top_fisher = max(merged) or 1.0, max(f for _, _, f, _ in before) or 1.0
    expected = [
        f / top_fisher + s / top_score for s, (_, _, f, _) in zip(merged, before, strict=False)
    ]
    assert_elements(importances, expected, 10 * tolerance(dtype))
    assert_elements(score, merged, tolerance(dtype))
    assert_elements(task_score, [0.0] * len(before), 0.0)
    assert_elements(anchors, [p for *_, p in before], 0.0)


def test_empty_lists_give_zero_or_nothing():
    assert reference.quadratic_penalty([], [], []).item() == 0
    assert reference.quadratic_penalty_backward(torch.tensor(1.0), [], [], []) == []
    assert reference.add_quadratic_penalty_grad_([], [], [], [], 1.0).item() == 0
    assert reference.consolidate_all_anchors_([], [], [], [], 1.0).item() == 0
    reference.consolidate_riemannian_walk_([], [], [], [], [], [], 0.5)


def test_ops_read_parameters_that_require_grad(device):
    params = [torch.randn(3, device=device, requires_grad=True)]
    path = like(params)
    reference.accumulate_path_integral_(path, params, like(params), like(params))
    assert not path[0].requires_grad
