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
    (ewc, (LOADER, "meta"), "ewc: device 'meta' cannot compute here, expected the one that"),
    (baseline, (None, "cuda:99"), "baseline: device 'cuda:99' cannot compute here"),
    (
        ewc,
        (
            LOADER,
            "cpu",
            [{n: torch.full_like(p, torch.nan) for n, p in make_model().named_parameters()}],
        ),
        r"prev_guards\[0\]\['0.weight'\] holds NaN or infinity",
    ),
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
    (ewc, ([LOADER[0], LOADER[0][0]], "cpu"), r"batch 1 is torch.* expected a pair"),
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


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("given", [None, 3, [torch.zeros(1)]])
def test_penalty_of_what_is_no_model(kind, given):
    guard = kind(make_model(), dataloader=None, device="cpu", **ALL[kind])
    with pytest.raises(ValueError, match=f"{kind.__name__}: penalty and update take the model"):
        guard.penalty(given)
    if kind in (si, rwalk):
        with pytest.raises(ValueError, match=f"{kind.__name__}: penalty and update take the model"):
            guard.update(given)


@pytest.mark.parametrize("kind", [si, rwalk])
def test_parameters_whose_buffers_would_have_one_name(kind):
    model = nn.Module()
    model.a = nn.Linear(2, 2)
    model.register_parameter("a__weight", nn.Parameter(torch.zeros(2, 2)))
    with pytest.raises(ValueError, match="'a__weight' and 'a.weight' would share the buffers"):
        kind(model, None, 0.1, "cpu")
    assert not dict(model.named_buffers())


@pytest.mark.parametrize("kind", [si, rwalk])
@pytest.mark.parametrize("value", [3, nn.Parameter(torch.zeros(6, 5))])
def test_an_attribute_with_the_name_of_a_buffer(kind, value):
    model = make_model()
    setattr(model, "0__weight_W", value)
    with pytest.raises(ValueError, match="has an attribute '0__weight_W', .* rename it"):
        kind(model, None, 0.1, "cpu")
    assert not dict(model.named_buffers())


@pytest.mark.parametrize("kind", [si, rwalk])
def test_a_path_is_not_counted_twice(kind):
    """The second task's loop has no update: the model still has the first one's path."""
    model = make_model()
    train(model, kind(model, None, 0.1, "cpu"), LOADER)
    guard = kind(model, LOADER, 0.1, "cpu")
    before = {name: entry.clone() for name, entry in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"a task counted already; call update\(model\) in the loo"
    ):
        kind(model, LOADER, 0.1, "cpu")
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    model.train()
    train(model, guard, LOADER)
    kind(model, LOADER, 0.1, "cpu")


@pytest.mark.parametrize("kind", [ewc, mas, rwalk])
def test_empty_batches_do_not_count(kind):
    x, y = LOADER[0]
    results = []
    for loader in (LOADER, [LOADER[0], (x[:0], y[:0]), *LOADER[1:], (x[:0], y[:0])]):
        model = make_model()
        options = ALL[kind]
        train(model, kind(model, dataloader=None, device="cpu", **options), LOADER)
        guard = kind(model, dataloader=loader, device="cpu", **options)
        results.append(guard._precision_matrices)
    torch.testing.assert_close(*results, rtol=0, atol=0)
