"""A task whose steps a method had no part in is said at its end, once, and nothing else is."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from toy_training import make_model, make_task

from clext import METHODS
from clext.methods import make_method

FROM_THE_FIRST = ["si", "rwalk", "dgr", "der", "derpp", "er-ace"]


def end(method, number):
    """What is said at the end of a task."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        method.consolidate(make_task(number))
    return [str(entry.message) for entry in caught]


@pytest.mark.parametrize("name", [*METHODS, "ewc+replay", "gem+lwf"])
def test_a_task_without_the_methods_part_is_noticed_from_the_second_on(name):
    method = make_method(name, make_model())
    expected = 0 if name == "baseline" else len(name.split("+"))
    for number in range(3):
        x, y = make_task(number)[0]
        F.cross_entropy(method.model(x), y).backward()
        torch.optim.SGD(method.model.parameters(), lr=0.1).step()
        said = end(method, number)
        assert len(said) == (expected if number or name in FROM_THE_FIRST else 0)
    x, y = make_task(3)[0]
    method.begin_task((x.sigmoid(), y))
    method.loss(x.sigmoid(), y).backward()
    method.add_penalty_grad_()
    method.update()
    assert end(method, 3) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [("ewc", "add_penalty_grad_.. before each step"), ("lwf", r"train on loss\(x, y\)")],
)
def test_it_says_what_to_do(name, message):
    method = make_method(name, make_model())
    end(method, 0)
    with pytest.warns(
        UserWarning, match=f"^clext: {name} saw no step of this task, .*{message}"
    ) as caught:
        method.consolidate(make_task(1))
    assert caught[0].filename == __file__


def test_the_count_is_part_of_the_state():
    method, resumed = make_method("ewc", make_model()), make_method("ewc", make_model())
    end(method, 0)
    method.add_penalty_grad_()
    resumed.load_state_dict(method.state_dict())
    assert end(resumed, 1) == []
