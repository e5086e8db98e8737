"""Models with frozen, tied and unused parameters, and with a head that grows; their tasks."""

from __future__ import annotations

import copy

import torch
from condition_loops import Defined, Trained
from torch import nn
from toy_training import CLASSES, FEATURES, make_model, make_task


def run_task(number, *loops, labels=0):
    for loop in loops:
        device = next(loop.model.parameters()).device
        batches = [(x.to(device), y.to(device) + labels) for x, y in make_task(number)]
        for batch in batches:
            loop.step(batch)
        loop.end_task(batches)


def twins(case, way, device, model):
    return Trained(case, way, device, copy.deepcopy(model)), Defined(case, way, model)


def frozen():
    model = make_model()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.first.weight
        self.head = nn.Linear(FEATURES, CLASSES)
        self.double()

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Spare(nn.Module):
    """A part that is never used."""

    def __init__(self):
        super().__init__()
        self.spare, self.used = nn.Linear(3, 3).double(), make_model()

    def forward(self, x):
        return self.used(x)


def grow(model):
    """Two more classes; the old rows go on."""
    old, device = model[2], model[2].weight.device
    model[2] = nn.Linear(6, CLASSES + 2, device=device, dtype=torch.float64)
    with torch.no_grad():
        model[2].weight.fill_(0.25)[:CLASSES] = old.weight
        model[2].bias.fill_(-0.5)[:CLASSES] = old.bias


def grow_naive(naive):
    """Every list of the definition: zeros for new rows, and where they start for anchors."""
    naive.params = list(naive.model.parameters())

    def padded(tensors, anew):
        for index, parameter in enumerate(naive.params):
            old = tensors[index]
            tensors[index] = (parameter.detach() if anew else torch.zeros_like(parameter)).clone()
            tensors[index][tuple(map(slice, old.shape))] = old

    for fisher, anchor in getattr(naive, "old_tasks", []):
        padded(fisher, anew=False)
        padded(anchor, anew=True)
    for key, value in vars(naive).items():
        if key not in ("params", "old_tasks", "grads", "old") and isinstance(value, list):
            padded(value, anew=key in ("anchor", "start"))
