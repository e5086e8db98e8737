"""`clext.course` with arguments that do not fit: one sentence, and nothing changed."""

from __future__ import annotations

import pytest
import torch
from course_training import ALL, train
from torch import nn
from toy_training import CLASSES, make_model, make_task

from clext.course import baseline, ewc, mas, rwalk, scp, si

LOADER = make_task(0)
SMALLER = {name: p[:1] for name, p in make_model().named_parameters()}
ERRORS = [
    (ewc, (torch.device("cpu"), LOADER), "ewc: dataloader must be None .* got device"),
    (si, (LOADER, "cpu", 0.1), "si: epsilon must be a finite number > 0, got 'cpu'"),
    (rwalk, (LOADER, 0.0, "cpu"), "rwalk: epsilon must be a finite number > 0, got 0.0"),
    (scp, (LOADER, 0, "cpu"), "scp: L must be an integer >= 1, got 0"),
    (mas, ([], "cpu"), "mas: the data of the task is empty"),
    (ewc, ([LOADER[0], LOADER[0][:1]], "cpu"), "ewc: batch 1 is .* 1 entries, expected"),
    (ewc, (LOADER, "cpu", SMALLER), r"ewc: prev_guards\[0\] has no tensor '0.weight' of shape \["),
    (ewc, (LOADER, "cpu", [None, SMALLER]), r"guards\[1\] .*\[6, 5\], expected the _precision_mat"),
    (si, (LOADER, 0.1, "cpu"), "'0__weight_SI_prev_task' of the model is missing, .* first si wit"),
    (rwalk, (LOADER, 0.1, "cpu"), "make the first rwalk with dataloader=None, and call update"),
]


@pytest.mark.parametrize(("kind", "arguments", "message"), ERRORS)
def test_one_sentence_and_nothing_changed(kind, arguments, message):
    model = make_model()
    train(model, baseline(model, None, "cpu"), LOADER[:2])
    before = {name: entry.clone() for name, entry in model.state_dict().items()}
    grads = [p.grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message) as caught:
        kind(model, *arguments)
    assert "\n" not in str(caught.value)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("kind", [si, rwalk])
def test_a_task_without_update_or_of_one_step(kind):
    model = make_model()
    train(model, kind(model, None, 0.1, "cpu"), LOADER[:1])
    with pytest.raises(
        ValueError, match=r"buffer '0__weight_W' .* is missing, .*call update\(model\) at ev"
    ):
        kind(model, LOADER, 0.1, "cpu")


def test_a_model_that_has_grown():
    model = make_model()
    train(model, si(model, None, 0.1, "cpu"), LOADER)
    model[2] = nn.Linear(6, CLASSES + 1).double()
    with pytest.raises(ValueError, match=r"'2__weight_SI_prev_task' .*shape \[3, 6\], .*\[4, 6\]"):
        si(model, LOADER, 0.1, "cpu")


@pytest.mark.parametrize("kind", ALL)
def test_parameters_that_were_frozen(kind):
    model = make_model().requires_grad_(False)
    with pytest.raises(ValueError, match="Sequential has no trainable parameter"):
        kind(model, dataloader=None, device="cpu", **ALL[kind])
    model[2].requires_grad_(True)
    guard = kind(model, dataloader=None, device="cpu", **ALL[kind])
    model[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match="parameter '0.weight' was frozen or absent when"):
        guard.penalty(model)
