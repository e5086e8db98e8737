"""Methods that keep or distil examples, on batches that are mappings, and other likelihoods."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clext import AGEM, DER, ERACE, EWC, GEM, L2, SI, Combined, DERpp, Joint, LwF, Replay
from clext.methods import METHODS

N = 12


class Named(nn.Module):
    """Of keywords, one of which it does not need."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, more: Tensor) -> Tensor:
        return self.head(torch.cat([x, more], dim=1))


class Plain(nn.Module):
    """The same of one tensor."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def batches(seed: int) -> list[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(N, 5, generator=draws), torch.randint(3, (N,), generator=draws))
        for _ in range(4)
    ]


def as_mapping(x: Tensor, y: Tensor) -> dict[str, object]:
    return {"x": x[:, :2], "more": x[:, 2:], "labels": y, "text": "not for the model"}


def learned(make, model: nn.Module, convert) -> tuple[nn.Module, object]:
    """Two tasks by `make(model)`, each batch as `convert` gives it to loss and consolidate."""
    torch.manual_seed(0)
    model.load_state_dict(Plain().state_dict())
    method = make(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for task in range(2):
        data = batches(task)
        for x, y in data:
            method.loss(*convert(x, y)).backward()
            method.add_penalty_grad_()
            optimizer.step()
            method.update()
            optimizer.zero_grad()
        method.consolidate(
            [batch[0] if len(batch := convert(x, y)) == 1 else batch for x, y in data]
        )
    return model, method


MAKES = {
    "replay": lambda model: Replay(model, budget=9),
    "balanced": lambda model: Replay(model, budget=9, policy="balanced"),
    "stream": lambda model: Replay(model, budget=9, policy="stream"),
    "der": lambda model: DER(model, budget=9),
    "derpp": lambda model: DERpp(model, budget=9),
    "er-ace": lambda model: ERACE(model, budget=9),
    "l2": L2,
    "lwf": LwF,
    "gem": lambda model: GEM(model, per_task=5),
    "agem": lambda model: AGEM(model, per_task=5, batch=3),
    "ewc": lambda model: EWC(model, strength=1.0),
    "si+replay": lambda model: Combined(SI(model), Replay(model, budget=9)),
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_mappings_are_learned_as_tensors(make):
    one, _ = learned(make, Plain(), lambda x, y: (x, y))
    several, method = learned(make, Named(), lambda x, y: (as_mapping(x, y),))
    for mine, theirs in zip(several.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    again = make(several)
    again.load_state_dict(method.state_dict())
    batch = as_mapping(*batches(7)[0])
    assert torch.equal(again.loss(batch), method.loss(batch))


def test_a_task_of_several_tensors_begins_for_lwf_and_joint():
    x, y = (torch.cat(column) for column in zip(*batches(0), strict=True))
    inputs = {"x": x[:, :2], "more": x[:, 2:]}
    model = Named()
    for method in (LwF(model), Joint(model)):
        for _ in range(2):
            given, labels, *more = method.begin_task((inputs, y))
            method.loss(given, labels, *more).backward()
            method.consolidate([({name: e[:5] for name, e in inputs.items()}, y[:5])])
        assert torch.isfinite(model.head.weight.grad).all()


def test_numbers_are_replayed():
    model = nn.Linear(5, 2)
    method = Replay(model, budget=4, likelihood="gaussian")
    x, y = torch.randn(N, 5), torch.randn(N, 2)
    torch.testing.assert_close(method.loss(x, y), F.mse_loss(model(x), y))
    method.consolidate([(x, y)])
    old_x, old_y, _ = method._buffer.rows
    replayed = Replay(model, budget=4, batch=4, likelihood="gaussian")
    replayed.load_state_dict(method.state_dict())
    expected = F.mse_loss(model(x), y) + F.mse_loss(model(old_x), old_y)
    torch.testing.assert_close(replayed.loss(x, y), expected)


def test_replay_needs_inputs_of_one_length_and_classes_to_balance():
    method = Replay(nn.Linear(5, 2))
    method.consolidate([(torch.randn(N, 5), torch.randint(2, (N,)))])
    with pytest.raises(ValueError, match=r"replay: inputs are .* \[4\] each, .* padded to one"):
        method.loss(torch.randn(2, 4), torch.zeros(2).long())
    numbers = Replay(nn.Linear(5, 2), policy="balanced", likelihood="gaussian")
    with pytest.raises(ValueError, match='policy="balanced" needs a class for each example'):
        numbers.consolidate([(torch.randn(N, 5), torch.randn(N, 2))])


@pytest.mark.parametrize("name", ["icarl", "dgr"])
def test_methods_of_one_tensor_say_so(name):
    batch = as_mapping(*batches(0)[0])
    with pytest.raises(ValueError, match=f"{name}: inputs are .*, expected one tensor"):
        METHODS[name](Named()).loss(batch)


def test_a_combination_reads_batches_in_one_way():
    model = nn.Linear(5, 2)
    with pytest.raises(ValueError, match="made with different forward, labels, loss or likelihood"):
        Combined(EWC(model, likelihood="gaussian"), Replay(model))
    Combined(EWC(model, likelihood="gaussian"), Replay(model, likelihood="gaussian"))


def test_what_no_loss_can_take_is_refused():
    method = METHODS["baseline"](nn.Linear(5, 2))
    x, y = torch.randn(2, 5), torch.zeros(2).long()
    for batch, kind, message in (
        ((x,), TypeError, "got inputs alone, expected labels too"),
        ((x[:0], y[:0]), ValueError, r"got torch.float32 \[0, 5\], expected at least one example"),
        ((x, [0, 1]), ValueError, "labels y are list of 2 entries .*torch.as_tensor"),
        ((x, y[:1]), ValueError, r"labels y are torch.int64 \[1\] for 2 inputs"),
        ((x[0, 0], y), ValueError, r"inputs are torch.float32 \[\], expected tensors with a row"),
    ):
        with pytest.raises(kind, match=message) as caught:
            method.loss(*batch)
        assert "\n" not in str(caught.value)


def squares(model, batch):
    return (model(batch[0]) - batch[1]).square().mean(1)


def test_a_loss_of_ones_own_is_that_of_the_task_in_every_method():
    x, y = torch.randn(N, 5), torch.randn(N, 3)
    for make in (Replay, LwF, GEM):
        model = nn.Linear(5, 3)
        method = make(model, loss=squares)
        expected = squares(model, (x, y)).mean()
        torch.testing.assert_close(method.loss(x, y), expected)
        method.consolidate([(x, y)])
        method.strength = 0.0 if method.has_strength else method.strength
        torch.testing.assert_close(method.loss(x, y), expected)
        with pytest.raises(ValueError, match="active=.* is for classes"):
            method.begin_task(block=range(2), active=range(2))


def test_a_loss_of_ones_own_may_do_without_labels():
    model = nn.Linear(5, 5)
    method = Replay(model, batch=4, loss=lambda model, x: (model(x) - x).square().mean(1))
    old, new = torch.randn(4, 5), torch.randn(N, 5)
    method.consolidate([old])
    expected = F.mse_loss(model(new), new) + F.mse_loss(model(old), old)
    torch.testing.assert_close(method.loss(new), expected)
    mean = Replay(model, loss=lambda model, x: F.mse_loss(model(x), x))
    mean.loss(old)
    mean.consolidate([old])
    with pytest.raises(ValueError, match="expected a loss for each"):
        mean.loss(new)


@pytest.mark.parametrize("name", ["lwf", "icarl", "dgr"])
def test_what_needs_classes_says_so(name):
    with pytest.raises(ValueError, match=f"{name} needs classes: .* got 'gaussian'"):
        METHODS[name](nn.Linear(5, 3), likelihood="gaussian")


def test_lwf_needs_logits_from_the_first_task_on():
    method = LwF(nn.Conv2d(1, 3, 1))
    with pytest.raises(ValueError, match=r"returned \[2, 3, 4, 4\] .* expected logits"):
        method.loss(torch.randn(2, 1, 4, 4), torch.zeros(2, 4, 4).long())


def test_the_order_of_a_mapping_does_not_count():
    method = Replay(Named(), budget=4)
    x, y = batches(0)[0]
    method.consolidate([as_mapping(x, y)])
    turned = dict(reversed(as_mapping(*batches(1)[0]).items()))
    again = Replay(method.model, budget=4)
    again.load_state_dict(method.state_dict())
    assert torch.equal(method.loss(as_mapping(*batches(1)[0])), again.loss(turned))


def test_only_what_a_state_dict_can_hold_is_kept():
    pair = namedtuple("Pair", "x y")
    method = Replay(nn.Linear(5, 3), forward=lambda model, b: model(b.x), labels=lambda b: b.y)
    with pytest.raises(ValueError, match="can be kept in a state dict"):
        method.consolidate([pair(*batches(0)[0])])


def test_examples_of_a_task_are_recorded_as_the_users_forward_takes_them():
    method = LwF(nn.Linear(5, 3), forward=lambda model, batch: model(batch[0]))
    x, y = batches(0)[0]
    method.begin_task((x, y))
    method.consolidate([(x, y)])
    given = method.begin_task((x, y))
    assert torch.equal(given[2], method.model(x))
