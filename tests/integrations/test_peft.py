"""PEFT: adapters protected, and the base protected while LoRA trains."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import clext

peft = pytest.importorskip("peft")

from clext.integrations.peft import MergedPenalty  # noqa: E402  (imports peft)

pytestmark = pytest.mark.filterwarnings("ignore::clext.importance.SlowImportanceWarning")
EXACT = {"rtol": 0, "atol": 1e-12}


class Net(nn.Module):
    """A layer of each kind that LoRA adapts, from class indices [N, 4] to logits [N, 3]."""

    def __init__(self):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        self.table = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 4, 3, padding=1)
        self.turned = transformers.pytorch_utils.Conv1D(5, 16)
        self.body = nn.Linear(5, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.conv(self.table(x).mT)).flatten(1)
        return self.head(self.norm(torch.tanh(self.body(torch.tanh(self.turned(h))))))


ADAPTED = ["table", "conv", "turned", "body"]


def make_data(seed=0, samples=24):
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(7, (samples, 4), generator=random)
    return x, torch.randint(3, (samples,), generator=random)


def measured(kind=clext.EWC, strength=3.0, **options):
    """A network and a method that has measured it."""
    model = Net().double()
    method = kind(model, strength=strength, **options)
    method.consolidate([make_data()])
    return model, method


def with_lora(model, **options):
    config = peft.LoraConfig(
        **{"r": 2, "lora_alpha": 3, "target_modules": ADAPTED, "lora_dropout": 0.5, **options}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT has to say of Conv1D
        return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def moved(model):
    """The model with all that is trained somewhere else."""
    with torch.no_grad():
        for entry in model.parameters():
            if entry.requires_grad:
                entry.add_(torch.randn_like(entry), alpha=0.3)
    return model


def two_adapters(model):
    lora = with_lora(model)
    lora.add_adapter("second", peft.LoraConfig(r=3, target_modules=["body", "turned"]))
    lora.base_model.set_adapter(["default", "second"])
    return lora.double()


CASES = {
    "plain": with_lora,
    "biases": lambda model: with_lora(model, bias="all"),
    "a head of its own": lambda model: with_lora(model, modules_to_save=["head", "norm"]),
    "two adapters": two_adapters,
}


def dense_penalty(lora, method):
    """The penalty of weights that `merge_and_unload` makes, differentiable in what is trained."""
    trained = {name: p for name, p in lora.named_parameters() if p.requires_grad}
    layers = dict(lora.base_model.model.named_modules())
    value = torch.zeros((), dtype=torch.float64)
    for name, importance in method.importance.items():
        path, _, kind = name.rpartition(".")
        layer = layers[path]
        if hasattr(layer, "modules_to_save"):
            theta = getattr(layer.modules_to_save["default"], kind)
        elif hasattr(layer, "base_layer"):
            theta = getattr(layer.base_layer, kind)
            if kind == "weight":
                theta = theta + sum(
                    layer.get_delta_weight(key)
                    for key in layer.active_adapters
                    if key in layer.scaling
                )
        else:
            theta = getattr(layer, kind)
        if theta.requires_grad:
            value = value + (importance * (theta - method.anchor[name]).square()).sum()
    value = method.strength * value
    return value, torch.autograd.grad(value, trained.values(), allow_unused=True)


# ------------------------------------------------------------------ adapters alone


@pytest.mark.parametrize("kind", [clext.EWC, clext.SI])
def test_adapters_alone_are_protected_like_any_parameters(kind):
    lora = moved(with_lora(Net().double()))
    base = {n: p.clone() for n, p in lora.named_parameters() if not p.requires_grad}
    method = kind(lora, strength=100.0)
    method.attach(optimizer := torch.optim.SGD(lora.parameters(), lr=0.1))
    for task in range(2):
        for _ in range(3):
            method.loss(*make_data(task)).backward()
            optimizer.step()
            optimizer.zero_grad()
        method.consolidate([make_data(task)])
    assert all("lora_" in name for name in method.importance)
    assert all(entry.any() for entry in method.importance.values())
    moved(lora)
    expected = sum(
        (importance * (p - method.anchor[name]).square()).sum()
        for (name, importance), p in zip(
            method.importance.items(),
            filter(lambda p: p.requires_grad, lora.parameters()),
            strict=True,
        )
    )
    torch.testing.assert_close(method.penalty(), 100.0 * expected)
    assert all(p.equal(base[n]) for n, p in lora.named_parameters() if not p.requires_grad)


def test_a_method_made_before_the_adapters_may_protect_these():
    model = Net().double()
    method = clext.EWC(model)
    lora = moved(with_lora(model))
    method.begin_task()
    method.consolidate([make_data()])
    method.begin_task()
    moved(lora)
    assert method.penalty() > 0


# ------------------------------------------------------------------ the base protected


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("displaced", [False, True], ids=["at the anchor", "away from it"])
def test_the_penalty_is_that_of_the_merged_weights(case, displaced):
    """Value and gradients, in both ways, against the dense weights under autograd."""
    model, method = measured()
    if displaced:
        moved(model)
        model.body.weight.grad = torch.ones_like(model.body.weight)  # left by the task before
    lora = moved(CASES[case](model))
    value, gradients = dense_penalty(lora, method)
    trained = [p for p in lora.parameters() if p.requires_grad]
    guard = MergedPenalty(method)
    penalty = guard.penalty()
    found = torch.autograd.grad(penalty, trained)
    torch.testing.assert_close(penalty, value, **EXACT)
    before = [torch.randn_like(p) for p in trained]
    for p, gradient in zip(trained, before, strict=True):
        p.grad = 8 * gradient
    torch.testing.assert_close(guard.add_penalty_grad_(8.0), value.detach(), **EXACT)
    for p, start, mine, expected in zip(trained, before, found, gradients, strict=True):
        torch.testing.assert_close(mine, expected, **EXACT)
        torch.testing.assert_close(p.grad / 8 - start, expected, **EXACT)


def test_no_weight_is_kept_for_the_backward_pass():
    model, method = measured()
    lora = moved(with_lora(model))
    shapes = {p.shape for n, p in lora.named_parameters() if n.endswith("base_layer.weight")}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        MergedPenalty(method).penalty()
    assert not shapes & set(kept)


@pytest.mark.parametrize("way", ["attached", "by hand", "in the loss"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, clext.optim.SGD])
def test_every_way_takes_the_same_steps(way, kind):
    def train(way, kind):
        torch.manual_seed(0)
        model, method = measured(strength=0.5)
        lora = moved(with_lora(model, modules_to_save=["head"], lora_dropout=0.0))
        guard = MergedPenalty(method)
        optimizer = kind(lora.parameters(), lr=0.1)
        if way == "attached":
            guard.attach(optimizer)
        for _ in range(3):
            loss = guard.loss(*make_data(1)) + (guard.penalty() if way == "in the loss" else 0)
            loss.backward()
            if way == "by hand":
                guard.add_penalty_grad_()
            optimizer.step()
            if way != "attached":
                guard.update()
            optimizer.zero_grad()
        assert method.steps == 3
        return [p.detach() for p in lora.parameters()]

    for mine, expected in zip(train(way, kind), train("by hand", torch.optim.SGD), strict=True):
        torch.testing.assert_close(mine, expected, **EXACT)


def test_an_optimizer_of_clext_takes_it_as_its_method():
    model, method = measured()
    lora = moved(with_lora(model))
    guard = MergedPenalty(method)
    optimizer = clext.optim.AdamW(lora.parameters(), lr=0.01, method=guard)
    expected = guard.penalty().detach()
    guard.loss(*make_data(1)).backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.penalty, expected)
    assert method.steps == 2


def test_the_pull_counts_once_in_a_step():
    model, method = measured()
    guard = MergedPenalty(method) if moved(with_lora(model)) else None
    guard.loss(*make_data()).backward()
    guard.add_penalty_grad_()
    with pytest.raises(RuntimeError, match="would count twice"):
        guard.add_penalty_grad_()
    guard.update()
    guard.model.zero_grad()
    (guard.loss(*make_data()) + guard.penalty()).backward()
    with pytest.raises(RuntimeError, match="would count twice"):
        guard.add_penalty_grad_()


def test_state_may_be_in_bfloat16():
    model = Net()
    method = clext.EWC(model, strength=1.0, state_dtype=torch.bfloat16)
    method.importance = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    lora = moved(with_lora(model))
    value, gradients = dense_penalty(lora, method)
    pulled = MergedPenalty(method).add_penalty_grad_()
    torch.testing.assert_close(pulled.double(), value.detach(), rtol=1e-4, atol=0)
    trained = [p for p in lora.parameters() if p.requires_grad]
    for p, expected in zip(trained, gradients, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_change_too_small_for_the_sum_with_the_weight_counts(dtype):
    model = Net().to(dtype)
    method = clext.EWC(model, strength=1.0)
    method.importance = {name: torch.ones_like(p) for name, p in method.importance.items()}
    lora = with_lora(model, target_modules=["body"])
    with torch.no_grad():
        lora.base_model.model.body.lora_B["default"].weight.fill_(1e-5)
    delta = lora.base_model.model.body.get_delta_weight("default").float()
    torch.testing.assert_close(MergedPenalty(method).penalty().detach(), delta.square().sum())


# ------------------------------------------------------------------ from task to task


def merged_copy(lora):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return copy.deepcopy(lora).merge_and_unload()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("anchors", ["latest", "all"])
def test_the_end_of_a_task_is_measured_as_if_merged(case, anchors):
    model, method = measured(anchors=anchors)
    known = method.state_dict()
    lora = moved(CASES[case](model))
    before = {n: (p.clone(), p.requires_grad) for n, p in lora.named_parameters()}

    plain = clext.EWC(merged_copy(lora).requires_grad_(True), strength=3.0, anchors=anchors)
    plain.load_state_dict(known)
    plain.steps = 1  # or it warns that it saw none
    plain.consolidate([make_data(1)])
    guard = MergedPenalty(method)
    guard.steps = 1
    guard.consolidate([make_data(1)])

    assert (method.tasks, guard.tasks) == (2, 2)
    assert list(method.importance) == list(plain.importance)
    for name in plain.importance:
        torch.testing.assert_close(method.importance[name], plain.importance[name], **EXACT)
        torch.testing.assert_close(method.anchor[name], plain.anchor[name], **EXACT)
    assert method.constant == pytest.approx(plain.constant, abs=1e-12)
    for name, p in lora.named_parameters():
        assert p.equal(before[name][0])
        assert p.requires_grad == before[name][1]
    expected = dense_penalty(lora, method)[0] + 3.0 * plain.constant
    torch.testing.assert_close(guard.penalty(), expected, **EXACT)
    assert expected < 1e-20 or anchors == "all"


@pytest.mark.parametrize("kind", [clext.MAS, clext.SCP, clext.SI, clext.RWalk])
def test_other_methods_measure_what_is_merged_too(kind):
    """Those that follow the steps of the weights have seen none; the anchor moves all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing has been trained
        model, method = measured(kind)
    method.importance = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    known = method.state_dict()
    lora = moved(with_lora(model))
    plain = kind(merged_copy(lora).requires_grad_(True), strength=3.0)
    plain.load_state_dict(known)
    plain.steps = method.steps = 1
    plain.consolidate([make_data(1)])
    MergedPenalty(method).consolidate([make_data(1)])
    for name in plain.importance:
        torch.testing.assert_close(method.importance[name], plain.importance[name], **EXACT)
        torch.testing.assert_close(method.anchor[name], plain.anchor[name], **EXACT)


@pytest.mark.filterwarnings("error", "ignore::clext.importance.SlowImportanceWarning")
@pytest.mark.parametrize("safe", [False, True])
def test_merged_weights_are_protected_under_their_old_names(safe):
    """Three tasks: whole, by LoRA, whole."""
    model, method = measured()
    names = list(method.importance)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    lora = moved(with_lora(model, modules_to_save=["head"]))
    guard = MergedPenalty(method)
    value = guard.penalty()

    model = lora.merge_and_unload(safe_merge=safe).requires_grad_(True)
    method.refresh_parameters()  # the head is another one; attach and begin_task do so too
    torch.testing.assert_close(method.penalty(), value)  # the anchor is still the old base
    assert all(method.anchor[name].equal(p) for name, p in old.items())

    known = {name: entry.clone() for name, entry in method.importance.items()}
    method.consolidate([make_data(1)])
    assert list(method.importance) == names
    fresh = clext.EWC(model)
    fresh.consolidate([make_data(1)])
    for name, p in model.named_parameters():
        assert method.anchor[name].equal(p)
        torch.testing.assert_close(method.importance[name], known[name] + fresh.importance[name])

    method.attach(optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
    method.loss(*make_data(2)).backward()
    optimizer.step()
    assert method.penalty() > 0


def test_a_part_of_the_model_may_have_the_adapters():
    model = nn.Sequential(Net(), nn.Linear(3, 3)).double()
    method = clext.EWC(model)
    method.consolidate([make_data()])
    names = list(method.importance)
    model[0] = moved(with_lora(model[0]))
    guard = MergedPenalty(method)
    assert guard.penalty() > 0
    assert list(method.importance) == names
    model[0] = model[0].merge_and_unload()
    method.begin_task()
    assert list(method.importance) == names


def test_a_second_adapter_on_the_merged_weights():
    model, method = measured()
    guard = MergedPenalty(method) if (lora := moved(with_lora(model))) else None
    guard.add_penalty_grad_()
    guard.consolidate([make_data(1)])
    lora = moved(with_lora(lora.merge_and_unload()))
    torch.testing.assert_close(
        MergedPenalty(method).penalty(), dense_penalty(lora, method)[0], **EXACT
    )


def test_importance_of_the_merged_model_is_refused_while_it_is_frozen():
    model, method = measured()
    with_lora(model).merge_and_unload()
    with pytest.raises(ValueError, match="frozen, so they have no gradient; call model.requires"):
        method.consolidate([make_data(1)])


def test_state_is_the_base_s_and_goes_to_another_process():
    model, method = measured()
    names = list(method.state_dict()["state"]["importance"])
    moved(with_lora(model))
    guard = MergedPenalty(method)
    guard.add_penalty_grad_()
    assert list(guard.state_dict()["state"]["importance"]) == names
    for other in (copy.deepcopy(guard), pickle.loads(pickle.dumps(guard))):
        torch.testing.assert_close(other.penalty(), guard.penalty())
        with torch.no_grad():
            for entry in other.base.importance.values():
                entry.zero_()
        assert other.penalty() == 0
        other.load_state_dict(guard.state_dict())
        torch.testing.assert_close(other.penalty(), guard.penalty())
        other.load_flat_state_dict(guard.flat_state_dict())
        torch.testing.assert_close(other.penalty(), guard.penalty())
    assert guard.flat_state_dict().keys() == method.flat_state_dict().keys()


# ------------------------------------------------------------------ what cannot be


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize(
    "door",
    {
        "begin_task": lambda method, _: method.begin_task(),
        "attach": lambda method, lora: method.attach(torch.optim.SGD(lora.parameters())),
        "consolidate": lambda method, _: method.consolidate([make_data()]),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_base_that_a_method_cannot_protect_through_lora_is_no_secret(door, bias):
    model, method = measured()
    lora = with_lora(model, bias=bias)
    with pytest.raises(ValueError, match=r"use clext.integrations.peft.MergedPenalty\(ewc\)"):
        door[1](method, lora)


@pytest.mark.parametrize("call", ["penalty", "add_penalty_grad_"])
def test_nor_by_hand(call):
    model, method = measured()
    with_lora(model)
    with pytest.raises(ValueError, match=r"use clext.integrations.peft.MergedPenalty\(ewc\)"):
        getattr(method, call)()


def test_nor_by_a_fused_optimizer():
    model, method = measured()
    lora = with_lora(model)
    optimizer = clext.optim.SGD(lora.parameters(), lr=0.1, method=method)
    method.loss(*make_data()).backward()
    with pytest.raises(ValueError, match=r"use clext.integrations.peft.MergedPenalty\(ewc\)"):
        optimizer.step()


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (lambda: peft.LoraConfig(target_modules=["body"], use_dora=True), "'body'"),
        (lambda: peft.LoraConfig(target_modules=["head"], lora_bias=True), "'head'"),
        (lambda: peft.IA3Config(target_modules=["body"], feedforward_modules=[]), "'body'"),
    ],
    ids=["DoRA", "lora_bias", "IA3"],
)
def test_other_adapters_are_refused_by_name(config, name):
    model, method = measured()
    peft.get_peft_model(model, config())
    with pytest.raises(ValueError, match=f"{name} changes its layer by more than s B A"):
        MergedPenalty(method)


def test_a_method_that_knows_no_adapted_weight_is_refused():
    lora = with_lora(Net())
    with pytest.raises(ValueError, match="make the ewc of the model first"):
        MergedPenalty(clext.EWC(lora))
    with pytest.raises(ValueError, match="expected a method with a quadratic penalty"):
        MergedPenalty(clext.Baseline(lora))


def test_kronecker_factors_are_not_for_weights_that_lora_changes():
    """Not quietly as nothing: by the importance, which is 0 where there are factors."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    method = clext.KFAC(model)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="clext: kfac saw no step")
        method.consolidate([(x, y)])
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2))
    with pytest.raises(ValueError, match="kfac protects '0.weight', which is frozen now while an"):
        method.begin_task()
    with pytest.raises(ValueError, match=r"MergedPenalty: kfac has factors .* take clext.EWC"):
        MergedPenalty(method)
