"""Three tasks of two classes in each incremental setting, a model for them, and a loop."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from toy_training import assert_same_state

FEATURES, CLASSES, TASKS, EXAMPLES, BATCH = 5, 2, 3, 12, 4
SETTINGS = ("task", "domain", "class")

every_setting = pytest.mark.parametrize("setting", SETTINGS)


def make_model(setting="class", dtype=torch.float64, device="cpu"):
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


def start(setting, number):
    """What has to be added to the local labels of a task."""
    active = ranges(setting, number)[1]
    return 0 if active is None else active.start


def make_examples(setting, number, dtype=torch.float64, device="cpu"):
    """Inputs in [0, 1] and local labels of a task, each class in it; classes lie apart."""
    random = torch.Generator().manual_seed(50 + number)
    labels = torch.arange(CLASSES).repeat(EXAMPLES // CLASSES)
    inputs = torch.rand(EXAMPLES, FEATURES, generator=random, dtype=torch.float64)
    inputs[:, number] = (inputs[:, number] + labels) / 2
    local = labels + ranges(setting, number)[0].start - start(setting, number)
    return inputs.to(device, dtype), local.to(device)


def examples_for(method, setting, number):
    """In the type of the method's model and where that is."""
    weight = next(method.model.parameters())
    return make_examples(setting, number, weight.dtype, weight.device)


def batches_for(method, setting, number):
    """The same in batches."""
    inputs, labels = examples_for(method, setting, number)
    return list(zip(inputs.split(BATCH), labels.split(BATCH), strict=True))


def begin(method, setting, number):
    """What the method trains on."""
    block, active = ranges(setting, number)
    return method.begin_task(examples_for(method, setting, number), block=block, active=active)


def train(method, examples, autocast=False):
    """One epoch; returns the losses."""
    device, losses = examples[0].device, []
    optimizer = torch.optim.SGD(method.model.parameters(), lr=0.1)
    for rows in torch.arange(len(examples[0]), device=device).split(BATCH):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = method.loss(*(entry[rows] for entry in examples))
        loss.backward()
        method.add_penalty_grad_()
        optimizer.step()
        method.update()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def run_task(method, setting, number, autocast=False):
    """Begin a task, train on what the method wants, and end it; returns the losses."""
    losses = train(method, begin(method, setting, number), autocast)
    method.consolidate(batches_for(method, setting, number))
    return losses


def run_tasks(method, setting, tasks=TASKS):
    for number in range(tasks):
        run_task(method, setting, number)


def assert_alike(method, other):
    assert_same_state(method.model.state_dict(), other.model.state_dict())
    assert_same_state(method.state_dict(), other.state_dict())


# ------------------------------------------------------------------ formulas, step by step


def obvious_loss(model, setting, number, inputs, global_labels):
    """One example at a time: the cross entropy over the outputs that its class competes with."""
    losses = []
    for x, label in zip(inputs, global_labels.tolist(), strict=True):
        rivals = range(model[2].out_features)
        if setting == "class":
            rivals = ranges("class", number)[1]
        if setting == "task":
            rivals = ranges("task", label // CLASSES)[1]
        shares = model(x.unsqueeze(0))[0][rivals.start : rivals.stop].exp()
        losses.append(-(shares[label - rivals.start] / shares.sum()).log())
    return torch.stack(losses).mean()


def old_heads(setting, number):
    """For each earlier head: the outputs of the model, and those that the old model knew."""
    if setting == "task":
        return [(ranges("task", k)[0],) * 2 for k in range(number)]
    if setting == "class":
        return [(range(CLASSES * (number + 1)), range(CLASSES * number))]
    return [(range(CLASSES), range(CLASSES))]


def obvious_distillation(logits, teacher, heads, temperature, scale):
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


def obvious_balance(current, losses, number, balance, strength):
    if balance == "sum":
        return current + strength * sum(losses)
    if balance == "mean":
        return (current + strength * sum(losses) / len(losses)) / (1 + strength)
    k = number + 1
    return current / k + strength * (1 - 1 / k) * sum(losses) / len(losses)


def go_on(methods, models, queue):
    """A task in a process of its own, which imports this module; the state is sent as bytes."""
    for method, model in zip(methods, models, strict=True):
        assert model is None or method.model is model
        run_task(method, "class", 1)
    buffer = io.BytesIO()
    torch.save([(m.model.state_dict(), m.state_dict()) for m in methods], buffer)
    queue.put(buffer.getvalue())
