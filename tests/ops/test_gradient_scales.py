"""What the ops of path integrals know of gradients that were scaled, skipped or lost."""

from __future__ import annotations

import pytest
import torch
from helpers import OPS, Entry, assert_same_bits, copy, outputs_of, sample, tensors_of
from plan_problem import Problem

SEPARATE = [op for op in OPS if op.name in ("accumulate_path_integral_", "riemannian_walk_step_")]
FUSED = [op for op in OPS if op.variant.split()[:1] in (["path"], ["walk"])]
ENTRIES = (
    Entry((5, 3)),
    Entry((1031,), torch.bfloat16),
    Entry((4, 6), torch.float64, "transposed"),
)

every_separate = pytest.mark.parametrize("op", SEPARATE, ids=str)
every_fused = pytest.mark.parametrize("op", FUSED, ids=str)
every_op = pytest.mark.parametrize("op", [*SEPARATE, *FUSED], ids=str)
every_implementation = pytest.mark.parametrize("implementation", ["kernel", "reference"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def run(op, arguments, implementation):
    arguments = copy(arguments)
    return outputs_of(op, arguments, getattr(op, implementation)(arguments))


def close(outputs, expected, names):
    chosen = [key for key in expected if key.startswith(names)]
    assert chosen
    for key in chosen:
        torch.testing.assert_close(outputs[key], expected[key], rtol=1e-5, atol=1e-5)


def test_there_are_ops_to_test():
    assert len(SEPARATE) == 2
    assert {op.name for op in FUSED} == {"sgd_step_", "adam_step_"}


@every_separate
@every_implementation
@every_dtype
def test_both_shares_of_a_gradient_are_scaled_back(op, implementation, dtype, device):
    """`grads` are 0.25 of the task's gradient and 0.5 of the penalty's."""
    arguments = sample(op, ENTRIES, device)
    expected = run(op, arguments, implementation)
    scaled = copy(arguments)
    for i, grad in enumerate(arguments["grads"]):
        distance = arguments["previous"][i] - arguments["anchors"][i]
        pull = 2 * arguments["strength"] * arguments["importances"][i] * distance
        value = 0.25 * (grad.to(pull.dtype) - pull) + 0.5 * pull
        scaled["grads"][i] = value if grad.dtype != torch.bfloat16 else value.to(grad.dtype)
    scaled["task_scale"] = torch.tensor(0.25, dtype=dtype, device=device)
    scaled["pull_scale"] = torch.tensor([0.5], dtype=dtype, device=device)
    outputs = run(op, scaled, implementation)
    for i in (0, 2):  # bfloat16 has lost the share of the penalty
        close(outputs, expected, (f"path[{i}]", f"fisher[{i}]"))
    close(outputs, expected, "previous")


@every_separate
@every_dtype
def test_scaled_gradients_by_both_implementations(op, dtype, device):
    arguments = sample(op, ENTRIES, device)
    arguments["task_scale"] = torch.tensor(0.3, dtype=dtype, device=device)
    arguments["pull_scale"] = torch.tensor(0.7, dtype=dtype, device=device)
    expected = run(op, arguments, "reference")
    close(run(op, arguments, "kernel"), expected, tuple(expected))


@every_fused
@every_implementation
@every_dtype
def test_the_step_is_for_the_clipped_gradient_and_the_path_for_the_other(
    op, implementation, dtype, device
):
    arguments = sample(op, ENTRIES, device)
    plain = run(op, arguments, implementation)
    scale = torch.tensor(0.25, dtype=dtype, device=device)
    outputs = run(op, {**arguments, "task_scale": scale}, implementation)
    follows = ("path", "fisher")
    rest = {key: value for key, value in plain.items() if not key.startswith(follows)}
    assert_same_bits({key: outputs[key] for key in rest}, rest)
    for i, (before, grad) in enumerate(zip(arguments["path"], arguments["grads"], strict=True)):
        credit = (plain[f"path[{i}]"] - before) / 0.25
        torch.testing.assert_close(outputs[f"path[{i}]"], before + credit, rtol=1e-4, atol=1e-4)
        if arguments["fisher"]:
            old, new = arguments["fisher"][i], (4 * grad.to(before.dtype)).square()
            decay = arguments["decay"]
            torch.testing.assert_close(outputs[f"fisher[{i}]"], decay * old + (1 - decay) * new)


@every_op
@every_implementation
@pytest.mark.parametrize("value", [0.0, torch.inf])
def test_a_gradient_clipped_to_nothing_teaches_nothing(op, implementation, value, device):
    arguments = sample(op, ENTRIES, device)
    for grad in arguments["grads"]:
        grad.zero_()
    scale = torch.tensor(value, device=device)
    outputs = run(op, {**arguments, "task_scale": scale}, implementation)
    before = tensors_of(arguments)
    kept = {key: before[key] for key in outputs if key.startswith(("path", "fisher"))}
    assert_same_bits({key: outputs[key] for key in kept}, kept)


@every_separate
@every_implementation
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_skipped_step_leaves_no_trace_and_a_broken_one_does(op, implementation, value, device):
    arguments = sample(op, ENTRIES, device)
    for grad, before, theta in zip(
        arguments["grads"], arguments["previous"], arguments["params"], strict=True
    ):
        grad.fill_(value)
        before.copy_(theta)
        before[0] += 1
    outputs = run(op, arguments, implementation)
    for key in ("path", "fisher"):
        for i, entry in enumerate(arguments.get(key, ())):
            moved = arguments["previous"][i] != arguments["params"][i].to(entry.dtype)
            assert bool(moved.any())
            assert not bool(moved.all())
            after = outputs[f"{key}[{i}]"]
            assert torch.equal(after[~moved], entry[~moved])
            assert not after[moved].isfinite().any()


@every_op
@every_implementation
def test_scales_that_do_not_fit_are_refused(op, implementation, device):
    arguments = sample(op, ENTRIES, device)
    before = copy(arguments)
    names = [name for name in ("task_scale", "pull_scale") if name in arguments]
    for name in names:
        for scale, message, error in (
            (torch.ones(2, device=device), r"shape \[2\], expected one element", ValueError),
            (torch.ones((), device=device).half(), "dtype .*expected float32 or", TypeError),
        ):
            with pytest.raises(error, match=f"^{op.name}: {name} has {message}"):
                getattr(op, implementation)({**arguments, name: scale})
        if device != "cpu":
            with pytest.raises(ValueError, match=f"{op.name}: {name} is on cpu, expected cuda"):
                getattr(op, implementation)({**arguments, name: torch.ones(())})
    assert_same_bits(tensors_of(arguments), tensors_of(before))


# ------------------------------------------------------------------ the stamp of gradients


@pytest.mark.parametrize("implementation", ["compiled", "reference"])
def test_the_stamp_tells_changed_gradients_from_read_ones(implementation, device):
    problem = Problem(implementation, device)
    problem.backward(1)
    plan, first = problem.plan, problem.params[0]
    stamp = plan.gradient_stamp()
    assert plan.gradient_stamp() == stamp
    problem.optimize()  # reads the gradients and changes the parameters
    plan.accumulate_path_integral_(0.5)
    assert plan.gradient_stamp() == stamp
    stamps = {stamp}
    changes = (
        lambda: first.grad.mul_(2),
        lambda: setattr(first, "grad", first.grad.clone()),
        lambda: setattr(first, "grad", None),
        lambda: setattr(problem.params[1], "grad", torch.zeros_like(problem.params[1])),
        lambda: plan.add_quadratic_penalty_grad_(0.5),
    )
    kept = []  # so that no gradient gets the memory of another
    for change in changes:
        kept.extend(theta.grad for theta in problem.params)
        change()
        stamps.add(plan.gradient_stamp())
    assert len(stamps) == 1 + len(changes)
