"""KFAC: its penalty against the explicit Kronecker product, and its state through all changes."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian

import clext
from clext.optim import SGD

FEATURES, CLASSES = 5, 3


def make_model(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    layers = nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, CLASSES)
    return nn.Sequential(*layers).to(dtype)


def make_task(number, count=12, dtype=torch.float64):
    random = torch.Generator().manual_seed(50 + number)
    x = torch.randn(count, FEATURES, generator=random, dtype=torch.float64).to(dtype)
    return [(x, torch.randint(CLASSES, (count,), generator=random))]


def learn(method, tasks=2):
    """Some steps of each task by any optimizer, then its end."""
    steps = torch.optim.SGD(method.model.parameters(), lr=0.1)
    handle = method.attach(steps)
    for _ in range(tasks):
        batches = make_task(method.tasks, dtype=next(method.model.parameters()).dtype)
        for x, y in batches * 3:
            steps.zero_grad()
            method.loss(x, y).backward()
            steps.step()
        method.consolidate(batches)
    handle.remove()
    return method


def move(model, seed=9):
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for entry in model.parameters():
            noise = torch.randn(entry.shape, generator=random, dtype=torch.float64)
            entry.add_(0.1 * noise.to(entry))


def explicit(method):
    """The penalty by whole matrices: d^T (G (x) A) d for each layer and task."""
    model, total = method.model, 0.0
    for name, factors in method.factors.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        change = layer.weight - method.anchor[name]
        bias = change.new_zeros(len(change))
        if layer.bias is not None:
            bias = layer.bias - method.anchor[name.replace("weight", "bias")]
        change = torch.cat([bias.unsqueeze(1), change.flatten(1)], 1).flatten()
        for outputs, inputs in zip(factors.outputs, factors.inputs, strict=True):
            total = total + change @ torch.kron(outputs, inputs) @ change
    for name, entry in model.named_parameters():
        total = total + (method.importance[name] * (entry - method.anchor[name]).square()).sum()
    return method.strength * total


def check(method, tolerance=1e-12):
    """Value and gradients by both ways, against the explicit product."""
    model = method.model
    params = [entry for entry in model.parameters() if entry.requires_grad]
    expected = explicit(method)
    gradients = torch.autograd.grad(expected, params)
    assert float(expected.detach()) > 0
    value = method.penalty()
    by_loss = torch.autograd.grad(value, params)
    model.zero_grad()
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(method.add_penalty_grad_(), expected.detach(), rtol=1e-6, atol=0.0)
    for entry, own, wanted in zip(params, by_loss, gradients, strict=True):
        torch.testing.assert_close(own, wanted, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(entry.grad, wanted, rtol=tolerance, atol=tolerance)
    model.zero_grad()
    method.update()


@pytest.mark.parametrize("fisher", ["sample", "exact", "empirical", "reversed"])
def test_the_penalty_is_that_of_the_explicit_product(fisher):
    method = learn(clext.KFAC(make_model(), strength=3.0, fisher=fisher), tasks=3)
    assert [len(pair.inputs) for pair in method.factors.values()] == [3, 3]
    move(method.model)
    check(method)


def test_with_convolutions_and_parameters_without_factors():
    torch.manual_seed(1)
    conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False)
    model = nn.Sequential(conv, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, CLASSES)).double()
    method = clext.KFAC(model.eval(), strength=2.0)
    for number in range(2):
        x = torch.randn(8, 2, 6, 6, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="clext: kfac saw no step")
            method.consolidate([(x, torch.randint(CLASSES, (8,)))])
        move(model, number)
    assert sorted(method.factors) == ["0.weight", "3.weight"]
    assert bool(method.importance["1.weight"].any())
    check(method)


def test_a_step_is_that_of_the_loss_with_the_penalty():
    models = [make_model(), make_model()]
    by_hand, by_loss = (clext.KFAC(model, strength=5.0, fisher="exact") for model in models)
    for method in (by_hand, by_loss):
        optimizer = torch.optim.SGD(method.model.parameters(), lr=0.05)
        for number in range(2):
            for x, y in make_task(number) * 4:
                optimizer.zero_grad()
                loss = method.loss(x, y)
                if method is by_loss:
                    loss = loss + method.penalty()
                loss.backward()
                if method is by_hand:
                    method.add_penalty_grad_()
                optimizer.step()
                method.update()
            method.consolidate(make_task(number))
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_an_optimizer_of_clext_does_the_same():
    models = [make_model(), make_model()]
    ended = []
    for model, kind in zip(models, (torch.optim.SGD, SGD), strict=True):
        method = clext.KFAC(model, strength=5.0, fisher="exact")
        own = kind is SGD
        optimizer = kind(model.parameters(), lr=0.05, **({"method": method} if own else {}))
        if not own:
            method.attach(optimizer)
        for number in range(2):
            for x, y in make_task(number) * 4:
                optimizer.zero_grad()
                method.loss(x, y).backward()
                optimizer.step()
            method.consolidate(make_task(number))
        ended.append([*model.parameters()])
    for one, other in zip(*ended, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_scaled_gradient_gets_a_scaled_pull():
    method = learn(clext.KFAC(make_model(), strength=3.0))
    move(method.model)
    method.model.zero_grad()
    value = method.add_penalty_grad_(scaler=8.0)
    scaled = [entry.grad.clone() for entry in method.model.parameters()]
    method.model.zero_grad()
    method.update()
    torch.testing.assert_close(value, method.add_penalty_grad_())
    for entry, found in zip(method.model.parameters(), scaled, strict=True):
        torch.testing.assert_close(found, 8 * entry.grad)


def test_the_pull_is_added_once_and_refused_twice():
    method = learn(clext.KFAC(make_model()))
    move(method.model)
    method.add_penalty_grad_()
    once = [entry.grad.clone() for entry in method.model.parameters()]
    with pytest.raises(RuntimeError, match="the pull is in these gradients already"):
        method.add_penalty_grad_()
    for entry, before in zip(method.model.parameters(), once, strict=True):
        assert torch.equal(entry.grad, before)
    method.loss(*make_task(0)[0]).backward()  # one more backward pass of this step
    with pytest.raises(RuntimeError, match="the pull is in these gradients already"):
        method.add_penalty_grad_()


def test_its_second_derivative_is_the_product_itself():
    method = learn(clext.KFAC(make_model(), strength=0.5))
    params = {name: entry.detach() for name, entry in method.model.named_parameters()}
    found = hessian(lambda values: method.penalty(values))(params)["2.weight"]["2.weight"]
    factors = method.factors["2.weight"]
    product = sum(
        torch.kron(outputs, inputs[1:, 1:])
        for outputs, inputs in zip(factors.outputs, factors.inputs, strict=True)
    )
    torch.testing.assert_close(found.reshape(product.shape), product)
    moved = {"2.bias": params["2.bias"] + 1.0}
    one = method.penalty(moved)
    functional_call(method.model, moved, (make_task(0)[0][0],))
    with torch.no_grad():
        method.model[2].bias.add_(1.0)
    torch.testing.assert_close(one, explicit(method))


def test_its_state_goes_on_to_the_same_bits():
    first = learn(clext.KFAC(make_model(), strength=3.0))
    for way in ("state_dict", "flat", "pickle"):
        if way == "pickle":
            second = pickle.loads(pickle.dumps(first))
        else:
            second = clext.KFAC(copy.deepcopy(first.model))
            if way == "flat":
                second.load_flat_state_dict(first.flat_state_dict())
            else:
                second.load_state_dict(first.state_dict())
        third = clext.KFAC(copy.deepcopy(first.model))
        third.load_state_dict(first.state_dict())
        for method in (second, third):
            move(method.model)
        assert torch.equal(second.penalty(), third.penalty()), way
        learn_more = [learn_one(method) for method in (second, third)]
        assert torch.equal(*learn_more), way


def learn_one(method):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="clext: kfac saw no step")
        method.consolidate(make_task(method.tasks))
    move(method.model, 4)
    return method.penalty()


def test_the_factors_of_another_layer_are_refused_and_nothing_is_changed():
    method = learn(clext.KFAC(make_model()))
    move(method.model)
    before = method.penalty()
    broken = method.state_dict()
    broken["state"]["input_factor"]["0.weight"] = torch.zeros(2, 4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"the factors of '0.weight' are of another layer"):
        method.load_state_dict(broken)
    del broken["state"]["input_factor"]["0.weight"]
    with pytest.raises(ValueError, match=r"the factors of '0.weight' are of another layer"):
        method.load_state_dict(broken)
    assert torch.equal(method.penalty(), before)


def test_a_head_that_grows_keeps_what_it_had():
    method = learn(clext.KFAC(make_model(), strength=3.0))
    model, old = method.model, method.model[2]
    move(model)
    before = method.penalty()
    model[2] = nn.Linear(4, CLASSES + 2).double()
    with torch.no_grad():
        model[2].weight[:CLASSES], model[2].bias[:CLASSES] = old.weight, old.bias
    method.begin_task()
    torch.testing.assert_close(method.penalty(), before)
    with torch.no_grad():
        model[2].weight[CLASSES:] += 1.0
    torch.testing.assert_close(method.penalty(), before)
    check(method)
    learn_one(method)
    assert method.factors["2.weight"].outputs.shape == (3, CLASSES + 2, CLASSES + 2)
    check(method)


def test_another_dtype_is_followed():
    method = learn(clext.KFAC(make_model(dtype=torch.float32), strength=3.0))
    method.model.double()
    method.refresh_parameters()
    move(method.model)
    check(method, 1e-7)  # the factors are symmetric but for float32's rounding


def test_channels_may_be_added_and_another_kernel_is_refused():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, CLASSES)).double()
    method = clext.KFAC(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="clext: kfac saw no step")
        method.consolidate([(torch.randn(6, 2, 5, 5).double(), torch.randint(CLASSES, (6,)))])
    old = model[0]
    with torch.no_grad():
        old.weight.add_(0.1)
    before = method.penalty()
    model[0] = nn.Conv2d(3, 3, 3).double()
    with torch.no_grad():
        model[0].weight[:, :2], model[0].bias[:] = old.weight, old.bias
    method.refresh_parameters()
    torch.testing.assert_close(method.penalty(), before)
    model[0] = nn.Conv2d(3, 3, 5).double()
    with pytest.raises(
        ValueError, match=r"the kernel of '0.weight' was \[3, 3\] and now is \[5, 5\]"
    ):
        method.refresh_parameters()


def test_a_layer_that_is_gone_is_forgotten_and_a_renamed_one_is_not():
    method = learn(clext.KFAC(make_model(), strength=3.0))
    method.model.append(nn.Linear(CLASSES, 2).double())
    del method.model[0]
    with pytest.warns(UserWarning, match=r"'0.weight' \(and 1 more\) is not in the model any more"):
        method.refresh_parameters()
    assert sorted(method.factors) == ["1.weight"]
    move(method.model)
    check(method)


def test_frozen_parameters_have_no_part():
    method = learn(clext.KFAC(make_model(), strength=3.0))
    move(method.model)
    method.model[0].requires_grad_(False)
    method.model.zero_grad()
    change = torch.cat(
        [
            (method.model[2].bias - method.anchor["2.bias"]).unsqueeze(1),
            method.model[2].weight - method.anchor["2.weight"],
        ],
        1,
    )
    factors = method.factors["2.weight"]
    expected = 3.0 * sum(
        (change * (outputs @ change @ inputs)).sum()
        for outputs, inputs in zip(factors.outputs, factors.inputs, strict=True)
    )
    torch.testing.assert_close(method.penalty(), expected)
    method.add_penalty_grad_()
    assert method.model[0].weight.grad is None
    assert method.model[2].weight.grad is not None


def test_parameters_in_half_precision_have_factors_in_float32():
    method = learn(clext.KFAC(make_model(dtype=torch.bfloat16), strength=3.0), tasks=1)
    assert all(entry.dtype == torch.float32 for pair in method.factors.values() for entry in pair)
    move(method.model)
    value = method.add_penalty_grad_()
    torch.testing.assert_close(value, explicit(method).detach().float(), rtol=0.05, atol=0.0)
    assert method.model[0].weight.grad.dtype == torch.bfloat16


def test_heads_of_other_tasks_are_not_pulled():
    model = make_model()
    method = clext.KFAC(model, fisher="exact")
    x = make_task(0)[0][0]
    method.begin_task(block=range(2), active=range(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method.attach(optimizer)
    method.loss(x, torch.zeros(len(x), dtype=torch.int64)).backward()
    optimizer.step()
    method.consolidate([(x, torch.zeros(len(x), dtype=torch.int64))])
    outputs = method.factors["2.weight"].outputs[0]
    assert bool(outputs[:2, :2].any())
    assert not outputs[2].any()
    assert not outputs[:, 2].any()


def test_weights_without_factors_are_named_once():
    torch.manual_seed(2)
    table = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, CLASSES)).double()
    method = clext.KFAC(table)
    batches = [(torch.randint(7, (6, 3)), torch.randint(CLASSES, (6,)))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            method.consolidate(batches)
    named = [str(w.message) for w in caught if "no Kronecker factors" in str(w.message)]
    assert len(named) == 1
    assert "'0.weight', which no linear layer or convolution alone uses" in named[0]
    assert bool(method.importance["0.weight"].any())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher": "batch"}, r"unknown value of option 'fisher' of kfac: 'batch'"),
        ({"strength": -1.0}, "strength must be"),
        ({"samples": 0}, "samples must be"),
        ({"fisher": "reversed", "likelihood": "gaussian"}, "negates logits"),
    ],
    ids=str,
)
def test_options_that_there_are_not(options, message):
    with pytest.raises(ValueError, match=message):
        clext.KFAC(make_model(), **options)


def test_a_proximal_step_is_not_for_it():
    model = make_model()
    with pytest.raises(ValueError, match="proximal"):
        SGD(model.parameters(), lr=0.1, method=clext.KFAC(model), proximal=True)


def test_it_protects_what_the_diagonal_protects_less():
    """Of a direction in which EWC's importance is the same, it knows that the loss is flat."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).double()
    x = torch.randn(200, 1, dtype=torch.float64).expand(-1, 2).contiguous()  # two equal features
    y = (x[:, 0] > 0).long()
    values = {}
    for kind in (clext.KFAC, clext.EWC):
        method = kind(model, fisher="exact", strength=1.0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="clext: .* saw no step")
            method.consolidate([(x, y)])
        flat = model[0].weight.detach() + torch.tensor([1.0, -1.0], dtype=torch.float64)
        steep = model[0].weight.detach() + torch.tensor([[1.0, 1.0], [-1.0, -1.0]]).double()
        values[kind] = [float(method.penalty({"0.weight": w})) for w in (flat, steep)]
        before = model[0].weight.detach()
        losses = [float(F.cross_entropy(x @ w.T, y)) for w in (before, flat)]
        assert losses[0] == pytest.approx(losses[1])
    assert values[clext.KFAC][0] == pytest.approx(0.0, abs=1e-12)
    assert values[clext.KFAC][1] > 0.1
    assert values[clext.EWC][0] == pytest.approx(values[clext.EWC][1])
