"""Measuring importance changes nothing of the model, and what does not fit is described."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from importance_models import (
    CLASSES,
    Functional,
    Residual,
    batch_norm,
    convolution,
    make_batches,
    params_of,
)
from importance_oracle import assert_close, mas_oracle
from torch import nn
from torch.utils.checkpoint import checkpoint

from clext.importance import (
    fisher_information,
    output_sensitivity,
    sliced_cramer_importance,
)

pytestmark = pytest.mark.filterwarnings("ignore::clext.importance.SlowImportanceWarning")

ESTIMATES = {
    "fisher empirical": (fisher_information, {}),
    "fisher sample": (fisher_information, {"kind": "sample"}),
    "fisher batch": (fisher_information, {"kind": "batch"}),
    "mas": (output_sensitivity, {}),
    "scp": (sliced_cramer_importance, {}),
}
FUNCTIONS = (fisher_information, output_sensitivity, sliced_cramer_importance)


def assert_equal(got, expected):
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected, strict=True))
    assert any(bool(entry.any()) for entry in got)


class Counting(nn.Module):
    """A layer with state of its own, that it changes in eval mode too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.last = x.detach().sum()
        return x


@pytest.mark.parametrize("failing", [False, True], ids=["normal", "exception"])
@pytest.mark.parametrize("estimate", ESTIMATES)
def test_model_and_random_state_are_left_as_they_were(device, estimate, failing):
    function, options = ESTIMATES[estimate]
    model = nn.Sequential(batch_norm(), Counting()).to(device, torch.float64)
    model.train()
    model[0][1].eval()  # a mixed model: one layer's statistics are frozen by the user
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)

    def tensors():
        return [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]

    modes = [module.training for module in model.modules()]
    before = [(tensor, tensor.detach().clone()) for tensor in tensors()]
    random_state = torch.get_rng_state()

    def batches():
        yield from torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*make_batches((6,))[0]), batch_size=4, shuffle=True
        )
        if failing:
            raise KeyboardInterrupt

    if failing:
        with pytest.raises(KeyboardInterrupt):
            function(model, params_of(model), batches(), **options)
    else:
        function(model, params_of(model), batches(), **options)
    assert [module.training for module in model.modules()] == modes
    for tensor, (same, value) in zip(tensors(), before, strict=True):
        assert tensor is same
        assert torch.equal(tensor, value)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks for module in model.modules())


def test_importance_is_measured_in_eval_mode(device):
    """Dropout and batch statistics play no part, though the model is in train mode."""
    model = batch_norm().to(device, torch.float64).train()
    params, batches = params_of(model), make_batches()
    from_train = [estimate(model, params, batches) for estimate in FUNCTIONS]
    model.eval()
    for got, estimate in zip(from_train, FUNCTIONS, strict=True):
        assert_equal(got, estimate(model, params, batches))


def test_autocast_and_a_gradient_scaler_play_no_part(device):
    """Estimates run in the model's own dtype, and are of the unscaled loss."""
    model = convolution().to(device)
    params, batches = params_of(model), make_batches(dtype=torch.float32)
    expected = [estimate(model, params, batches) for estimate in FUNCTIONS]
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        scaler.scale(model(batches[0][0].to(device)).float().sum()).backward()
        got = [estimate(model, params, batches) for estimate in FUNCTIONS]
    for mine, theirs in zip(got, expected, strict=True):
        assert_equal(mine, theirs)


@pytest.mark.parametrize("make", [Residual, Functional])
def test_no_grad_and_inference_mode_play_no_part(make):
    model = make().double()
    params, batches = params_of(model), make_batches()
    for estimate in FUNCTIONS:
        expected = estimate(model, params, batches)
        with torch.no_grad():
            assert_equal(estimate(model, params, batches), expected)
        with torch.inference_mode():
            inputs = [(x.clone(), y.clone()) for x, y in batches]
            got = estimate(model, params, inputs)
        assert_equal(got, expected)


def test_models_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        whole = Residual()
        buffer = torch.zeros(3)
    with pytest.raises(ValueError, match="its parameters are inference tensors"):
        fisher_information(whole, list(whole.parameters()), make_batches())
    model = Residual()
    model.register_buffer("shift", buffer)
    with pytest.raises(ValueError, match="its buffers are inference tensors"):
        output_sensitivity(model, params_of(model), make_batches())


class Keeping(nn.Module):
    """A layer with a buffer, that keeps and makes others, and an activation."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(6, CLASSES), nn.PReLU()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("none", None)
        self.calls = 0

    def forward(self, x):
        self.seen.data.add_(1)
        self.none = x.detach().sum()
        self.register_buffer("made", x.detach().mean())
        self.scale.register_buffer("made", x.detach().mean())
        self.calls += 1
        self.activation = self.scale(self.layer(x)).detach()
        return self.activation * self.scale(self.layer(x))


def test_state_that_a_forward_pass_makes_is_taken_back():
    model = Keeping().double()
    fisher_information(model, params_of(model), make_batches())
    assert float(model.seen) == model.calls == 0
    assert model.none is None
    assert [name for name, _ in model.named_buffers()] == ["seen"]
    assert not hasattr(model, "activation")
    copy.deepcopy(model)


def test_embeddings_that_renormalise_are_left_as_they_were(device):
    model = nn.Sequential(nn.Embedding(7, 3, max_norm=0.5), nn.Flatten(), nn.Linear(18, CLASSES))
    model.to(device, torch.float64)
    before = model[0].weight.detach().clone()
    params = params_of(model)
    batches = [((x * 3).long().abs() % 7, y) for x, y in make_batches()]
    for estimate in FUNCTIONS:
        got = estimate(model, params, batches)
        assert torch.equal(model[0].weight, before)
    got = output_sensitivity(model, params, batches)
    assert_close(got, mas_oracle(model, params, batches), rtol=1e-6)


class Checkpointed(nn.Module):
    """Keeps few activations, and runs its layers once more for the others."""

    def __init__(self, *, use_reentrant):
        super().__init__()
        self.layer, self.inner = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)
        self.use_reentrant, self.runs = use_reentrant, 0

    def body(self, hidden):
        self.runs += 1
        return self.inner(hidden.tanh()).tanh()

    def forward(self, x):
        hidden = self.layer(x)
        return self.head(checkpoint(self.body, hidden, use_reentrant=self.use_reentrant))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_is_off_while_measuring(use_reentrant):
    model = Checkpointed(use_reentrant=use_reentrant).double()
    params, batches = params_of(model), make_batches()
    plain = Checkpointed(use_reentrant=use_reentrant).double()
    plain.load_state_dict(model.state_dict())
    plain.forward = lambda x: plain.head(plain.body(plain.layer(x)))
    for function, options in ESTIMATES.values():
        got = function(model, params, batches, **options)
        assert_equal(got, function(plain, params_of(plain), batches, **options))
    runs = model.runs
    model(batches[0][0]).sum().backward()
    assert model.runs == runs + 2  # afterwards it is on


# ------------------------------------------------------------------ bad input


X = torch.zeros(2, 6, dtype=torch.float64)
Y = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (None, "Fisher information .* needs the data of the task"),
        ([(X, Y.float())], "Fisher information .* labels y are torch.float32"),
        ([(X, Y + 3)], "labels reach from 3 to 3, expected 0 to 2"),
        ([(X * math.nan, Y)], "outputs are not finite"),
    ],
)
def test_data_that_does_not_fit_is_described(batches, message):
    """The rest is in core/test_batches.py."""
    model = Residual().double()
    for kind in ("empirical", "batch"):
        with pytest.raises(ValueError, match=message):
            fisher_information(model, params_of(model), batches, kind=kind)


def test_unlabelled_data_is_enough_where_labels_play_no_part():
    model = Residual().double()
    params, batches = params_of(model), make_batches()
    for estimate in (output_sensitivity, sliced_cramer_importance):
        expected = estimate(model, params, batches)
        for strip in (lambda x: x, lambda x: (x,), lambda x: [x, None], lambda x: (x, "?", 3)):
            got = estimate(model, params, [strip(x) for x, _ in batches])
            assert_equal(got, expected)
        with pytest.raises(ValueError, match=r"needs the data of the task: got torch.float64 \["):
            estimate(model, params, X)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            lambda x: x.sum(),
            r"returned .* \[\] for 2 samples, expected a tensor",
        ),
        (lambda x: x.unsqueeze(0), r"returned .* \[1, 2, 3\]"),
        (lambda x: x[:1], r"returned .* \[1, 3\]"),
        (lambda x: (x, x), "returned tuple"),
    ],
)
def test_outputs_that_are_not_of_the_samples_are_described(forward, message):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, CLASSES).double()

        def forward(self, x):
            return forward(self.layer(x))

    model = Wrapped()
    for name in ("fisher empirical", "fisher batch", "scp"):
        function, options = ESTIMATES[name]
        with pytest.raises(ValueError, match=message):
            function(model, params_of(model), [(X, Y)], **options)


def test_gradients_that_overflow_are_refused():
    model = nn.Linear(6, CLASSES)
    with pytest.raises(ValueError, match="an importance is not finite"):
        output_sensitivity(model, params_of(model), [(X.float() + 1e30, Y)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: [], "got list of 0 entries; pass list"),
        (lambda m: dict(m.named_parameters()), "got dict; pass list"),
        (lambda m: m.head.weight, "got Parameter; pass list"),
        (lambda m: [m.head.weight, "head"], "got list of 2 entries; pass list"),
        (lambda _: None, "got NoneType; pass list"),
        (lambda m: list(copy.deepcopy(m).parameters()), "parameters of this Residual, got list of"),
    ],
)
def test_params_that_are_no_parameters_are_described(make, message):
    model = Residual()
    for estimate in (fisher_information, output_sensitivity, sliced_cramer_importance):
        with pytest.raises(ValueError, match=message):
            estimate(model, make(model), make_batches(dtype=torch.float32))


def test_a_model_that_is_none_is_described():
    for estimate in (fisher_information, output_sensitivity, sliced_cramer_importance):
        with pytest.raises(ValueError, match=r"model must be a torch.nn.Module, got str"):
            estimate("model", list(Residual().parameters()), make_batches())


def test_params_may_come_from_a_generator():
    model = Residual().double()
    expected = fisher_information(model, list(model.parameters()), make_batches())
    assert_close(fisher_information(model, model.parameters(), make_batches()), expected)
