"""The importances as their definitions say, one sample at a time: slow and obvious.

Without cuDNN, whose recurrent layers have no backward pass in eval mode.
"""

from __future__ import annotations

import torch
from importance_models import CLASSES


def samples_of(model, batches):
    device = next(model.parameters()).device
    for x, y in batches:
        for n in range(len(x)):
            yield x[n : n + 1].to(device), y[n : n + 1].to(device)


def gradients_of(value, params):
    found = torch.autograd.grad(value, params, allow_unused=True, retain_graph=True)
    return [
        torch.zeros_like(p) if g is None else g.to_dense()
        for p, g in zip(params, found, strict=True)
    ]


def mean(lists):
    """The mean of several gradient lists."""
    return [sum(entries) / len(lists) for entries in zip(*lists, strict=True)]


@torch.backends.cudnn.flags(enabled=False)
def fisher_oracle(model, params, batches, *, exact=False, reverse=False):
    model.eval()
    terms = []
    for x, y in samples_of(model, batches):
        log_p = (-model(x) if reverse else model(x)).log_softmax(1)[0]
        p = log_p.detach().exp().tolist()
        labels = range(CLASSES) if exact else [int(y)]
        weights = [p[k] if exact else 1.0 for k in labels]
        squares = [[g.square() for g in gradients_of(log_p[k], params)] for k in labels]
        terms.append(
            [
                sum(w * s for w, s in zip(weights, entry, strict=False))
                for entry in zip(*squares, strict=False)
            ]
        )
    return mean(terms)


@torch.backends.cudnn.flags(enabled=False)
def mas_oracle(model, params, batches):
    model.eval()
    return mean(
        [
            [g.abs() for g in gradients_of(model(x).square().sum(), params)]
            for x, _ in samples_of(model, batches)
        ]
    )


@torch.backends.cudnn.flags(enabled=False)
def jacobian_oracle(model, params, batches):
    """[outputs][parameter]: derivatives of the mean output."""
    model.eval()
    return [
        mean([gradients_of(model(x)[0, k], params) for x, _ in samples_of(model, batches)])
        for k in range(CLASSES)
    ]


def scp_oracle(model, params, batches):
    jacobian = jacobian_oracle(model, params, batches)
    return [sum(g.square() for g in rows) / CLASSES for rows in zip(*jacobian, strict=True)]


def assert_close(got, expected, rtol=1e-9):
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=rtol, atol=1e-12 + rtol * 1e-3)
