"""iCaRL against its definition: exemplars, loss, predictions, features, budget."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from incremental_tasks import (
    CLASSES,
    FEATURES,
    TASKS,
    batches_for,
    begin,
    every_setting,
    make_examples,
    make_model,
    ranges,
    run_task,
    run_tasks,
    start,
    train,
)
from quick_runs import SPLIT, same, small, weights
from torch import nn
from toy_training import assert_same_state

import clext
from clext import EWC, ICaRL
from clext.methods.parts.exemplars import herd
from clext.training.graphs import GraphedSteps, Recording
from clext.training.optimizers import TaskOptimizer
from clext.training.settings import Settings

both_norms = pytest.mark.parametrize("norm", [True, False])
INPUTS = torch.rand(20, FEATURES, generator=torch.Generator().manual_seed(4)).double()


def normal(rows, norm=True):
    return rows / rows.norm(dim=-1, keepdim=True) if norm else rows


def features(model, inputs, norm=True):
    with torch.no_grad():
        return normal(model[1](model[0](inputs)), norm)


def obvious_herd(rows, count, norm):
    mean, taken = normal(rows.mean(dim=0), norm), []
    for _ in range(min(count, len(rows))):
        distances = {}
        for place in range(len(rows)):
            if place not in taken:
                chosen = rows[[*taken, place]].mean(dim=0)
                distances[place] = (mean - chosen).norm().item()
        taken.append(min(distances, key=distances.get))
    return taken


# ------------------------------------------------------------------ exemplars


@both_norms
@pytest.mark.parametrize("count", [1, 7, 30, 99])
def test_herding_takes_what_keeps_the_running_mean_nearest(norm, count, device):
    rows = normal(torch.randn(30, 4, dtype=torch.float64) + 1, norm)
    taken = herd(rows.to(device), count, norm=norm)
    assert taken.tolist() == obvious_herd(rows, count, norm)
    assert taken.device.type == device


@both_norms
def test_the_exemplars_are_those_of_herding_and_the_old_are_cut_to_the_first(norm):
    method = ICaRL(make_model("class"), budget=8, norm=norm)
    expected = {}
    for number in range(TASKS):
        run_task(method, "class", number)
        inputs, labels = make_examples("class", number)
        each = 8 // (2 * (number + 1))
        expected = {label: entries[:each] for label, entries in expected.items()}
        for label in labels.unique().tolist():
            own = inputs[labels == label]
            expected[label] = own[obvious_herd(features(method.model, own, norm), each, norm)]
        assert list(method._sets) == list(expected)
        for label, entries in expected.items():
            assert torch.equal(torch.cat(method._sets[label]), entries)


def test_classes_that_come_again_share_their_exemplars_among_the_tasks():
    method = ICaRL(make_model("domain"), budget=13)
    run_tasks(method, "domain")
    for entries in method._sets.values():
        assert [len(entry) for entry in entries] == [2, 2, 2]  # 13 // 2 classes // 3 tasks


def test_batches_of_several_shapes_are_refused():
    method = ICaRL(make_model("domain"), budget=9)
    x, y = make_examples("domain", 0)
    with pytest.raises(ValueError, match=r"\[1, 5\] each, expected .* \[5\] as .* other examples"):
        method.consolidate([(x, y), (x[:, None], y)])
    assert method.tasks == 0


# ------------------------------------------------------------------ the loss


def obvious_loss(model, before, setting, number, inputs, labels):
    """One example and one output at a time; `before` are the logits before the task."""
    block, _ = ranges(setting, number)
    old = [] if setting == "domain" else range(block.start)
    total = 0.0
    for x, label, logits in zip(inputs, labels.tolist(), before, strict=True):
        outputs = model(x.unsqueeze(0))[0].sigmoid()
        for output in old:
            target = logits[output].sigmoid()
            total -= target * outputs[output].log() + (1 - target) * (1 - outputs[output]).log()
        if setting == "task" and label not in block:
            continue
        for output in block:
            total -= (outputs[output] if label == output else 1 - outputs[output]).log()
    return total / len(inputs)


@every_setting
@pytest.mark.parametrize("number", range(TASKS))
def test_a_task_is_trained_on_its_examples_and_all_exemplars(setting, number, device):
    method = ICaRL(make_model(setting, device=device), budget=9)
    run_tasks(method, setting, tasks=number)
    stored = [entry for entries in method._sets.values() for entry in entries]
    own, own_labels = make_examples(setting, number, device=device)
    union = torch.cat([own, *stored])
    with torch.no_grad():
        before = method.model(union)
    inputs, labels, targets = begin(method, setting, number)
    assert inputs.equal(union)
    assert labels[: len(own)].equal(own_labels + start(setting, number))
    kept = {label: sum(map(len, entries)) for label, entries in method._sets.items()}
    assert {label: labels[len(own) :].tolist().count(label) for label in kept} == kept
    rows = torch.arange(0, len(inputs), 3, device=device)
    with torch.no_grad():
        method.model[0].weight.add_(0.1)
    expected = obvious_loss(method.model, before[rows], setting, number, inputs[rows], labels[rows])
    loss = method.loss(inputs[rows], labels[rows], targets[rows])
    torch.testing.assert_close(loss, expected)
    # Without what was recorded, or without the task's examples, it is made in the step.
    recorded = method.loss(own, labels[: len(own)], targets[: len(own)])
    torch.testing.assert_close(method.loss(own, own_labels), recorded)
    block, active = ranges(setting, number)
    method.begin_task(block=block, active=active)
    torch.testing.assert_close(method.loss(own, own_labels), recorded)


def test_the_temperature_softens_what_is_distilled():
    targets = []
    for temperature in (1.0, 4.0):
        method = ICaRL(make_model("class"), temperature=temperature)
        run_task(method, "class", 0)
        targets.append(begin(method, "class", 1)[2])
    logits = targets[0][:, :2].logit()
    torch.testing.assert_close(targets[1][:, :2], (logits / 4).sigmoid())
    assert targets[0][:, 2:].equal(targets[1][:, 2:])


def test_classes_of_earlier_tasks_between_those_of_a_task_are_distilled():
    """Tasks {0, 1}, {2, 3} and {0, 3}: the third has the outputs 0 to 3, of which two are old."""
    method = ICaRL(make_model("class"), budget=12)
    inputs, _ = make_examples("class", 0)
    for classes, block in (((0, 1), range(2)), ((2, 3), range(2, 4)), ((0, 3), range(4))):
        labels = torch.tensor(classes).repeat(len(inputs) // 2)
        with torch.no_grad():
            before = method.model(inputs)[:, :4].sigmoid()
        began = method.begin_task((inputs, labels), block=block, active=range(4))
        targets = began[2][: len(inputs)]
        if classes == (0, 3):
            assert torch.allclose(targets[:, 1:3], before[:, 1:3])
            assert torch.equal(targets[:, [0, 3]], F.one_hot(labels, 4)[:, [0, 3]].double())
            losses = method.loss(inputs, labels), method.loss(inputs, labels, targets)
            torch.testing.assert_close(*losses)
        train(method, began)
        method.consolidate([(inputs, labels)])


def test_a_loop_without_begin_task():
    method = ICaRL(make_model("domain"), budget=8)
    for number in range(2):
        for inputs, labels in batches_for(method, "domain", number):
            target = F.one_hot(labels, 2).double()
            obvious = F.binary_cross_entropy(method.model(inputs).sigmoid(), target)
            torch.testing.assert_close(method.loss(inputs, labels), 2 * obvious)
        method.consolidate(iter(batches_for(method, "domain", number)))
    assert sum(len(entry) for entries in method._sets.values() for entry in entries) == 8


# ------------------------------------------------------------------ predictions


@both_norms
@every_setting
def test_the_nearest_mean_of_exemplars_decides(setting, norm, device):
    method, inputs = (
        ICaRL(make_model(setting, device=device), budget=9, norm=norm),
        INPUTS.to(device),
    )
    run_tasks(method, setting)
    for number in range(TASKS) if setting == "task" else [2]:
        active = ranges(setting, number)[1]
        scores = method.predict(inputs, active=active)
        for place, label in enumerate(active or range(CLASSES)):
            mean = features(method.model, torch.cat(method._sets[label]), norm).mean(dim=0)
            distance = (features(method.model, inputs, norm) - normal(mean, norm)).norm(dim=1)
            torch.testing.assert_close(scores[:, place], -distance)


def test_until_there_are_exemplars_logits_decide_and_new_classes_have_means_of_all_examples():
    method = ICaRL(make_model("class"), budget=9)
    begin(method, "class", 0)
    assert torch.equal(method.predict(INPUTS), method.heads(INPUTS))
    assert method.predict(INPUTS).shape == (20, 2)
    method.consolidate(batches_for(method, "class", 0))
    own, labels = begin(method, "class", 1)[:2]
    scores = method.predict(INPUTS)
    mean = normal(features(method.model, own[labels == 3]).mean(dim=0))
    expected = -(features(method.model, INPUTS) - mean).norm(dim=1)
    torch.testing.assert_close(scores[:, 3], expected)
    block, active = ranges("class", 1)
    method.begin_task(block=block, active=active)  # whose examples it does not know
    assert method.predict(INPUTS)[:, 2:].eq(-torch.inf).all()
    torch.testing.assert_close(method.predict(INPUTS)[:, :2], scores[:, :2])


def test_means_are_made_anew_after_a_step_a_beginning_an_end_and_a_load():
    method = ICaRL(make_model("class"), budget=6)
    run_task(method, "class", 0)
    sizes = []
    method.model[0].register_forward_hook(lambda _m, _i, result: sizes.append(len(result)))

    def predicted():
        sizes.clear()
        method.predict(INPUTS)
        return sorted(sizes)

    assert predicted() == [6, 20]
    assert predicted() == [20]
    begin(method, "class", 1)
    assert predicted() == [6, 12, 20]
    for change in (lambda: method.loss(*make_examples("class", 1)), method.update):
        assert predicted() == [20]
        change()
        assert predicted() == [6, 12, 20]
    method.consolidate(batches_for(method, "class", 1))
    assert predicted() == [4, 20]
    method.load_state_dict(method.state_dict())
    assert predicted() == [4, 20]


def test_recorded_steps_of_a_combination_are_seen():
    """In which no loss is called on the host."""
    model = make_model("domain")
    method = EWC(model).combine(ICaRL(model))
    run_task(method, "domain", 0)
    parameters = [*model.parameters()]
    optimizer = TaskOptimizer(Settings(lr=1e-3), method, parameters, parameters[0].device)
    examples = begin(method, "domain", 1)
    recording = partial(Recording, capture=lambda function: function)
    steps = GraphedSteps(method, optimizer, examples, 2, "fp32", recording=recording)
    method.predict(INPUTS)
    steps.train_on(torch.arange(len(examples[0])), lambda: None)
    assert method.learner._means is None


def test_predicting_leaves_modes_and_batch_statistics_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().train()
    method = ICaRL(model)
    run_task(method, "domain", 0)
    method.loss(*make_examples("domain", 1))
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method.predict(INPUTS)
    method.consolidate(batches_for(method, "domain", 1))
    assert_same_state(model.state_dict(), before)
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_on_a_compiled_model():
    results = []
    for compiled in (False, True):
        method = ICaRL(make_model("class"), budget=8)
        if compiled:
            method.model.compile(backend="eager")
        run_tasks(method, "class", tasks=2)
        results.append(method.predict(INPUTS))
    assert torch.equal(*results)


# ------------------------------------------------------------------ features


@pytest.mark.parametrize("layer", ["1", 1])
def test_the_layer_of_the_features_can_be_named(layer):
    model = make_model("domain")
    method = ICaRL(model, features=layer)
    assert method.features == "1"
    run_task(method, "domain", 0)
    mean = normal(normal(model[0](torch.cat(method._sets[1]))).mean(dim=0))
    expected = -(normal(model[0](INPUTS)) - mean).norm(dim=1)
    torch.testing.assert_close(method.predict(INPUTS)[:, 1], expected)


class Crossed(nn.Module):
    """Its layers run in another order than they are named in, and its logits are scaled."""

    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(4, 2), nn.Linear(FEATURES, 4)

    def forward(self, x):
        return 10 * self.head(self.body(x).relu())


def test_by_default_it_is_the_linear_layer_that_runs_last():
    model = Crossed().double()
    assert torch.equal(ICaRL(model)._features(INPUTS)[0], model.body(INPUTS).relu())


def test_layers_that_give_no_features_are_refused():
    with pytest.raises(
        ValueError, match="^icarl: the model has no layer 'tail'; .* of head, body$"
    ):
        ICaRL(Crossed(), features="tail")
    method = ICaRL(nn.Sequential(nn.Conv1d(1, 2, 5), nn.Flatten()).double())
    with pytest.raises(ValueError, match="'nn.Linear' gets NoneType for 4 examples, .* features="):
        method.consolidate([(INPUTS[:4, None], torch.tensor([0, 1, 0, 1]))])
    assert method.tasks == 0


# ------------------------------------------------------------------ the budget


def test_a_budget_below_the_number_of_classes_is_refused_when_the_task_begins():
    method = ICaRL(make_model("class"), budget=3)
    run_task(method, "class", 0)
    before = method.state_dict()
    message = "icarl: a budget of 3 is too small for one exemplar of each of the 4 classes; .*=4"
    block, active = ranges("class", 1)
    for examples in (make_examples("class", 1), None):
        with pytest.raises(ValueError, match=message):
            method.begin_task(examples, block=block, active=active)
        assert_same_state(method.state_dict(), before)
    again = ICaRL(make_model("domain"), budget=3)
    run_task(again, "domain", 0)
    with pytest.raises(ValueError, match="of the 2 classes in up to 2 tasks; .*budget=4"):
        begin(again, "domain", 1)


@pytest.mark.parametrize("given", ["icarl", "ewc+icarl", None])
@pytest.mark.parametrize(
    ("incremental", "message"),
    [("domain", "the 5 classes in up to 2 tasks; "), ("class", "the 10 classes; ")],
)
def test_a_budget_too_small_for_the_last_task_is_refused_before_any_is_learned(
    incremental, message, given
):
    model = small()
    before = weights(model)
    options = {"method": given, "model": model, "budget": 9}
    if given is None:
        options = {"method": ICaRL(model, budget=9)}
    with pytest.raises(ValueError, match=f"^icarl: a budget of 9 .* {message}.* budget=10 or more"):
        clext.train(**options, **{**SPLIT, "incremental": incremental, "epochs": 1})
    assert same(before, weights(model))


def test_the_budget_counts_classes_that_are_there_and_exemplars_of_before():
    """Labels 0 and 4 make five outputs; a method that has learned tasks keeps their exemplars."""
    x, y = torch.rand(8, 64), torch.tensor([0, 4] * 4)
    scenario = clext.Scenario.from_datasets([((x, y), (x, y))] * 2, incremental="domain")
    method = ICaRL(small(), budget=5)
    options = {"scenario": scenario, "epochs": 1, "progress": False}
    clext.train(method, **options)
    with pytest.raises(ValueError, match="the 2 classes in up to 4 tasks; .*budget=8"):
        clext.train(method, **options)
