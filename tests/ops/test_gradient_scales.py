"""Path integrals of gradients that were clipped, or that belong to a step which was skipped."""

from __future__ import annotations

import pytest
import torch
from helpers import OPS, Entry, assert_same_bits, copy, outputs_of, sample

SEPARATE = [op for op in OPS if op.name in ("accumulate_path_integral_", "riemannian_walk_step_")]
FUSED = [op for op in OPS if op.variant.split()[:1] in (["path"], ["walk"])]
ENTRIES = (
    Entry((5, 3)),
    Entry((1031,), torch.bfloat16),
    Entry((4, 6), torch.float64, "transposed"),
)

every_implementation = pytest.mark.parametrize("implementation", ["kernel", "reference"])


def run(op, arguments, implementation):
    arguments = copy(arguments)
    return outputs_of(op, arguments, getattr(op, implementation)(arguments))


@pytest.mark.parametrize("op", FUSED, ids=str)
@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_clipping_moves_the_parameter_and_the_path_sees_the_whole_gradient(
    op, implementation, dtype, device
):
    """With `clip` the step is that for clip * grads: exact for a power of two."""
    arguments = sample(op, ENTRIES, device)
    clip = torch.tensor(0.25, dtype=dtype, device=device)
    clipped = {**arguments, "grads": [0.25 * grad for grad in arguments["grads"]]}
    expected = run(op, clipped, implementation)
    outputs = run(op, {**arguments, "clip": clip}, implementation)
    follows = ("path", "fisher", "grads")
    rest = {key: value for key, value in expected.items() if not key.startswith(follows)}
    assert_same_bits({key: outputs[key] for key in rest}, rest)
    for i, (before, grad) in enumerate(zip(arguments["path"], arguments["grads"], strict=True)):
        credit = (expected[f"path[{i}]"] - before) / 0.25
        torch.testing.assert_close(outputs[f"path[{i}]"], before + credit, rtol=1e-4, atol=1e-4)
        if arguments["fisher"]:
            old, new, decay = arguments["fisher"][i], grad.to(before), arguments["decay"]
            average = decay * old + (1 - decay) * new.square()
            torch.testing.assert_close(outputs[f"fisher[{i}]"], average)


@pytest.mark.parametrize("op", SEPARATE, ids=str)
@every_implementation
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_skipped_step_leaves_no_trace_and_a_broken_one_does(op, implementation, value, device):
    arguments = sample(op, ENTRIES, device)
    for grad, start, theta in zip(
        arguments["task_grads"], arguments["starts"], arguments["params"], strict=True
    ):
        grad.fill_(value)
        start.copy_(theta)
        start[0] += 1
    outputs = run(op, arguments, implementation)
    for key in ("path", "fisher"):
        for i, entry in enumerate(arguments.get(key, ())):
            moved = arguments["starts"][i] != arguments["params"][i].to(entry.dtype)
            assert bool(moved.any())
            assert not bool(moved.all())
            after = outputs[f"{key}[{i}]"]
            assert torch.equal(after[~moved], entry[~moved])
            assert not after[moved].isfinite().any()
