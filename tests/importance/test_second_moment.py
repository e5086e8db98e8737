"""Importance from an optimizer's own average of squared gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import clext
from clext.importance import second_moment

EXACT = {"rtol": 1e-12, "atol": 0}
STEPS = 5


def make_net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def trained(net, optimizer, beta2):
    """The mean of the squared gradients of some steps, weighed by powers of beta2."""
    total, weights = [torch.zeros_like(p) for p in net.parameters()], 0.0
    for _ in range(STEPS):
        optimizer.zero_grad()
        net(torch.randn(6, 3).double()).square().mean().backward()
        grads = [p.grad.clone() for p in net.parameters()]
        total = [beta2 * old + g**2 for old, g in zip(total, grads, strict=True)]
        weights = beta2 * weights + 1
        optimizer.step()
    return [entry / weights for entry in total]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.AdamW, {"betas": (0.5, 0.75)}),
        (torch.optim.NAdam, {}),
        (clext.optim.Adam, {}),
        (clext.optim.AdamW, {"betas": (0.5, 0.6)}),
    ],
)
def test_it_is_the_weighted_mean_of_the_squared_gradients(kind, options):
    net = make_net()
    groups = [{"params": [*net[0].parameters()], "lr": 0.1}, {"params": [*net[2].parameters()]}]
    optimizer = kind(groups, **options)
    expected = trained(net, optimizer, float(options.get("betas", (0.9, 0.999))[1]))
    # Asked for in another order, and with one that is not the optimizer's.
    other = nn.Parameter(torch.ones(2))
    *found, rest = second_moment([*reversed([*net.parameters()]), other], optimizer)
    for mine, theirs in zip(reversed(found), expected, strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)
    assert rest.dtype == torch.float32
    assert rest.eq(0).all()


def test_layout_and_dtype_are_those_of_state():
    conv = nn.Conv2d(2, 3, 3).to(torch.bfloat16, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(conv.parameters())
    conv(torch.randn(1, 2, 5, 5, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    weight, _ = second_moment(list(conv.parameters()), optimizer)
    assert weight.dtype == torch.float32
    assert weight.stride() == conv.weight.stride()


def test_without_moving_and_forgetting_it_is_the_batch_fisher():
    net = make_net()
    x, y = torch.randn(8, 3).double(), torch.randint(2, (8,))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0, betas=(0.9, 1 - 1e-9))
    batches = list(zip(x.split(2), y.split(2), strict=True))
    for batch_x, batch_y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch_x), batch_y).backward()
        optimizer.step()
    by_data = clext.EWC(net, fisher="batch")
    by_data.consolidate(batches)
    method = clext.EWC(net, fisher="optimizer")
    method.consolidate(optimizer)
    assert method.tasks == 1
    for name, entry in by_data.importance.items():
        torch.testing.assert_close(method.importance[name], entry, rtol=1e-6, atol=0)
        assert method.anchor[name].equal(net.get_parameter(name))


@pytest.mark.parametrize("anchors", ["latest", "all"])
def test_tasks_add_up_as_with_any_fisher(anchors):
    net = make_net()
    method = clext.EWC(net, fisher="optimizer", gamma=0.5, anchors=anchors)
    expected = [torch.zeros_like(p) for p in net.parameters()]
    for _ in range(2):
        optimizer = torch.optim.Adam(net.parameters())
        trained(net, optimizer, 0.999)
        moments = second_moment(list(net.parameters()), optimizer)
        expected = [0.5 * old + new for old, new in zip(expected, moments, strict=True)]
        method.steps = 1
        method.consolidate(optimizer)
    for mine, theirs in zip(method.importance.values(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize(
    "given",
    [
        lambda net: torch.optim.SGD(net.parameters(), lr=0.1),
        lambda net: torch.optim.Adam(net.parameters()),  # no step yet
        lambda _: [(torch.zeros(2, 3), torch.zeros(2).long())],
        lambda _: None,
    ],
    ids=["SGD", "no step", "data", "nothing"],
)
def test_what_has_no_second_moments_is_refused(given):
    net = make_net()
    method = clext.EWC(net, fisher="optimizer")
    with pytest.raises(ValueError, match="expected an optimizer with second moments"):
        method.consolidate(given(net))
    assert method.tasks == 0


def test_an_optimizer_of_another_model_is_refused():
    net, other = make_net(), make_net()
    trained(other, optimizer := torch.optim.Adam(other.parameters()), 0.999)
    with pytest.raises(ValueError, match="that has stepped these parameters"):
        second_moment(list(net.parameters()), optimizer)


def test_options_that_need_data_do_not_go_with_it():
    net = make_net()
    with pytest.raises(ValueError, match='weighting="sum" counts samples'):
        clext.EWC(net, fisher="optimizer", weighting="sum")
    with pytest.raises(ValueError, match="ewc takes the optimizer at the end of a task, and repl"):
        clext.Combined(clext.EWC(net, fisher="optimizer"), clext.Replay(net))
    with pytest.raises(ValueError, match="needs the data of the task: got Adam"):
        clext.EWC(net).consolidate(torch.optim.Adam(net.parameters()))
