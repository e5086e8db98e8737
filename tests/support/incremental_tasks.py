"""Three tasks of two classes in each incremental setting, a model for them, and a loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clext import optim

FEATURES, CLASSES, TASKS, STEPS, BATCH = 5, 2, 3, 4, 6
INCREMENTAL = ("task", "domain", "class")

every_incremental = pytest.mark.parametrize("incremental", INCREMENTAL)


def make_model(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, CLASSES * TASKS)).to(dtype)


def make_task(number, incremental, device="cpu", dtype=torch.float64):
    """Examples with local labels, the task's outputs, and those that compete."""
    random = torch.Generator().manual_seed(50 + number)
    inputs = torch.rand(STEPS * BATCH, FEATURES, generator=random, dtype=torch.float64)
    labels = torch.randint(CLASSES, (len(inputs),), generator=random)
    first = CLASSES * number
    block = range(CLASSES * TASKS) if incremental == "domain" else range(first, first + CLASSES)
    active = {"task": block, "domain": None, "class": range(block.stop)}[incremental]
    local = labels + first if incremental == "class" else labels
    return (inputs.to(device, dtype), local.to(device)), block, active


def rows():
    return torch.arange(STEPS * BATCH).split(BATCH)


def begin(method, number, incremental, own_loop=False):
    """What a task is trained on; with `own_loop` by someone who calls `begin_task` without it."""
    parameter = next(method.model.parameters())
    examples, block, active = make_task(number, incremental, parameter.device, parameter.dtype)
    began = method.begin_task(None if own_loop else examples, block=block, active=active)
    return examples if began is None else began


def train_task(method, number, incremental, *, own_loop=False, autocast=False):
    """One epoch; returns the losses."""
    examples = begin(method, number, incremental, own_loop)
    losses = take_steps(method, examples, rows(), autocast=autocast)
    method.consolidate([tuple(examples[:2])])
    return losses


def take_steps(method, examples, batches, optimizer=None, autocast=False):
    optimizer = optimizer or optim.Adam(method.model.parameters(), lr=0.02, method=method)
    losses = []
    for batch in batches:
        with torch.autocast(examples[0].device.type, torch.bfloat16, enabled=autocast):
            loss = method.loss(*(entry[batch.to(entry.device)] for entry in examples))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def naive_heads(incremental, number):
    """For each earlier head: the outputs of the model, and those that the old model knew."""
    if incremental == "task":
        blocks = [range(CLASSES * k, CLASSES * (k + 1)) for k in range(number)]
        return [(block, block) for block in blocks]
    if incremental == "class":
        return [(range(CLASSES * (number + 1)), range(CLASSES * number))]
    return [(range(CLASSES * TASKS), range(CLASSES * TASKS))]


def naive_distillation(logits, teacher, heads, temperature, scale):
    """One loss for each head; example by example and class by class."""
    losses = []
    for now, then in heads:
        total = 0.0
        for row, old in zip(logits, teacher, strict=True):
            soft = {c: (old[c] / temperature).exp() for c in then}
            mine = {c: (row[c] / temperature).exp() for c in now}
            for c in then:
                p, q = soft[c] / sum(soft.values()), mine[c] / sum(mine.values())
                total = total - p * q.log()
        factors = {"squared": temperature**2, "mean": temperature**2 / len(now), "none": 1}
        losses.append(total / len(logits) * factors[scale])
    return losses


def naive_balance(current, losses, number, balance, strength):
    if balance == "sum":
        return current + strength * sum(losses)
    k = number + 1
    return current / k + strength * (1 - 1 / k) * sum(losses) / len(losses)
