"""Failures of other continual-learning libraries, each with the test that would catch it here."""

from __future__ import annotations

import io

import pytest
import torch
from changing_models import Tied, frozen, grow, run_task, twins
from condition_loops import WAYS, Defined, Trained, assert_agree
from torch import nn
from toy_training import CLASSES, FEATURES, make_task

from clext import optim

pytestmark = pytest.mark.filterwarnings("ignore::clext.importance.SlowImportanceWarning")

ON_DATA, PATHS = ["ewc", "mas", "scp"], ["si", "rwalk"]

every_case = pytest.mark.parametrize("case", ["ewc", *PATHS])
every_kind = pytest.mark.parametrize("case", [*ON_DATA, *PATHS])
every_way = pytest.mark.parametrize("way", WAYS)


@pytest.mark.parametrize("case", PATHS)
@every_way
def test_saved_weights_that_alias_the_live_ones(case, way, device):
    """A "copy" that follows the parameters makes every movement zero, and SI a no-op."""
    trained = Trained(case, way, device)
    batches = make_task(0, device=device)
    start = {n: p.detach().clone() for n, p in trained.model.named_parameters()}
    for batch in batches:
        trained.step(batch)
    method = trained.method
    live = {p.untyped_storage().data_ptr() for p in trained.model.parameters()}
    for key, entries in method._state.lists.items():
        assert not live & {entry.untyped_storage().data_ptr() for entry in entries}, key
    for name, entry in method.anchor.items():
        assert torch.equal(entry, start[name])
    trained.end_task(batches)
    assert any(bool(entry.gt(0).any()) for entry in method.importance.values())
    anchor = {name: entry.clone() for name, entry in method.anchor.items()}
    trained.step(batches[0])
    for name, parameter in trained.model.named_parameters():
        assert torch.equal(method.anchor[name], anchor[name])
        assert not torch.equal(parameter, anchor[name])


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(FEATURES, 6), nn.BatchNorm1d(6)
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(6, CLASSES)
        self.double()

    def forward(self, x):
        return self.head(self.dropout(torch.tanh(self.norm(self.first(x)))))


@every_kind
def test_importance_measured_in_train_mode(case, device):
    """Batch statistics would move, and dropout would decide what is important."""
    importances = []
    for training in (True, False):
        torch.manual_seed(2)
        trained = Trained(case, "apart", device, Normed())
        batches = make_task(0, device=device)
        for batch in batches:
            trained.step(batch)
        trained.model.train(training)
        buffers = [entry.clone() for entry in trained.model.buffers()]
        trained.end_task(batches)
        for mine, before in zip(trained.model.buffers(), buffers, strict=True):
            assert torch.equal(mine, before)
        importances.append(trained.method.importance)
    for name, entry in importances[0].items():
        assert torch.equal(entry, importances[1][name])


@every_kind
@pytest.mark.parametrize("fails", [False, True], ids=["normal", "exception"])
def test_a_model_left_in_eval_mode(case, fails, device):
    trained = Trained(case, "apart", device, Normed())
    batches = make_task(0, device=device)
    trained.step(batches[0])
    trained.model.train()
    trained.model.norm.eval()  # what the user froze stays frozen
    modes = {name: module.training for name, module in trained.model.named_modules()}
    if fails and case in ON_DATA:
        with pytest.raises(ValueError, match="batch 1"):
            trained.end_task([batches[0], None])
    else:
        trained.end_task(batches)
    assert {name: module.training for name, module in trained.model.named_modules()} == modes


@every_case
@every_way
def test_penalty_and_importance_lost_on_resume(case, way, device):
    trained = Trained(case, way, device)
    run_task(0, trained)
    batches = make_task(1, device=device)
    for batch in batches[:5]:
        trained.step(batch)
    file = io.BytesIO()
    torch.save([trained.model.state_dict(), trained.method.state_dict()], file)
    file.seek(0)
    resumed = Trained(case, way, device)
    for part, state in zip(
        (resumed.model, resumed.method), torch.load(file, weights_only=True), strict=True
    ):
        part.load_state_dict(state)
    penalty = trained.method.penalty().item()
    assert penalty > 0
    assert resumed.method.penalty().item() == penalty
    for loop in (trained, resumed):
        loop.restart()  # the optimizer's state is not the method's
        for batch in batches[5:]:
            loop.step(batch)
        loop.end_task(batches)
    for name, entry in trained.method.importance.items():
        assert torch.equal(resumed.method.importance[name], entry)
        assert torch.equal(resumed.method.anchor[name], trained.method.anchor[name])


@every_case
@every_way
def test_new_rows_of_a_growing_head(case, way, device):
    """No KeyError; the old rows as important as before, and the new ones protected at last."""
    trained = Trained(case, way, device)
    run_task(0, trained)
    old = {name: trained.method.importance[name].clone() for name in ("2.weight", "2.bias")}
    anchors = {name: trained.method.anchor[name].clone() for name in old}
    grow(trained.model)
    trained.method.refresh_parameters()
    trained.restart()
    for name, entry in old.items():
        own, anchor = trained.method.importance[name], trained.method.anchor[name]
        assert torch.equal(own[:CLASSES], entry)
        assert own[CLASSES:].eq(0).all()
        assert torch.equal(anchor[:CLASSES], anchors[name])
        assert torch.equal(anchor[CLASSES:], trained.model.get_parameter(name)[CLASSES:])
    run_task(1, trained, labels=2)
    for name in old:
        assert trained.method.importance[name][CLASSES:].gt(0).any()
    with torch.no_grad():
        trained.model[2].weight[CLASSES:].add_(1.0)
    assert trained.method.penalty().item() > 0


@every_case
@every_way
def test_negative_importance_is_not_kept(case, way, device):
    """Weight decay goes uphill too, and then the path integral falls: a reward, as a penalty."""
    trained = Trained(case, way, device)
    options = {"lr": 0.02, "weight_decay": 10.0}
    if way == "fused":
        options["method"] = trained.method
    kind = optim.AdamW if way == "fused" else torch.optim.AdamW
    trained.optimizer = kind(trained.model.parameters(), **options)
    uphill = False
    for number in range(2):
        batches = make_task(number, device=device)
        for batch in batches:
            trained.step(batch)
            path = trained.method._state.lists.get("path", ())
            uphill |= any(bool(entry.lt(0).any()) for entry in path)
        trained.end_task(batches)
        for entry in trained.method.importance.values():
            assert bool(entry.ge(0).all())
    assert uphill == (case in PATHS)


@every_case
@every_way
@pytest.mark.parametrize("make", [frozen, Tied], ids=["frozen", "tied"])
def test_frozen_and_tied_parameters_counted_wrongly(case, way, make, device):
    """A frozen one must not move or count; a tied one has one importance, and counts once."""
    torch.manual_seed(4)
    model = make()
    trained, defined = twins(case, way, device, model)
    still = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    for number in range(2):
        run_task(number, trained, defined)
    assert_agree(trained, defined)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert list(trained.method.importance) == names
    for name, entry in still.items():
        assert torch.equal(trained.model.get_parameter(name).cpu(), entry)
    with torch.no_grad():
        for parameter in trained.model.parameters():
            parameter.add_(1.0)
    own, anchors = trained.method.importance, trained.method.anchor
    expected = sum(
        (own[name] * (trained.model.get_parameter(name) - anchors[name]).square()).sum().item()
        for name in names
    )
    value = trained.method.strength * expected + trained.method.strength * trained.method.constant
    assert trained.method.penalty().item() == pytest.approx(value)


@every_case
def test_the_penalty_leaks_into_the_next_importance(case, device):
    """What a strong pull does is not what the task has taught."""
    trained, defined = Trained(case, "apart", device), Defined(case, "apart")
    trained.method.strength = defined.naive.strength = 50 * trained.method.strength
    for number in range(2):
        run_task(number, trained, defined)
    assert_agree(trained, defined, rtol=1e-5, atol=1e-7)
