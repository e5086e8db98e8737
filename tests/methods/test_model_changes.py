"""Models that change: frozen, tied, unused, added, grown and replaced parameters, other devices."""

from __future__ import annotations

import pytest
import torch
from changing_models import Spare, Tied, frozen, grow, grow_naive, run_task, twins
from condition_loops import WAYS, Trained, assert_agree
from torch import nn
from toy_training import CLASSES, assert_same_state, make_model, make_task

from clext import EWC, METHODS, SI, RWalk

pytestmark = pytest.mark.filterwarnings("ignore::clext.importance.SlowImportanceWarning")

every_case = pytest.mark.parametrize("case", ["ewc", "si", "rwalk"])
every_kind = pytest.mark.parametrize("kind", [EWC, SI, RWalk])
every_way = pytest.mark.parametrize("way", WAYS)


# ------------------------------------------------------------------ frozen, tied, unused


@every_case
@every_way
@pytest.mark.parametrize("make", [frozen, Tied, Spare], ids=["frozen", "tied", "unused"])
def test_only_what_is_trained_counts_and_once(case, way, make, device):
    torch.manual_seed(4)
    model = make()
    trained, defined = twins(case, way, device, model)
    for number in range(2):
        run_task(number, trained, defined)
    assert_agree(trained, defined)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert list(trained.method.importance) == trainable


@every_kind
def test_where_all_is_frozen_nothing_is_protected_and_that_is_said(kind):
    method = kind(make_model())
    method.model.requires_grad_(False)
    for call in (method.penalty, method.add_penalty_grad_):
        with pytest.raises(ValueError, match="that the method knows are frozen, so it protects"):
            call()
    method.model.add_module("new", nn.Linear(2, 2))  # a probe on a frozen body is no mistake
    assert method.penalty() == method.add_penalty_grad_() == 0


@every_way
@every_kind
def test_a_parameter_frozen_later_stays_and_costs_the_same_in_both_ways(kind, way, device):
    trained = Trained(kind.name, way, device)
    run_task(0, trained)
    with torch.no_grad():
        for parameter in trained.model.parameters():
            parameter.add_(0.5)
    trained.optimizer.zero_grad()
    before, whole = trained.model[0].weight.detach().clone(), trained.method.penalty().item()
    trained.model[0].requires_grad_(False)
    expected = trained.method.penalty().item()
    assert 0 < expected < whole
    trained.backward(make_task(1, device=device)[0])
    if way == "apart":
        assert trained.method.add_penalty_grad_().item() == pytest.approx(expected)
    else:
        trained.optimizer.step()
        assert trained.optimizer.penalty.item() == pytest.approx(expected)
    run_task(1, trained)
    assert trained.model[0].weight.grad is None
    assert torch.equal(trained.model[0].weight, before)
    assert "0.weight" in trained.method.importance


@every_way
@every_kind
@pytest.mark.parametrize("change", ["unfrozen", "added"])
def test_a_parameter_that_comes_later_is_protected_from_then_on(kind, way, change, device):
    model = make_model()
    model[0].requires_grad_(change == "added")
    trained = Trained(kind.name, way, device, model)
    run_task(0, trained)
    important = {name: entry.clone() for name, entry in trained.method.importance.items()}
    if change == "added":
        model.append(nn.Linear(CLASSES, CLASSES, device=device, dtype=torch.float64))
    model[0].requires_grad_(True)
    if not (change == "unfrozen" and way == "fused"):  # the pass asks where a gradient is the first
        trained.method.refresh_parameters()
        trained.restart()
    trained.step(make_task(1, device=device)[0])
    new = "3.weight" if change == "added" else "0.weight"
    names = [name for name, _ in model.named_parameters()]
    assert list(trained.method.importance) == names
    assert all(torch.equal(trained.method.importance[name], important[name]) for name in important)
    assert trained.method.importance[new].eq(0).all()
    run_task(1, trained)
    assert trained.method.importance[new].gt(0).any()


# ------------------------------------------------------------------ grown, added, replaced


@every_case
@every_way
def test_a_head_that_grows_keeps_the_old_rows_and_starts_the_new_ones(case, way, device, plan):
    trained, defined = twins(case, way, device, make_model())
    run_task(0, trained, defined)
    grow(trained.model)
    grow(defined.model)
    trained.method.begin_task() if way == "apart" else trained.method.refresh_parameters()
    grow_naive(defined.naive)
    for loop in (trained, defined):
        loop.restart()
    assert_agree(trained, defined)
    run_task(1, trained, defined, labels=2)
    run_task(2, trained, defined)
    assert_agree(trained, defined)


@every_kind
def test_a_module_replaced_by_one_of_its_shape_is_the_same_parameter(kind, device):
    """By name: pulled to where its predecessor was."""
    trained = Trained(kind.name, "apart", device)
    run_task(0, trained)
    anchor = trained.method.anchor["2.weight"].clone()
    important = trained.method.importance["2.weight"].clone()
    trained.model[2] = nn.Linear(6, CLASSES, device=device, dtype=torch.float64)
    trained.method.refresh_parameters()
    trained.restart()
    assert torch.equal(trained.method.anchor["2.weight"], anchor)
    assert torch.equal(trained.method.importance["2.weight"], important)
    assert trained.method.penalty().item() > 0
    run_task(1, trained)


@pytest.mark.parametrize(
    ("new", "shapes"),
    [
        (lambda: nn.Linear(6, CLASSES - 1), r"\[3, 6\] and now has \[2, 6\]"),
        (lambda: nn.Linear(5, CLASSES + 1), r"\[3, 6\] and now has \[4, 5\]"),
        (lambda: nn.Conv1d(6, CLASSES, 1), r"\[3, 6\] and now has \[3, 6, 1\]"),
    ],
    ids=["fewer rows", "more rows, fewer columns", "another dimension"],
)
def test_a_shape_that_no_longer_fits_is_named(new, shapes):
    trained = Trained("ewc")
    run_task(0, trained)
    before = trained.method.state_dict()
    trained.model[2] = new().double()
    message = rf"ewc: parameter '2.weight' had shape {shapes}: .*give the new parameter"
    for call in (trained.method.refresh_parameters, trained.method.consolidate):
        with pytest.raises(ValueError, match=message):
            call()
    assert_same_state(trained.method.state_dict(), before)


@pytest.mark.parametrize("name", ["lwf", "replay", "er-ace", "icarl", "dgr", "gem", "agem"])
def test_a_head_smaller_than_what_is_kept_is_refused(name):
    """Examples, or a model as it was, whose classes the smaller head has not."""
    model = make_model()
    method = METHODS[name](model)
    x = torch.rand(8, model[0].in_features, dtype=torch.float64)
    y = torch.arange(8) % CLASSES

    def task(labels):
        method.begin_task((x, labels))
        method.loss(x, labels).backward()
        method.add_penalty_grad_()

    task(y)
    method.consolidate([(x, y)])
    model.zero_grad()
    model[2] = nn.Linear(6, CLASSES - 1).double()
    with pytest.raises((ValueError, IndexError), match=r"2 outputs, and 3 when|out of bounds"):
        task(y % (CLASSES - 1))
    assert method.tasks == 1
    model[2] = nn.Linear(6, CLASSES + 1).double()
    model.zero_grad()
    task(y + 1)
    assert method.loss(x[:4], y[:4]).isfinite()


@pytest.mark.parametrize(
    "name",
    ["lwf", "replay", "der", "derpp", "er-ace", "icarl", "dgr", "gem", "agem", "joint"],
)
def test_a_narrower_layer_inside_is_nobodys_business(name):
    model = nn.Sequential(*make_model(), nn.Tanh(), nn.Linear(CLASSES, CLASSES).double())
    method = METHODS[name](model)
    x, y = torch.rand(8, 5, dtype=torch.float64), torch.arange(8) % CLASSES
    for width in (6, 4):
        model[0], model[2] = nn.Linear(5, width).double(), nn.Linear(width, CLASSES).double()
        began = method.begin_task((x, y))
        assert method.loss(*began).isfinite()
        method.add_penalty_grad_()
        method.consolidate([(x, y)])


def test_sparse_gradients_are_refused_by_name(device):
    model = nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Linear(2, 2)).to(device)
    method = SI(model)
    model(torch.tensor([1, 2], device=device)).sum().backward()
    with pytest.raises(TypeError, match=r"0.weight.* has layout"):
        method.add_penalty_grad_()


# ------------------------------------------------------------------ converted, moved


@every_way
@every_kind
def test_a_model_converted_within_a_task(kind, way, device):
    """The state follows at the next call, and training goes on in the model's new precision."""
    trained = Trained(kind.name, way, device, dtype=torch.float32)
    run = [(x.float().to(device), y.to(device)) for x, y in make_task(0)]
    for batch in run:
        trained.step(batch)
    trained.end_task(run)
    trained.step(run[0])
    important = {name: entry.clone() for name, entry in trained.method.importance.items()}
    trained.model.double()
    trained.method.penalty()
    for name, entry in trained.method.importance.items():
        assert torch.equal(entry, important[name].double())
    trained.restart()
    batches = make_task(1, device=device)
    for batch in batches:
        trained.step(batch)
    trained.end_task(batches)
    assert all(entry.dtype == torch.float64 for entry in trained.method.importance.values())


@every_kind
def test_a_model_moved_after_the_method_was_made(kind, device):
    model = make_model()
    method = kind(model)
    model.to(device)
    assert method.penalty().device.type == method.add_penalty_grad_().device.type == device
    assert all(entry.device.type == device for entry in method.importance.values())


# ------------------------------------------------------------------ other names


def sums(method):
    return {name: entry.sum().item() for name, entry in method.importance.items()}


@every_kind
@pytest.mark.parametrize(
    "wrap", [nn.Sequential, lambda layer: torch.compile(layer, backend="eager")]
)
def test_a_wrapped_layer_keeps_what_is_known_of_it(kind, wrap):
    model = make_model()
    method = kind(model)
    x, y = make_task(0)[0]
    for entry in method.importance.values():
        entry.fill_(2.0)
    method.tasks = 1
    before, anchor = sums(method), method.anchor["0.weight"].clone()
    model[0] = wrap(model[0])
    method.begin_task((x, y))
    after = sums(method)
    assert (list(after) == list(before)) == (wrap is not nn.Sequential)
    assert list(after.values()) == list(before.values())
    assert method.penalty().item() == 0
    assert next(iter(method.anchor.values())).equal(anchor)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend="eager"),
        lambda model: nn.ModuleDict({"module": model}),
        lambda model: nn.ModuleDict({"base_model": nn.ModuleDict({"model": model})}),
    ],
    ids=["compiled", "parallel", "peft"],
)
def test_wrappers_put_nothing_before_a_name(wrap):
    plain, wrapped = EWC(make_model()), EWC(wrap(make_model()))
    assert list(wrapped.importance) == list(plain.importance)
    wrapped.load_state_dict(plain.state_dict())


def test_names_that_would_be_one_stay_two():
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    model.register_parameter("weight", nn.Parameter(torch.zeros(2)))
    assert sorted(EWC(model).importance) == ["module.bias", "module.weight", "weight"]


def test_a_layer_put_before_others_moves_no_importance_to_a_neighbour():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    method = EWC(model)
    method.consolidate([(torch.randn(16, 4), torch.arange(16) % 4)])
    before = list(sums(method).values())
    model.insert(0, nn.Dropout(0.1))
    method.begin_task()
    assert list(sums(method)) == [f"{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")]
    assert list(sums(method).values()) == before
    model.insert(1, nn.Linear(4, 4))  # gets the name of another one
    method.begin_task()
    assert list(sums(method).values()) == [0, 0, *before]
    assert method.penalty().item() == 0


def test_a_path_goes_on_in_a_layer_that_was_wrapped():
    plain, wrapped = (Trained("si", "apart", "cpu") for _ in range(2))
    for trained in (plain, wrapped):
        trained.step(make_task(0)[0])
    wrapped.model[0] = nn.Sequential(wrapped.model[0])
    for trained in (plain, wrapped):
        trained.method.refresh_parameters()
        trained.step(make_task(0)[1])
        trained.end_task(make_task(0))
    pairs = zip(plain.method.importance.values(), wrapped.method.importance.values(), strict=True)
    assert all(torch.equal(one, other) and bool(one.any()) for one, other in pairs)


def test_what_is_known_of_a_parameter_that_is_gone_is_not_forgotten_in_silence():
    model = make_model()
    method = EWC(model)
    method.consolidate(make_task(0))
    torch.nn.utils.parametrizations.weight_norm(model[0])
    with pytest.warns(UserWarning, match="'0.weight' is not in the model any more, .* ewc knew"):
        method.begin_task()
