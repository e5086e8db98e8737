"""Small tasks in each incremental setting, for methods that learn from what they keep."""

from __future__ import annotations

import torch
from torch import nn

FEATURES, CLASSES, TASKS, EXAMPLES = 5, 2, 3, 12
SETTINGS = ("task", "domain", "class")


def make_model(setting, dtype=torch.float64, device="cpu"):
    torch.manual_seed(1)
    outputs = CLASSES if setting == "domain" else TASKS * CLASSES
    model = nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, outputs))
    return model.to(device, dtype)


def ranges(setting, number):
    """Block and active outputs of a task."""
    if setting == "domain":
        return range(CLASSES), None
    block = range(number * CLASSES, (number + 1) * CLASSES)
    return block, (block if setting == "task" else range(block.stop))


def make_examples(setting, number, dtype=torch.float64, device="cpu"):
    """Inputs and local labels of a task, each class in it; classes lie apart."""
    random = torch.Generator().manual_seed(50 + number)
    labels = torch.arange(CLASSES).repeat(EXAMPLES // CLASSES)
    inputs = torch.randn(EXAMPLES, FEATURES, generator=random, dtype=torch.float64)
    inputs[:, number] += 2.0 * labels
    block, active = ranges(setting, number)
    local = labels + (0 if active is None else block.start - active.start)
    return inputs.to(device, dtype), local.to(device)


def start(setting, number):
    """What has to be added to the local labels of a task."""
    active = ranges(setting, number)[1]
    return 0 if active is None else active.start


def begin(method, setting, number):
    """The examples that the method trains on."""
    block, active = ranges(setting, number)
    weight = next(method.model.parameters())
    examples = make_examples(setting, number, weight.dtype, weight.device)
    return method.begin_task(examples, block=block, active=active)


def run_task(method, setting, number, steps=6):
    """Begin a task, train on batches of what the method wants, and end it."""
    examples = begin(method, setting, number)
    train(method, examples, steps)
    method.consolidate(own_batches(method, setting, number))


def train(method, examples, steps=6):
    optimizer = torch.optim.SGD(method.model.parameters(), lr=0.1)
    for step in range(steps):
        rows = torch.arange(step, len(examples[0]), 2, device=examples[0].device)
        method.loss(*(entry[rows] for entry in examples)).backward()
        method.add_penalty_grad_()
        optimizer.step()
        method.update()
        optimizer.zero_grad()


def own_batches(method, setting, number):
    weight = next(method.model.parameters())
    inputs, labels = make_examples(setting, number, weight.dtype, weight.device)
    return list(zip(inputs.split(5), labels.split(5), strict=True))


def run_tasks(method, setting, tasks=TASKS):
    for number in range(tasks):
        run_task(method, setting, number)
