"""Measuring importance changes nothing of the model, and bad data is described."""

from __future__ import annotations

import math

import pytest
import torch
from importance_models import CLASSES, Residual, batch_norm, make_batches, params_of
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from clext.importance import (
    FISHER_KINDS,
    fisher_information,
    output_sensitivity,
    sliced_cramer_importance,
)

pytestmark = pytest.mark.filterwarnings("ignore::clext.importance.SlowImportanceWarning")


@pytest.fixture
def fast_model(device):
    return Residual().to(device, torch.float64)


ESTIMATES = {
    **{f"fisher {kind}": (fisher_information, {"kind": kind}) for kind in FISHER_KINDS},
    "mas per_sample": (output_sensitivity, {}),
    "mas batch": (output_sensitivity, {"estimator": "batch"}),
    "scp exact": (sliced_cramer_importance, {}),
    "scp sliced": (sliced_cramer_importance, {"slices": 2}),
}


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


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_importance_is_measured_in_eval_mode(device, estimate):
    """Dropout and batch statistics play no part, though the model is in train mode."""
    function, options = ESTIMATES[estimate]
    model = batch_norm().to(device, torch.float64).train()
    params, batches = params_of(model), make_batches()
    from_train = function(model, params, batches, **options)
    from_eval = function(model.eval(), params, batches, **options)
    for mine, theirs in zip(from_train, from_eval, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", ["empirical", "exact"])
def test_activations_are_given_back_as_the_last_backward_pass_goes(kind, device):
    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv1d(1, 3, 2, padding=1), nn.Conv1d(3, 3, 2)
            self.third, self.head = nn.Conv1d(3, 3, 2), nn.Linear(15, CLASSES)
            self.gone = []

        def forward(self, x):
            early = self.first(x.unsqueeze(1))
            late = self.second(early.tanh()).tanh()
            kept = StorageWeakRef(late.untyped_storage())
            early.register_hook(lambda _: self.gone.append(kept.expired()))
            return self.head(self.third(late).tanh().flatten(1))

    model = Watched().to(device)
    x, y = make_batches((4,))[0]
    fisher_information(model, params_of(model), [(x.float(), y)], kind=kind)
    assert model.gone[-1]  # by when the gradient is at the first layer
    if kind == "exact":
        assert not any(model.gone[-CLASSES:-1])


def test_gradients_may_be_off_around_an_estimate(fast_model):
    params, batches = params_of(fast_model), make_batches()
    expected = fisher_information(fast_model, params, batches)
    with torch.no_grad():
        got = fisher_information(fast_model, params, batches)
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)


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
@pytest.mark.parametrize("kind", ["empirical", "batch"])
def test_data_that_does_not_fit_is_described(batches, message, kind):
    """The rest is in core/test_batches.py."""
    model = Residual().double()
    with pytest.raises(ValueError, match=message):
        fisher_information(model, params_of(model), batches, kind=kind)


@pytest.mark.parametrize("estimate", ["mas per_sample", "mas batch", "scp exact", "scp sliced"])
def test_unlabelled_data_is_enough_where_labels_play_no_part(fast_model, estimate):
    function, options = ESTIMATES[estimate]
    params, batches = params_of(fast_model), make_batches()
    expected = function(fast_model, params, batches, **options)
    for strip in (lambda x: x, lambda x: (x,), lambda x: [x, None], lambda x: (x, "?", 3)):
        got = function(fast_model, params, [strip(x) for x, _ in batches], **options)
        for mine, theirs in zip(got, expected, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda x: x.sum(), r"returned \[\], expected logits of shape \[2, outputs\]"),
        (lambda x: x.unsqueeze(0), r"returned \[1, 2, 3\]"),
        (lambda x: x[:1], r"returned \[1, 3\]"),
        (lambda x: (x, x), "returned tuple"),
    ],
)
@pytest.mark.parametrize("estimate", ["fisher empirical", "mas batch", "scp exact"])
def test_outputs_that_are_no_logits_are_described(forward, message, estimate):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, CLASSES).double()

        def forward(self, x):
            return forward(self.layer(x))

    function, options = ESTIMATES[estimate]
    model = Wrapped()
    with pytest.raises(ValueError, match=message):
        function(model, params_of(model), [(X, Y)], **options)


def test_gradients_that_overflow_are_refused():
    model = nn.Linear(6, CLASSES)
    with pytest.raises(ValueError, match="an importance is not finite"):
        output_sensitivity(model, params_of(model), [(X.float() + 1e30, Y)])


def test_unknown_kinds_are_refused_with_the_nearest_one():
    model = Residual()
    with pytest.raises(ValueError, match="did you mean 'empirical'"):
        fisher_information(model, params_of(model), [], kind="empiric")
    for seed in ("a", 1.5, None, -1):
        for function in (fisher_information, sliced_cramer_importance):
            with pytest.raises(ValueError, match=f"{function.__name__}: seed must be an integer"):
                function(model, params_of(model), [], seed=seed)
    with pytest.raises(ValueError, match="did you mean 'batch'"):
        output_sensitivity(model, params_of(model), [], estimator="batches")
    with pytest.raises(ValueError, match="slices must be an integer >= 1"):
        sliced_cramer_importance(model, params_of(model), [], slices=0)
