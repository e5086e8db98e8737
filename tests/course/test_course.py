"""`clext.course`: the notebook's numbers in the notebook's loop."""

from __future__ import annotations

import copy

import notebook_methods as notebook
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from toy_training import CLASSES, FEATURES, make_model, make_task

from clext import course
from clext.training.models import mlp

# Class, the same as the notebook has it, strength, what the notebook passes by keyword.
CASES = {
    "baseline": (course.baseline, notebook.Baseline, 0.0, {}),
    "ewc": (course.ewc, notebook.EWC, 100.0, {}),
    "mas": (course.mas, notebook.MAS, 0.3, {}),
    "si": (course.si, notebook.SI, 2.0, {"epsilon": 0.1}),
    "rwalk": (course.rwalk, notebook.RWalk, 20.0, {"epsilon": 0.1}),
    "scp": (course.scp, notebook.SCP, 500.0, {"L": 7}),
}
GUARDED = ("ewc", "mas", "rwalk", "scp")
FINE = {"rtol": 1e-10, "atol": 1e-14}


@pytest.fixture(params=CASES)
def name(request):
    return request.param


def make_loaders(features, classes, dtype, examples=26, batch=4, tasks=3):
    """Shuffled loaders, the last batch of each smaller."""
    generator = torch.Generator().manual_seed(5)
    return [
        DataLoader(
            TensorDataset(
                torch.randn(examples, features, generator=generator, dtype=torch.float64).to(dtype),
                torch.randint(classes, (examples,), generator=generator),
            ),
            batch,
            shuffle=True,
        )
        for _ in range(tasks)
    ]


def train_one_task(model, optimizer, dataloader, epochs, guard, strength, device):
    """The notebook's function, without its progress bars; returns the penalty of each step."""
    model.train()
    model.zero_grad()
    penalties = []
    for _ in range(epochs):
        for x, y in dataloader:
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            penalty = guard.penalty(model)
            loss += strength * penalty
            guard.update(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            penalties.append(penalty.item())
        model.eval()  # by its evaluation after each epoch
    return penalties


def run(kind, model, loaders, strength, options, epochs=2, lr=0.02, device="cpu"):
    """The notebook's cell for one method; returns its objects and the penalties of all steps."""
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002
    guards, objects, penalties = [], [], []
    takes_guards = kind.__name__.lower() in GUARDED
    guard = kind(model=model, dataloader=None, device=device, **options)
    for loader in loaders:
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        penalties += train_one_task(model, optimizer, loader, epochs, guard, strength, device)
        more = {}
        if takes_guards:
            guards.append(guard._precision_matrices)
            more = {"prev_guards": guards}
        guard = kind(model=model, dataloader=loader, device=device, **options, **more)
        objects.append(guard)
    return objects, penalties


def state_of(guard):
    """Every dict that students look at."""
    names = ("_precision_matrices", "p_old", "_state_parameters", "_n_p_prev", "_n_omega", "W")
    return {name: getattr(guard, name) for name in names if hasattr(guard, name)}


def assert_same_run(got, expected, tolerance):
    (objects, penalties), model = got
    (others, other_penalties), other_model = expected
    torch.testing.assert_close(penalties, other_penalties, **tolerance)
    for guard, other in zip(objects, others, strict=True):
        known = state_of(guard)
        assert known.keys() <= state_of(other).keys()
        for key, entries in known.items():
            torch.testing.assert_close(entries, state_of(other)[key], **tolerance)
    torch.testing.assert_close(
        dict(model.state_dict()), dict(other_model.state_dict()), **tolerance
    )
    grads, other_grads = ([p.grad for p in m.parameters()] for m in (model, other_model))
    torch.testing.assert_close(grads, other_grads, **tolerance)
    assert [m.training for m in model.modules()] == [m.training for m in other_model.modules()]


def test_three_tasks_as_in_the_notebook(name, device):
    kind, literal, strength, options = CASES[name]
    loaders = make_loaders(FEATURES, CLASSES, torch.float64)
    model, other = make_model().to(device), make_model().to(device)
    got = run(kind, model, loaders, strength, options, device=device)
    state, draws = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    expected = run(literal, other, loaders, strength, options, device=device)
    assert_same_run((got, model), (expected, other), FINE)
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(draws, np.random.get_state()[1])  # noqa: NPY002
    if name != "baseline":
        penalties = got[1]
        assert all(value == 0 for value in penalties[:14])
        assert max(map(abs, penalties[14:])) * strength > 1e-3, "too weak to test anything"
    # A second sequence begins with the buffers of the first.
    got, expected = (
        run(k, m, loaders[:1], strength, options, device=device)
        for k, m in ((kind, model), (literal, other))
    )
    assert_same_run((got, model), (expected, other), FINE)


def test_the_courses_model_in_float32(name):
    kind, literal, strength, options = CASES[name]
    loaders = make_loaders(784, 10, torch.float32, examples=12, tasks=2)
    torch.manual_seed(1)
    model = mlp()
    other = copy.deepcopy(model)
    got = run(kind, model, loaders, strength, options, epochs=1, lr=1e-4)
    expected = run(literal, other, loaders, strength, options, epochs=1, lr=1e-4)
    assert_same_run((got, model), (expected, other), {"rtol": 1e-6, "atol": 1e-7})


def test_either_class_goes_on_from_the_other(name):
    """A notebook may be half converted: guards and buffers are those of the notebook."""
    kind, literal, strength, options = CASES[name]
    loaders = make_loaders(FEATURES, CLASSES, torch.float64)
    finals = []
    for kinds in ([kind, literal, kind, literal], [literal] * 4, [literal, kind, literal, kind]):
        torch.manual_seed(11)
        np.random.seed(11)  # noqa: NPY002
        model, guards = make_model(), []
        guard = kinds[0](model, dataloader=None, device="cpu", **options)
        for loader, following in zip(loaders, kinds[1:], strict=True):
            optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
            train_one_task(model, optimizer, loader, 1, guard, strength, "cpu")
            more = {}
            if name in GUARDED:
                guards.append(guard._precision_matrices)
                more = {"prev_guards": guards}
            guard = following(model, dataloader=loader, device="cpu", **options, **more)
        finals.append(dict(model.state_dict()))
    torch.testing.assert_close(finals[0], finals[1], **FINE)
    torch.testing.assert_close(finals[2], finals[1], **FINE)


# ---------------------------------------------------------------- what the notebook lets one change


def after_a_task(kind, options):
    """A model after one task, and the object for the next."""
    model = make_model()
    loaders = make_loaders(FEATURES, CLASSES, torch.float64, tasks=1)
    (guard,), _ = run(kind, model, loaders, 0.0, options, epochs=1)
    return model, guard


def assert_same_step(methods, models):
    """Both say the same of parameters that have moved, and see the same step."""
    penalties = []
    for method, model in zip(methods, models, strict=True):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.5)
        model.zero_grad()
        penalties.append(method.penalty(model))
        penalties[-1].backward()
        model[0].bias.grad = None  # nothing is learnt from a step without a gradient
        method.update(model)
    torch.testing.assert_close(*penalties, **FINE)
    assert penalties[0] != 0
    assert_same_run((([methods[0]], 0), models[0]), (([methods[1]], 0), models[1]), FINE)


def test_what_a_hand_writes_counts(name):
    kind, literal, _, options = CASES[name]
    models, methods = zip(*(after_a_task(k, options) for k in (kind, literal)), strict=True)
    for attribute in state_of(methods[0]):
        for method in methods:  # in place, another entry, a number
            entries = getattr(method, attribute)
            first, second, *_, last = entries
            entries[first].fill_(1.5)
            entries[last] = torch.full_like(entries[last], 0.25)
            if attribute == "_precision_matrices":
                entries[second] = 2.0
        assert_same_step(methods, models)
        for method in methods:
            entries = getattr(method, attribute)
            setattr(method, attribute, {k: 3.0 + 0 * e for k, e in entries.items()})
        assert_same_step(methods, models)


HOOKS = {
    "baseline": ["_calculate_importance"],
    "ewc": ["_calculate_importance", "calculate_importance"],
    "mas": ["_calculate_importance", "calculate_importance"],
    "si": ["_calculate_importance", "_init_"],
    "rwalk": ["_calculate_importance_ewc", "_calculate_importance", "_init_"],
    "scp": ["_calculate_importance", "calculate_importance"],
}


@pytest.mark.parametrize(("name", "hook"), [(name, hook) for name in HOOKS for hook in HOOKS[name]])
def test_what_a_subclass_calculates_counts(name, hook):
    kind, literal, strength, options = CASES[name]

    def changing(parent):
        def calculate(self):
            found = getattr(parent, hook)(self)
            importance = found if isinstance(found, dict) else found[0 if hook == "_init_" else 1]
            for entry in importance.values():
                entry.mul_(3).add_(0.01)
            return found

        return type(parent.__name__, (parent,), {hook: calculate})

    models = make_model(), make_model()
    loaders = make_loaders(FEATURES, CLASSES, torch.float64)
    got, expected = (
        run(changing(k), model, loaders, strength, options, epochs=1)
        for k, model in zip((kind, literal), models, strict=True)
    )
    assert_same_run((got, models[0]), (expected, models[1]), FINE)
    assert hook == "_init_" or got[1][1] != 0  # in the first task


@pytest.mark.parametrize(
    ("name", "entries"), [("mas", 1), ("scp", 1), *((name, 3) for name in GUARDED)]
)
def test_batches_with_a_tasks_number_or_without_labels(name, entries):
    kind, literal, _, options = CASES[name]
    batches = [(x, y, torch.tensor(7))[:entries] for x, y in make_task(0)]
    importances = []
    for made in (kind, literal):
        model, guard = after_a_task(made, options)
        guard = made(model, dataloader=batches, device="cpu", **options)
        importances.append(guard._precision_matrices)
    torch.testing.assert_close(*importances, **FINE)
