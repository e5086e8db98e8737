"""Small tasks in each incremental setting, for methods that learn from what they keep."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy_training import assert_same_state

FEATURES, CLASSES, TASKS, EXAMPLES = 5, 2, 3, 12
SETTINGS = ("task", "domain", "class")
INPUTS = torch.zeros(4, FEATURES, dtype=torch.float64)
# Examples of a second task of two classes that every method refuses, and what it says when the task
# ends, or begins.
BAD_EXAMPLES = [
    ((INPUTS[:0], torch.zeros(0).long()), "the data of the task is empty"),
    ((INPUTS, torch.tensor([0, 1, 2, 0])), r"labels reach from 0 to 2, expected 0 to 1"),
    ((INPUTS, torch.tensor([0, 1, -1, 0])), "labels reach from -1 to 1"),
    ((INPUTS, torch.zeros(4)), "labels y are torch.float32"),
    ((INPUTS, torch.zeros(3).long()), "4 inputs but 3 labels"),
    ((INPUTS[:, :3], torch.zeros(4).long()), r"inputs are torch.float64 \[3\] each, .* \[5\]"),
    ((INPUTS / 0, torch.zeros(4).long()), "inputs hold NaN or infinity; leave"),
    ((INPUTS,), "expected a pair"),
]
AT_THE_BEGINNING = {
    "the data of the task is empty": r"float64 \[0, 5\], torch.int64 \[0\], expected a pair of t",
    "4 inputs but 3 labels": r"float64 \[4, 5\], torch.int64 \[3\], expected a pair of tensors",
    r"labels reach from 0 to 2, expected 0 to 1": "0 to 2, expected 0 to 1: the task's own",
    "expected a pair": "tuple of 1 entries, expected a pair of tensors",
}

every_setting = pytest.mark.parametrize("setting", SETTINGS)


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


def resumed(method, other):
    """`other`, with the states of `method` and its model."""
    other.model.load_state_dict(method.model.state_dict())
    other.load_state_dict(method.state_dict())
    return other


def assert_alike(method, other):
    assert_same_state(method.model.state_dict(), other.model.state_dict())
    assert_same_state(method.state_dict(), other.state_dict())


def assert_refused_at_the_beginning(method, examples, message):
    """The second task of `method`, which is new, does not begin, and nothing is changed."""
    message = AT_THE_BEGINNING.get(message, message)
    run_task(method, "task", 0)
    before, blocks = method.state_dict(), list(method.outputs.blocks)
    block, active = ranges("task", 1)
    with pytest.raises(ValueError, match=f"^{method.name}: .*{message}"):
        method.begin_task(examples, block=block, active=active)
    assert method.outputs.blocks == blocks
    assert_same_state(method.state_dict(), before)


def assert_refused_at_the_end(method, data, message):
    """The task that `method` has begun does not end, and nothing is changed."""
    before = method.state_dict()
    with pytest.raises(ValueError, match=f"^{method.name}.*{message}") as caught:
        method.consolidate(data)
    assert "\n" not in str(caught.value)
    assert_same_state(method.state_dict(), before)


def obvious_loss(model, setting, number, inputs, global_labels):
    """One example at a time: the cross entropy over the outputs that its class competes with."""
    losses = []
    for x, label in zip(inputs, global_labels.tolist(), strict=True):
        rivals = range(model[2].out_features)
        if setting == "class":
            rivals = ranges("class", number)[1]
        if setting == "task":
            rivals = ranges("task", label // 2)[1]
        logits = model(x.unsqueeze(0))[0]
        shares = logits[rivals.start : rivals.stop].exp()
        losses.append(-(shares[label - rivals.start] / shares.sum()).log())
    return torch.stack(losses).mean()
