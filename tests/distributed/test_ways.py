"""Without a method, training on processes is training on one: what the other tests rest on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sharded_models import (
    WAYS,
    all_batches,
    make_loader,
    make_network,
    make_steps,
    plain_parameters,
)


def trained(name):
    way = WAYS[name]
    model = way.wrap(make_network())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for x, y in make_steps(0, way):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return plain_parameters(model)


def labels_of_share(name):
    return [y for _, y in make_loader(0, WAYS[name])]


@pytest.mark.parametrize("name", [name for name in WAYS if name != "single"])
def test_training_on_processes_is_training_on_one(processes, name):
    expected = trained("single")
    for found in processes(WAYS[name].ranks).run(trained, name):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "padding"), [("ddp", 1), ("fsdp uneven", 2)])
def test_shares_of_the_examples_are_padded_and_all_batches_are_not(processes, name, padding):
    way = WAYS[name]
    shares = processes(way.ranks).run(labels_of_share, name)
    labels = [y for _, y in all_batches(0, way.shares)]
    assert sum(len(y) for share in shares for y in share) == sum(map(len, labels)) + padding
    assert torch.equal(shares[0][0], labels[0])
