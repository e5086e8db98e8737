"""Training steps under real conditions: by a method in either way, and by its slow definition."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from naive_methods import CASES
from toy_training import make_model

from clext import optim

WAYS = ("apart", "fused")
LR = 0.02


class Trained:
    """A method on a model.

    "apart": its own functions around torch's step ("scaled": on gradients that a GradScaler has
    scaled still); "fused": in the pass of an optimizer of clext; "attached" to one of torch's,
    which is told to unscale by GradScaler ("attached in step") or not.
    """

    def __init__(self, case, way="apart", device="cpu", model=None, dtype=torch.float64):
        kind, _, strength, options = CASES[case]
        self.way = way
        self.model = (make_model(dtype) if model is None else model).to(device)
        self.method = kind(self.model, strength=strength, **options)
        self.restart()

    def restart(self):
        """A new optimizer, for the parameters that the model has now."""
        params = list(self.model.parameters())
        if self.way == "fused":
            self.optimizer = optim.Adam(params, lr=LR, method=self.method)
        else:
            fused = True if self.way == "attached in step" else None
            self.optimizer = torch.optim.Adam(params, lr=LR, fused=fused)
        if self.way.startswith("attached"):
            self.method.attach(self.optimizer)

    def backward(self, *batches, scaler=None, autocast=None, clear=True):
        if clear:
            self.optimizer.zero_grad()
        for x, y in batches:
            context = contextlib.nullcontext()
            if autocast is not None:
                context = torch.autocast(x.device.type, dtype=autocast)
            with context:
                loss = F.cross_entropy(self.model(x), y) / len(batches)
            (loss if scaler is None else scaler.scale(loss)).backward()

    def finish(self, clip=None, scaler=None):
        by_hand = self.way in ("apart", "scaled")
        if scaler is not None and self.way == "apart":
            scaler.unscale_(self.optimizer)
        if by_hand:
            self.method.add_penalty_grad_(scaler if self.way == "scaled" else None)
        if self.way == "fused":
            self.optimizer.max_grad_norm = clip
        elif clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        if by_hand:
            self.method.update()

    def step(self, *batches, clip=None, scaler=None, autocast=None):
        """One step on the mean loss of `batches`, clipped to the norm `clip`."""
        self.backward(*batches, scaler=scaler, autocast=autocast)
        self.finish(clip, scaler)

    def end_task(self, batches):
        self.method.consolidate(batches)


class Defined:
    """The same by the method's slow definition, which knows the task's gradient by itself."""

    def __init__(self, case, way="apart", model=None, dtype=torch.float64):
        _, naive, strength, options = CASES[case]
        self.naive = naive(make_model(dtype) if model is None else model, strength)
        for name, value in options.items():
            setattr(self.naive, {"fisher": "kind"}.get(name, name), value)
        # Only where the penalty's gradient is in `.grad` is it clipped with the task's.
        self.clips_pull = way in ("apart", "scaled") or (way == "fused" and options.get("variant"))
        # What is clipped before a method is told of it is the task's gradient to it.
        self.sees_clipped = way.startswith("attached")
        self.model = self.naive.model
        self.restart()

    def restart(self):
        self.optimizer = torch.optim.Adam(self.naive.params, lr=LR)

    def step(self, *batches, clip=None, autocast=None):
        naive, loss = self.naive, 0.0
        for x, y in batches:
            context = contextlib.nullcontext()
            if autocast is not None:
                context = torch.autocast("cpu", dtype=autocast)
            with context:
                loss = loss + F.cross_entropy(self.model(x), y) / len(batches)
        task = naive.gradients(loss)
        pull = naive.gradients(naive.penalty()) if naive.penalty().requires_grad else naive.zeros()
        naive.before_step(task)
        for parameter, own, other in zip(naive.params, task, pull, strict=True):
            parameter.grad = own + other if self.clips_pull else own.clone()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(naive.params, clip)
        if self.sees_clipped:
            naive.before_step([parameter.grad.clone() for parameter in naive.params])
        if not self.clips_pull:
            for parameter, other in zip(naive.params, pull, strict=True):
                parameter.grad += other
        self.optimizer.step()
        naive.after_step()

    def end_task(self, batches):
        self.naive.end_task(batches)


def assert_agree(trained, defined, rtol=1e-7, atol=1e-9):
    """Same parameters, penalty, importance and anchors."""
    method, naive = trained.method, defined.naive
    own = dict(trained.model.named_parameters())

    def compare(got, expected):
        torch.testing.assert_close(got.detach().cpu(), expected.detach(), rtol=rtol, atol=atol)

    trainable = [p for p in own.values() if p.requires_grad]
    for mine, theirs in zip(trainable, naive.params, strict=True):
        compare(mine, theirs)
    compare(method.penalty().double(), naive.penalty().double())
    if method.has_penalty:
        for mine, theirs in zip(method.importance.values(), naive.omega, strict=True):
            compare(mine, theirs)
        if getattr(method, "anchors", "latest") != "all":
            for mine, theirs in zip(method.anchor.values(), naive.anchor, strict=True):
                compare(mine, theirs)
