"""The loop that a framework drives, written out: what its adapter has to equal, to the bit."""

from __future__ import annotations

import contextlib

import torch


def plain_loop(method, optimizer, losses, *, accumulate=1, clip=None, autocast=None):
    """Steps on `losses`, functions that return the loss of a batch each.

    Returns the path integral that SI should have: -sum of the task's gradient, accumulated and
    unclipped, times what the step changed.
    """
    params = list(method.model.parameters())
    path = [torch.zeros_like(entry) for entry in params]
    context = contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    for number, loss in enumerate(losses, start=1):
        with context:
            value = loss()
        (value / accumulate).backward()
        if number % accumulate:
            continue
        gradients = [None if entry.grad is None else entry.grad.clone() for entry in params]
        before = [entry.detach().clone() for entry in params]
        method.add_penalty_grad_()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
        method.update()
        optimizer.zero_grad()
        for sum_, gradient, start, now in zip(path, gradients, before, params, strict=True):
            if gradient is not None:
                sum_ -= gradient * (now.detach() - start)
    return path
