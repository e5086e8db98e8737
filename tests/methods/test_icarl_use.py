"""iCaRL as it is used: resumed, combined, in loops of all kinds, with bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from quick_runs import SPLIT, learn_all_digits, learn_beside_ewc_in_bf16, same, small, weights
from rehearsal_tasks import (
    BAD_EXAMPLES,
    INPUTS,
    assert_alike,
    assert_refused_at_the_beginning,
    assert_refused_at_the_end,
    begin,
    every_setting,
    make_examples,
    make_model,
    own_batches,
    ranges,
    resumed,
    run_task,
)
from toy_training import assert_same_state

import clext
from clext import ICaRL
from clext.data.datasets import load_dataset
from clext.data.scenarios import make_scenario


@every_setting
def test_training_goes_on_after_a_resume_as_if_it_had_not_stopped(setting):
    results = []
    for stops in (False, True):
        method = ICaRL(make_model(setting), budget=7)
        run_task(method, setting, 0)
        if stops:
            method = resumed(method, ICaRL(make_model(setting), budget=7))
        run_task(method, setting, 1)
        results.append(method)
    assert_alike(*results)
    inputs = torch.randn(4, 5, dtype=torch.float64)
    assert torch.equal(results[0].predict(inputs), results[1].predict(inputs))


def test_a_loop_without_begin_task():
    method = ICaRL(make_model("domain"), budget=8)
    for number in range(2):
        for inputs, labels in own_batches(method, "domain", number):
            loss = method.loss(inputs, labels)
            target = F.one_hot(labels, 2).double()
            obvious = F.binary_cross_entropy(method.model(inputs).sigmoid(), target)
            torch.testing.assert_close(loss, 2 * obvious)
        method.consolidate(iter(own_batches(method, "domain", number)))
    assert sum(len(entry) for entries in method._sets.values() for entry in entries) == 8


@every_setting
def test_on_a_compiled_model(setting):
    results = []
    for compiled in (False, True):
        method = ICaRL(make_model(setting), budget=8)
        if compiled:
            method.model.compile(backend="eager")
        for number in range(2):
            run_task(method, setting, number)
        results.append(method.predict(torch.ones(3, 5, dtype=torch.float64)))
    assert torch.equal(*results)


def test_beside_a_penalty_and_in_bf16():
    result = learn_beside_ewc_in_bf16(ICaRL(small(), budget=50))
    assert result.config["method"] == "ewc+icarl"
    assert result.average_accuracy[-1] > 0.5


def test_icarl_forgets_less_on_split_digits(device):
    result = learn_all_digits("icarl", device)
    assert result.average_accuracy[-1] > 0.7
    again = learn_all_digits("icarl", device)
    assert again.accuracy.tolist()[-1] == result.accuracy.tolist()[-1]


def test_the_last_accuracy_of_a_task_is_that_of_its_exemplars():
    method = ICaRL(small(), budget=10)
    result = clext.train(method, device="cpu", lr=1e-2, **{**SPLIT, "epochs": 1})
    scenario = make_scenario("split", load_dataset("digits", None, show=False), 2, 0, "class")
    test = scenario.tasks[1].test()
    with method.outputs.selected(range(10)):
        found = method.predict(test.inputs).argmax(dim=1).eq(test.labels).double().mean().item()
    assert result.accuracy[1, 1] == pytest.approx(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "icarl: budget must be an integer >= 1, got 0"),
        ({"budget": 2.0}, "budget must be an integer"),
        ({"features": 3.0}, "features must be a layer's name, got 3.0"),
        ({"norm": 1}, "norm must be True or False, got 1"),
        ({"temperature": 0}, "temperature must be a finite number >= 0.0001 and <= 10000"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ICaRL(make_model("domain"), **options)


def test_a_budget_below_the_number_of_classes_is_refused_when_the_task_begins():
    method = ICaRL(make_model("class"), budget=3)
    run_task(method, "class", 0)
    before, blocks = method.state_dict(), list(method.outputs.blocks)
    message = "icarl: a budget of 3 is too small for one exemplar of each of the 4 classes; .*=4"
    block, active = ranges("class", 1)
    for examples in (make_examples("class", 1), None):
        with pytest.raises(ValueError, match=message):
            method.begin_task(examples, block=block, active=active)
        assert method.outputs.blocks == blocks
        assert method.outputs.active == ranges("class", 0)[1]
        assert_same_state(method.state_dict(), before)
    again = ICaRL(make_model("domain"), budget=3)
    run_task(again, "domain", 0)
    with pytest.raises(ValueError, match="of the 2 classes in up to 2 tasks; .*budget=4"):
        begin(again, "domain", 1)


@pytest.mark.parametrize("given", ["icarl", "ewc+icarl", None])
@pytest.mark.parametrize(
    ("incremental", "budget", "message"),
    [
        ("domain", 9, "the 5 classes in up to 2 tasks; make the method with budget=10 or more"),
        ("class", 9, "the 10 classes; make the method with budget=10 or more"),
        ("task", 9, "the 10 classes; make the method with budget=10 or more"),
    ],
)
def test_a_budget_too_small_for_the_last_task_is_refused_before_any_is_learned(
    incremental, budget, message, given
):
    model = small()
    before = weights(model)
    method, options = given, {"model": model, "budget": budget}
    if given is None:
        method, options = ICaRL(model, budget=budget), {}
    with pytest.raises(ValueError, match=f"^icarl: a budget of 9 is too small .* {message}"):
        clext.train(method, **options, **{**SPLIT, "incremental": incremental, "epochs": 1})
    assert same(before, weights(model))


def test_a_comparison_with_a_budget_too_small_is_refused_before_any_method_has_run():
    started = []
    model = small()
    model.register_forward_hook(lambda *_: started.append(1))
    with pytest.raises(ValueError, match="icarl: a budget of 9 is too small"):
        clext.compare(["baseline", "icarl"], model=model, options={"icarl": {"budget": 9}}, **SPLIT)
    assert not started


def test_the_budget_counts_classes_that_are_there_and_exemplars_of_before():
    """Labels 0 and 4 make five outputs; a method that has learned tasks keeps their exemplars."""
    x = torch.rand(8, 64)
    y = torch.tensor([0, 4] * 4)
    scenario = clext.Scenario.from_datasets([((x, y), (x, y))] * 2, incremental="domain")
    method = ICaRL(small(), budget=5)
    options = {"scenario": scenario, "epochs": 1, "progress": False}
    clext.train(method, **options)
    with pytest.raises(ValueError, match="the 2 classes in up to 4 tasks; .*budget=8"):
        clext.train(method, **options)


@pytest.mark.parametrize(("data", "message"), BAD_EXAMPLES)
def test_a_task_that_begins_or_ends_with_bad_data_changes_nothing(data, message):
    method = ICaRL(make_model("task"), budget=5)
    assert_refused_at_the_beginning(method, data, message)
    begin(method, "task", 1)
    for batches in ([data], iter([data])):
        assert_refused_at_the_end(method, batches, message)


def test_batches_of_several_shapes_are_refused():
    method = ICaRL(make_model("domain"), budget=9)
    x, y = make_examples("domain", 0)
    with pytest.raises(ValueError, match=r"\[1, 5\] each, expected .* \[5\] as .* batch before"):
        method.consolidate([(x, y), (x[:, None], y)])
    assert method.tasks == 0


def test_a_model_without_a_linear_head_is_refused_when_the_task_begins():
    method = ICaRL(torch.nn.Sequential(make_model("domain"), torch.nn.ReLU()), budget=9)
    with pytest.raises(ValueError, match=r"no nn.Linear makes the outputs .* features="):
        method.begin_task(make_examples("domain", 0))


def test_a_task_that_ends_without_data_is_refused():
    method = ICaRL(make_model("domain"))
    for data, message in ((None, "icarl needs the data of the task"), ([], "is empty")):
        with pytest.raises(ValueError, match=message):
            method.consolidate(data)
    assert method.tasks == 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, "holds nothing, expected exemplars, classes, previous"),
        (
            {"exemplars": {}, "classes": [0.5], "previous": None},
            "'classes'. is .0.5., expected int",
        ),
        (
            {"exemplars": [], "classes": None, "previous": None},
            "is list, expected exemplars by class",
        ),
        ({"exemplars": {-1: []}, "classes": None, "previous": None}, "holds -1, expected a class"),
        (
            {"exemplars": {0: [INPUTS[:0]]}, "classes": None, "previous": None},
            "no list of tensors with exemplars",
        ),
        (
            {"exemplars": {0: [INPUTS] * 2}, "classes": None, "previous": None},
            "8 exemplars and the budget is 5",
        ),
        (
            {"exemplars": {0: [INPUTS, INPUTS[:, 1:]]}, "classes": None, "previous": None},
            r"\[4\] each, expected",
        ),
        (
            {"exemplars": {}, "classes": None, "previous": {"a": INPUTS}},
            "holds a, expected names and values",
        ),
    ],
)
def test_a_state_of_something_else_is_refused(extra, message):
    method = ICaRL(make_model("domain"), budget=5)
    before = method.state_dict()
    with pytest.raises(ValueError, match=message):
        method.load_state_dict(before | {"extra": extra})
    assert_same_state(method.state_dict(), before)
