"""Runs of the main job that take a second: the digits and a small model."""

import torch
from torch import nn

import clext

QUICK = {"dataset": "digits", "tasks": 2, "epochs": 2, "progress": False}
SPLIT = {**QUICK, "scenario": "split", "incremental": "class"}


def small() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(x.equal(y) for x, y in zip(a, b, strict=True))


def learn_all_digits(method: str, device: str) -> clext.Result:
    """Two new digits at a time, told apart from all before."""
    options = {**SPLIT, "tasks": 5, "epochs": 4}
    return clext.train(method, model=small(), lr=1e-2, device=device, **options)


def learn_beside_ewc_in_bf16(rehearsal: clext.Method, incremental: str = "class") -> clext.Result:
    """`rehearsal` was made on `small()`."""
    method = clext.EWC(rehearsal.model).combine(rehearsal)
    options = {**SPLIT, "incremental": incremental, "precision": "bf16"}
    return clext.train(method, device="cpu", lr=1e-2, **options)
