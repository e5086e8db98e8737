"""The ops in plain torch against their formulas, one element at a time in Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from op_arguments import ROWS, ListArg
from op_registry import OPS
from op_samples import Entry, copy, outputs_of, sample, state_dtype

from clext import reference

ENTRIES = (
    Entry((3, 4)),
    Entry((5,)),
    Entry(()),
    Entry((2, 0)),
    Entry((2, 3, 2, 2), layout="channels_last"),
)
DTYPES = (torch.float64, torch.bfloat16)
BY_NAME = {str(op): op for op in OPS}


# What becomes of one element of each written list, and its share of what is returned.
FORMULAS = {
    "quadratic_penalty": lambda params, anchors, importances: {
        "returns": importances * (params - anchors) ** 2
    },
    "add_quadratic_penalty_grad_": lambda grads, params, anchors, importances, strength: {
        "grads": grads + 2 * strength * importances * (params - anchors),
        "returns": strength * importances * (params - anchors) ** 2,
    },
    "accumulate_path_integral_": lambda path, params, starts, task_grads: {
        "path": path - task_grads * (params - starts)
    },
    "riemannian_walk_step_": lambda path, fisher, params, starts, task_grads, decay: {
        "path": path - task_grads * (params - starts),
        "fisher": decay * fisher + (1 - decay) * task_grads**2,
    },
    "accumulate_riemannian_walk_score_": (
        lambda task_score, path, interval_start, fisher, params, eps: {
            "task_score": task_score
            + max(0.0, path) / (0.5 * fisher * (params - interval_start) ** 2 + eps),
            "path": 0.0,
            "interval_start": params,
        }
    ),
    "accumulate_square_": lambda acc, grads, scale: {"acc": acc + scale * grads**2},
    "accumulate_abs_": lambda acc, grads, scale: {"acc": acc + scale * abs(grads)},
    "consolidate_importance_": lambda importances, estimate, params, gamma, **_: {
        "importances": gamma * importances + estimate,
        "anchors": params,
    },
    "consolidate_path_integral_": lambda importances, anchors, path, params, xi, **_: {
        "importances": importances + max(0.0, path) / ((params - anchors) ** 2 + xi),
        "anchors": params,
        "path": 0.0,
    },
    "consolidate_path_integral_ clamp_total": (
        lambda importances, anchors, path, params, xi, **_: {
            "importances": max(0.0, importances + path / ((params - anchors) ** 2 + xi)),
            "anchors": params,
            "path": 0.0,
        }
    ),
}


def arguments_of(op, dtype):
    entries = [Entry(entry.shape, dtype, entry.layout) for entry in ENTRIES]
    return sample(op, tuple(entries))


def numbers(tensors):
    """All elements as Python floats, in the shapes' own order."""
    return [value for tensor in tensors for value in tensor.detach().double().flatten().tolist()]


def close(expected, dtype, stored=False):
    """Arithmetic in float32 or float64; `stored`: rounded to the parameter's own dtype."""
    eps = torch.finfo(dtype if stored else state_dtype(dtype)).eps
    return pytest.approx(expected, rel=100 * eps, abs=100 * eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name, dtype):
    op = BY_NAME[name]
    arguments = arguments_of(op, dtype)
    lists = [arg.name for arg in op.args if isinstance(arg, ListArg)]
    constants = {key: value for key, value in arguments.items() if key not in lists}
    rows = zip(*(numbers(arguments[key]) for key in lists), strict=True)
    expected = [FORMULAS[name](**dict(zip(lists, row, strict=True)), **constants) for row in rows]
    value = op.reference(arguments)
    for key in op.written:
        stored = key == "grads"
        assert numbers(arguments[key]) == close([row[key] for row in expected], dtype, stored), key
    if "returns" in expected[0]:
        assert value.shape == ()
        assert value.dtype == state_dtype(dtype)
        assert value.item() == close(sum(row["returns"] for row in expected), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_the_penalty(dtype):
    op = BY_NAME["quadratic_penalty_backward"]
    arguments = arguments_of(op, dtype)
    lists = [numbers(arguments[key]) for key in ("params", "anchors", "importances")]
    factor = 2 * arguments["grad"].item()
    expected = [factor * w * (p - a) for p, a, w in zip(*lists, strict=True)]
    grads = op.reference(arguments)
    assert numbers(grads) == close(expected, dtype, stored=True)
    for grad, theta in zip(grads, arguments["params"], strict=True):
        assert (grad.dtype, grad.stride()) == (theta.dtype, theta.stride())


def test_the_penalty_is_differentiable_when_called_directly():
    params, anchors, importances = arguments_of(BY_NAME["quadratic_penalty"], DTYPES[0]).values()
    params = [theta.requires_grad_() for theta in params]
    assert torch.autograd.gradcheck(
        lambda *p: reference.quadratic_penalty(p, anchors, importances), params
    )


def test_sliced_importance_sums_squared_projections():
    op = BY_NAME["sliced_importance_"]
    arguments = arguments_of(op, torch.float64)
    before = numbers(arguments["acc"])
    jacobian = [numbers(rows[k] for rows in arguments["jacobian"]) for k in range(ROWS)]
    op.reference(arguments)
    for acc, old, column in zip(
        numbers(arguments["acc"]), before, zip(*jacobian, strict=True), strict=True
    ):
        projections = [
            sum(x * j for x, j in zip(xi, column, strict=True))
            for xi in arguments["slices"].tolist()
        ]
        expected = old + arguments["scale"] * sum(p * p for p in projections)
        assert acc == close(expected, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_anchors_keep_the_sum_of_quadratics(dtype):
    """At any point, the tasks' penalties are the merged one and the constant."""
    op = BY_NAME["consolidate_all_anchors_"]
    arguments = arguments_of(op, dtype)
    for free in ("importances", "estimate"):
        arguments[free][0][0] = 0.0  # nothing important here, before or now
    before = copy(arguments, torch.float64)
    added = op.reference(arguments).item()
    merged, centers = numbers(arguments["importances"]), numbers(arguments["anchors"])
    old = [numbers(before[key]) for key in ("importances", "anchors", "estimate", "params")]
    for total, center, (_w, _a, _f, p) in zip(merged, centers, zip(*old, strict=True), strict=True):
        assert math.isfinite(center)
        assert total > 0 or center == close(p, dtype)
    gamma = arguments["gamma"]
    for probe in (-2.0, 0.0, 1.3):
        expected = sum(
            gamma * w * (probe - a) ** 2 + f * (probe - p) ** 2
            for w, a, f, p in zip(*old, strict=True)
        )
        left = sum(w * (probe - a) ** 2 for w, a in zip(merged, centers, strict=True))
        assert left + added == close(expected, dtype)


@pytest.mark.parametrize("nothing_learned", [False, True])
def test_the_end_of_a_walk_normalises_over_all_tensors(nothing_learned):
    op = BY_NAME["consolidate_riemannian_walk_"]
    arguments = arguments_of(op, torch.float64)
    if nothing_learned:
        for key in ("score", "task_score", "fisher"):
            torch._foreach_zero_(arguments[key])
    before = copy(arguments)
    op.reference(arguments)
    mix, lists = arguments["mix"], (before["score"], before["task_score"])
    merged = [(1 - mix) * s + mix * t for s, t in zip(*map(numbers, lists), strict=True)]
    fisher = numbers(before["fisher"])
    top_score, top_fisher = max(merged) or 1.0, max(fisher) or 1.0
    expected = [f / top_fisher + s / top_score for f, s in zip(fisher, merged, strict=True)]
    assert numbers(arguments["importances"]) == close(expected, torch.float64)
    assert numbers(arguments["score"]) == close(merged, torch.float64)
    assert not any(numbers(arguments["task_score"]))
    assert numbers(arguments["anchors"]) == numbers(before["params"])


def test_empty_lists_give_zero_or_nothing():
    for op in OPS:
        if not op.fused:
            for tensor in outputs_of(op, empty := sample(op, ()), op.reference(empty)).values():
                assert not tensor.any()
