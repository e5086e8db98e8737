"""`clext.course` with arguments that do not fit: one sentence, and nothing changed."""

from __future__ import annotations

import pytest
import torch
from course_training import ALL, train
from torch import nn
from toy_training import CLASSES, make_model, make_task

from clext.course import baseline, ewc, mas, rwalk, scp, si

LOADER = make_task(0)
ERRORS = [
    (ewc, (LOADER, "gpu"), "device must be a torch.device or the name of one, got 'gpu'"),
    (ewc, (torch.device("cpu"), LOADER), r"device must be .*got list; the order is ewc\(model, "),
    (si, (LOADER, "cpu", 0.1), r"got 0.1; the order is si\(model, dataloader, epsilon, device\)"),
    (si, (LOADER, torch.device("cpu"), "cpu"), r"epsilon must be .* got device\(type='cpu'\)"),
    (rwalk, (LOADER, "cpu", "cpu"), "rwalk: epsilon must be a finite number > 0, got 'cpu'"),
    (rwalk, (LOADER, 0.0, "cpu"), "epsilon must be a finite number > 0, got 0.0"),
    (scp, (LOADER, 0, "cpu"), "scp: L must be an integer >= 1, got 0"),
    (scp, (LOADER, "cpu", "cpu"), r"L must be .*got 'cpu'; the order is scp\(model, dataloader, L"),
    (ewc, ([], "cpu"), "dataloader must be None .* at least one batch, got list"),
    (mas, ("cpu", "cpu"), "dataloader must be None .*, got 'cpu'; the order is mas"),
    (ewc, ((b for b in LOADER), "cpu"), "with a length and at least one batch, got generator"),
    (ewc, ([LOADER[0], LOADER[0][0]], "cpu"), r"batch 1 is a Tensor, expected a pair \(x, y\)"),
    (ewc, (LOADER, "cpu", {"0.weight": 1}), "prev_guards must be a list .* got dict; the order"),
    (ewc, (LOADER, "cpu", None), "prev_guards must be a list .* got None"),
    (ewc, (LOADER, "cpu", [None, 3]), r"prev_guards\[1\] must be .* or None, got 3"),
    (ewc, (LOADER, "cpu", [{"x": torch.zeros(1)}]), r"prev_guards\[0\] has no tensor '0.weight'"),
    (rwalk, (LOADER, 0.1, "cpu", [{"0.weight": torch.zeros(6, 5)}]), "no tensor '0__weight'"),
    (
        ewc,
        (LOADER, "cpu", [{n: torch.zeros(2) for n, _ in make_model().named_parameters()}]),
        r"prev_guards\[0\]\['0.weight'\] has shape \[2\], expected \[6, 5\]",
    ),
    (si, (LOADER, 0.1, "cpu"), "'0__weight_SI_prev_task', .* make the first si with dataloader=N"),
    (rwalk, (LOADER, 0.1, "cpu"), "make the first rwalk with dataloader=None"),
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


@pytest.mark.parametrize("kind", ALL)
def test_a_model_without_trainable_parameters(kind):
    model = make_model().requires_grad_(False)
    with pytest.raises(ValueError, match="Sequential has no trainable parameter"):
        kind(model, dataloader=None, device="cpu", **ALL[kind])


@pytest.mark.parametrize("kind", [si, rwalk])
def test_a_loop_without_update(kind):
    model = make_model()
    kind(model, None, 0.1, "cpu")
    with pytest.raises(ValueError, match=r"'0__weight_W'.*call update\(model\) in the loop"):
        kind(model, LOADER, 0.1, "cpu")


@pytest.mark.parametrize("kind", [si, rwalk])
def test_a_model_that_has_grown(kind):
    model = make_model()
    train(model, kind(model, None, 0.1, "cpu"), LOADER)
    model[2] = nn.Linear(6, CLASSES + 1).double()
    with pytest.raises(ValueError, match=r"'2__weight_SI_prev_task'.*\[3, 6\], expected \[4, 6\]"):
        kind(model, LOADER, 0.1, "cpu")
