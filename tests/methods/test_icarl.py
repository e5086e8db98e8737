"""iCaRL against its definition: exemplars, loss, predictions, features."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rehearsal_tasks import (
    begin,
    every_setting,
    make_examples,
    make_model,
    own_batches,
    ranges,
    run_task,
    run_tasks,
    start,
    train,
)
from torch import nn
from toy_training import assert_same_state

import clext
from clext import EWC, ICaRL
from clext.methods.parts.checksum import checksums
from clext.methods.parts.exemplars import herd
from clext.training.graphs import GraphedSteps

both_norms = pytest.mark.parametrize("norm", [True, False])


def normal(rows, norm):
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
    for number in range(3):
        train(method, begin(method, "class", number))
        inputs, labels = make_examples("class", number)
        each = 8 // (2 * (number + 1))
        expected = {label: entries[:each] for label, entries in expected.items()}
        for label in labels.unique().tolist():
            own = inputs[labels == label]
            order = obvious_herd(features(method.model, own, norm), each, norm)
            expected[label] = own[order]
        method.consolidate(own_batches(method, "class", number))
        assert list(method._sets) == list(expected)
        for label, entries in expected.items():
            assert torch.equal(torch.cat(method._sets[label]), entries)


def test_classes_that_come_again_share_their_exemplars_among_the_tasks():
    method = ICaRL(make_model("domain"), budget=13)
    run_tasks(method, "domain")
    for entries in method._sets.values():
        assert [len(entry) for entry in entries] == [2, 2, 2]  # 13 // 2 classes // 3 tasks


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
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_task_is_trained_on_its_examples_and_all_exemplars(setting, number, device):
    method = ICaRL(make_model(setting, device=device), budget=9)
    run_tasks(method, setting, tasks=number)
    with torch.no_grad(), method.outputs.full():
        stored = [entry for entries in method._sets.values() for entry in entries]
        own, own_labels = make_examples(setting, number, device=device)
        union = torch.cat([own, *stored])
        before = method.model(union)
    inputs, labels, targets = begin(method, setting, number)
    assert inputs.equal(union)
    assert labels[: len(own)].equal(own_labels + start(setting, number))
    kept = {label: sum(map(len, entries)) for label, entries in method._sets.items()}
    assert {label: labels[len(own) :].tolist().count(label) for label in kept} == kept
    rows = torch.arange(0, len(inputs), 3, device=device)
    with torch.no_grad():
        method.model[0].weight.add_(0.1)
    loss = method.loss(inputs[rows], labels[rows], targets[rows])
    with method.outputs.full():
        expected = obvious_loss(
            method.model, before[rows], setting, number, inputs[rows], labels[rows]
        )
    torch.testing.assert_close(loss, expected)


@every_setting
def test_without_recorded_outputs_the_loss_of_own_examples_is_the_same(setting):
    method = ICaRL(make_model(setting), budget=9)
    run_task(method, setting, 0)
    block, active = ranges(setting, 1)
    own, local = make_examples(setting, 1)
    inputs, labels, targets = begin(method, setting, 1)
    rows = torch.arange(len(own))
    with torch.no_grad():
        method.model[0].weight.add_(0.1)
    recorded = method.loss(inputs[rows], labels[rows], targets[rows])
    torch.testing.assert_close(method.loss(own, local), recorded)
    method.begin_task(block=block, active=active)
    torch.testing.assert_close(method.loss(own, local), recorded)


def test_the_temperature_softens_what_is_distilled():
    targets = []
    for temperature in (1.0, 4.0):
        method = ICaRL(make_model("class"), temperature=temperature)
        run_task(method, "class", 0)
        targets.append(begin(method, "class", 1)[2])
    logits = targets[0][:, :2].logit()
    torch.testing.assert_close(targets[1][:, :2], (logits / 4).sigmoid())
    assert targets[0][:, 2:].equal(targets[1][:, 2:])


@both_norms
@every_setting
def test_the_nearest_mean_of_exemplars_decides(setting, norm, device):
    method = ICaRL(make_model(setting, device=device), budget=9, norm=norm)
    run_tasks(method, setting)
    inputs = torch.randn(20, 5, dtype=torch.float64, device=device)
    for number in range(3) if setting == "task" else [2]:
        active = ranges(setting, number)[1]
        with method.outputs.selected(active):
            scores = method.predict(inputs)
        for place, label in enumerate(active or range(2)):
            mean = features(method.model, torch.cat(method._sets[label]), norm).mean(dim=0)
            distance = (features(method.model, inputs, norm) - normal(mean, norm)).norm(dim=1)
            torch.testing.assert_close(scores[:, place], -distance)


def test_until_there_are_exemplars_logits_decide_and_new_classes_have_means_of_all_examples():
    method = ICaRL(make_model("class"), budget=9)
    begin(method, "class", 0)
    inputs = torch.randn(20, 5, dtype=torch.float64)
    assert torch.equal(method.predict(inputs), method.model(inputs))
    assert method.predict(inputs).shape == (20, 2)
    method.consolidate(own_batches(method, "class", 0))
    own, labels = begin(method, "class", 1)[:2]
    scores = method.predict(inputs)
    mean = normal(features(method.model, own[labels == 3]).mean(dim=0), True)
    expected = -(features(method.model, inputs) - mean).norm(dim=1)
    torch.testing.assert_close(scores[:, 3], expected)
    block, active = ranges("class", 1)
    method.begin_task(block=block, active=active)  # whose examples it does not know
    assert method.predict(inputs)[:, 2:].eq(-torch.inf).all()
    torch.testing.assert_close(method.predict(inputs)[:, :2], scores[:, :2])


def test_means_are_made_anew_when_something_has_changed():
    method = ICaRL(make_model("class"), budget=6)
    run_task(method, "class", 0)
    inputs, sizes = torch.randn(3, 5, dtype=torch.float64), []
    method.model[0].register_forward_hook(lambda _m, _i, result: sizes.append(len(result)))

    def predicted():
        sizes.clear()
        method.predict(inputs)
        return sorted(sizes)

    assert predicted() == [3, 6]
    assert predicted() == [3]
    with torch.no_grad():
        method.model[2].bias.add_(1)
    assert predicted() == [3, 6]
    assert predicted() == [3]
    method.model[2].bias.data.add_(1)  # which no counter of versions sees
    assert predicted() == [3, 6]
    method.model[2].bias.data.copy_(method.model[2].bias.flip(0))
    assert predicted() == [3, 6]
    begin(method, "class", 1)
    assert predicted() == [3, 6, 12]
    method.consolidate(own_batches(method, "class", 1))
    assert predicted() == [3, 4]


def test_recorded_steps_of_a_combination_are_seen():
    """They leave no trace on the host."""
    model = make_model("domain")
    method = EWC(model).combine(ICaRL(model))
    run_task(method, "domain", 0)
    optimizer = clext.optim.Adam(model.parameters(), method=method)
    examples = begin(method, "domain", 1)
    steps = GraphedSteps(method, optimizer, examples, 2, "fp32", capture=lambda function: function)
    before = method.parts[1]._version()
    steps.run_epoch(torch.arange(len(examples[0])), lambda: None)
    assert method.parts[1]._version() != before


def test_inputs_with_gradients_are_kept_without():
    method = ICaRL(make_model("domain"), budget=4)
    inputs, labels = make_examples("domain", 0)
    method.consolidate([(inputs.requires_grad_(), labels)])
    kept = [entry for entries in method._sets.values() for entry in entries]
    assert not any(entry.requires_grad for entry in kept)


def test_predicting_leaves_modes_and_batch_statistics_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().train()
    method = ICaRL(model)
    run_task(method, "domain", 0)
    model[1].eval()
    before = model.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    method.predict(torch.randn(3, 5, dtype=torch.float64))
    method.consolidate(own_batches(method, "domain", 1))
    assert_same_state(model.state_dict(), before)
    assert [module.training for module in model.modules()] == [True, True, False, True]


# ------------------------------------------------------------------ features


class Cosine(nn.Module):
    """Whose logits no nn.Linear makes by itself."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return 10 * self.head(self.body(x).relu())


@pytest.mark.parametrize("layer", ["1", 1])
def test_the_layer_of_the_features_can_be_named(layer):
    model = make_model("domain")
    method = ICaRL(model, features=layer)
    assert method.features == "1"
    run_task(method, "domain", 0)
    inputs = torch.randn(3, 5, dtype=torch.float64)
    hidden = normal(model[0](inputs), True)
    mean = normal(normal(model[0](torch.cat(method._sets[1])), True).mean(dim=0), True)
    torch.testing.assert_close(method.predict(inputs)[:, 1], -(hidden - mean).norm(dim=1))


def test_a_layer_that_the_model_has_not_is_refused_at_once():
    with pytest.raises(
        ValueError, match="icarl: the model has no layer 'tail'; features must be one of body, head"
    ):
        ICaRL(Cosine(), features="tail")


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (None, "no nn.Linear makes the outputs of Cosine by itself; name the layer .* features="),
        ("tail", "the model has no layer 'tail'; features must be one of body, head"),
    ],
)
def test_a_layer_that_cannot_be_found_is_said_and_nothing_changes(features, message):
    model = Cosine().double()
    model.tail = nn.Identity()
    method = ICaRL(model, features=features)
    del model.tail
    before = method.state_dict()
    with pytest.raises(ValueError, match=f"icarl: {message}"):
        method.consolidate(own_batches(method, "domain", 0))
    assert_same_state(method.state_dict(), before)
    ICaRL(model, features="head").consolidate(own_batches(method, "domain", 0))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.cfloat]
)
def test_checksums_differ_where_one_number_does(dtype, device):
    values = torch.arange(24).remainder(5).to(device, dtype).view(2, 3, 4).transpose(0, 2)
    before = checksums([values, values])
    assert checksums([values.clone(), values]) == before
    changed = values.clone()
    changed[3, 1, 1] = 0 if changed[3, 1, 1] != 0 else 1
    assert checksums([values, changed]) != before
    assert checksums([values.flip(0), values]) != before


def test_checksums_of_nothing_and_of_more_than_a_block(device):
    assert checksums([]) == ()
    many = torch.zeros(2**20 + 5, device=device)
    before = checksums([many, torch.zeros(())])
    many[-1] = -0.0
    assert checksums([many, torch.zeros(())]) != before


def test_classes_of_earlier_tasks_between_those_of_a_task_are_distilled():
    """Tasks {0, 1}, {2, 3} and {0, 3}: the third has the outputs 0 to 3, of which two are old."""
    method = ICaRL(make_model("class"), budget=12)
    inputs, _ = make_examples("class", 0)
    active = range(4)
    for classes, block in (((0, 1), range(2)), ((2, 3), range(2, 4)), ((0, 3), range(4))):
        labels = torch.tensor(classes).repeat(len(inputs) // 2 + 1)[: len(inputs)]
        with torch.no_grad(), method.outputs.full():
            before = method.model(inputs)[:, :4].sigmoid()
        began = method.begin_task((inputs, labels), block=block, active=active)
        targets = began[2][: len(inputs)]
        if classes == (0, 3):
            assert torch.allclose(targets[:, 1:3], before[:, 1:3])
            assert torch.equal(targets[:, [0, 3]], F.one_hot(labels, 4)[:, [0, 3]].double())
            losses = method.loss(inputs, labels), method.loss(inputs, labels, targets)
            torch.testing.assert_close(*losses)
        train(method, began)
        method.consolidate([(inputs, labels)])
