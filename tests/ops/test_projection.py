"""Products of gradients, and the projection: any number of rows, weights of zero or NaN."""

from __future__ import annotations

import pytest
import torch

from clext import ops, reference

SHAPES = [(40, 33), (7,), (), (0, 3), (2051,)]
every_module = pytest.mark.parametrize("module", [ops, reference], ids=["kernel", "reference"])


def make(count, dtype=torch.float32, device="cpu"):
    """`count` rows and a gradient for each shape."""
    generator = torch.Generator().manual_seed(count)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = [torch.randn(count, *s, generator=generator).to(device, wide) for s in SHAPES]
    grads = [torch.randn(s, generator=generator).to(device, dtype) for s in SHAPES]
    return rows, grads


def stacked(rows, grads):
    """One matrix in float64, the gradient last."""
    both = [torch.cat([r.double(), g.double()[None]]) for r, g in zip(rows, grads, strict=True)]
    return torch.cat([entry.reshape(len(entry), entry[0].numel()) for entry in both], dim=1)


@pytest.mark.parametrize(
    ("module", "dtype"),
    [
        *((ops, dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)),
        (reference, torch.float64),
    ],
    ids=["float64", "float32", "bfloat16", "float16", "reference"],
)
def test_products_for_any_number_of_rows(module, dtype, device):
    for count in (0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 64, 80):
        rows, grads = make(count, dtype, device)
        matrix = stacked(rows, grads)
        gram = module.gradient_gram(rows, grads)
        assert gram.dtype == torch.float64
        assert torch.equal(gram, gram.t())
        scale = matrix.norm(dim=1)
        error = (gram - matrix @ matrix.t()).abs() / (scale[:, None] * scale)
        assert error.max() < (1e-14 if dtype == torch.float64 else 1e-6), count


@every_module
def test_no_tensors_have_no_products(module):
    gram = module.gradient_gram([], [])
    assert gram.dtype == torch.float64
    assert gram.tolist() == [[0.0]]


def test_products_that_float32_cannot_hold_are_added_exactly(device):
    """A sum in float32 would stop growing at 2^24."""
    size = 2**24 + 2**16
    one = torch.ones(1, device=device).repeat(size)
    assert ops.gradient_gram([one[None]], [one]).tolist() == [[size, size], [size, size]]


@every_module
def test_a_zero_weight_leaves_its_row_alone_and_nan_does_not(module, device):
    rows, grads = make(3, device=device)
    for entry in rows:
        entry[1] = torch.nan
    expected = [g + 0.5 * r[0] - 2 * r[2] for r, g in zip(rows, grads, strict=True)]
    weights = torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64, device=device)
    module.project_gradient_(grads, rows, weights)
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, want)
    module.project_gradient_(grads, rows, torch.full_like(weights, torch.nan))
    assert all(grad.isnan().all() for grad in grads)


@every_module
def test_weights_of_zero_change_nothing(module, device):
    rows, grads = make(4, torch.bfloat16, device)
    before = [grad.clone() for grad in grads]
    zero = torch.zeros(4, dtype=torch.float64, device=device)
    module.project_gradient_(grads, rows, zero)
    module.project_gradient_(grads, rows, -zero)
    assert all(torch.equal(grad, old) for grad, old in zip(grads, before, strict=True))


@every_module
def test_the_projection_removes_a_conflict(module, device):
    """A-GEM's step: g - (g . r / r . r) r has no part along r."""
    rows, grads = make(1, torch.float64, device)
    gram = module.gradient_gram(rows, grads)
    module.project_gradient_(grads, rows, -gram[:1, 1] / gram[0, 0])
    after = module.gradient_gram(rows, grads)
    assert abs(after[0, 1]) < 1e-12 * gram[0, 0]


def test_rows_and_weights_that_do_not_fit(device):
    rows, grads = make(2, device=device)
    weights = torch.ones(2, dtype=torch.float64, device=device)
    short = [*rows[:1], rows[1][:1], *rows[2:]]
    with pytest.raises(ValueError, match=r"^gradient_gram: rows\[1\] has 1 rows, expected 2 \(as"):
        ops.gradient_gram(short, grads)
    with pytest.raises(ValueError, match=r"^project_gradient_: rows\[1\] has 1 rows, expected 2"):
        ops.project_gradient_(grads, short, weights)
    with pytest.raises(ValueError, match=r"^project_gradient_: weights has shape \[1, 2\]"):
        ops.project_gradient_(grads, rows, weights[None])
    with pytest.raises(TypeError, match=r"^project_gradient_: weights has dtype \S*float32, exp"):
        ops.project_gradient_(grads, rows, weights.float())
    with pytest.raises(ValueError, match=r"rows\[0\] has 1025 rows, expected at most 1024"):
        ops.gradient_gram([torch.ones(1025, 3, device=device)], [torch.ones(3, device=device)])
