"""The penalty under torch.func and forward-mode differentiation, against its formula."""

from __future__ import annotations

import pytest
import torch
from op_registry import OPS
from op_samples import Entry, sample
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vmap

from clext import ops

PENALTY = next(op for op in OPS if op.name == "quadratic_penalty")
ENTRIES = (Entry((3, 2), torch.float64, "transposed"), Entry((), torch.float64), Entry((4,)))


@pytest.fixture
def lists(device):
    return list(sample(PENALTY, ENTRIES, device).values())


def written_out(params, anchors, importances):
    terms = zip(params, anchors, importances, strict=True)
    return sum((omega * (theta - anchor) ** 2).sum().double() for theta, anchor, omega in terms)


TRANSFORMS = {
    "grad": lambda f, x, _: grad(f)(x),
    "jvp": lambda f, x, v: jvp(f, (x,), (v,)),
    "vmap": lambda f, x, v: vmap(f)([torch.stack(pair) for pair in zip(x, v, strict=True)]),
    "vmap of grad": lambda f, x, v: vmap(grad(f))(
        [torch.stack(pair) for pair in zip(x, v, strict=True)]
    ),
    "grad of grad": lambda f, x, v: grad(lambda y: dot(grad(f)(y), v))(x),
    "grad of jvp": lambda f, x, v: grad(lambda y: jvp(f, (y,), (v,))[1])(x),
    "hessian": lambda f, x, _: hessian(f)(x),
    "jacrev": lambda f, x, _: jacrev(f)(x),
}


def dot(left, right):
    return sum((a * b).sum().double() for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_see_the_formula(name, lists):
    params, *constants = lists
    tangents = [torch.randn_like(theta) for theta in params]
    got, expected = (
        TRANSFORMS[name](lambda x, f=f: f(x, *constants), params, tangents)
        for f in (ops.quadratic_penalty, written_out)
    )
    left, right = (torch.utils._pytree.tree_leaves(tree) for tree in (got, expected))
    assert len(left) == len(right) > 0
    for mine, theirs in zip(left, right, strict=True):
        tolerance = 1e-12 if mine.dtype == torch.float64 and name != "vmap" else 1e-6
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_forward_mode(lists):
    params, *constants = lists
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(theta, torch.ones_like(theta)) for theta in params]
        tangent = forward_ad.unpack_dual(ops.quadratic_penalty(duals, *constants)).tangent
    slopes = ops.quadratic_penalty_backward(torch.ones_like(tangent), params, *constants)
    assert tangent.item() == pytest.approx(sum(float(slope.sum()) for slope in slopes), rel=1e-6)


def test_state_of_each_batch(lists):
    """Importances may be mapped over too: one penalty for each."""
    params, anchors, importances = lists
    many = [torch.stack([omega, 2 * omega, 0 * omega]) for omega in importances]
    values = vmap(ops.quadratic_penalty, (None, None, 0))(params, anchors, many)
    one = ops.quadratic_penalty(params, anchors, importances)
    torch.testing.assert_close(values, torch.stack([one, 2 * one, 0 * one]))
