"""The main job: the loop against a slow and obvious one, its seeds and its models."""

import dataclasses
import functools
import itertools
import os
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quick_runs import QUICK, same, small, weights
from torch import nn

import clext
from clext.core.seeding import isolated_rng
from clext.data.datasets import Dataset, Split, load_dataset


class ObviousSI:
    """Synaptic Intelligence as in the paper, one tensor at a time."""

    def __init__(self, model: nn.Module, strength: float, xi: float = 0.1) -> None:
        self.params, self.strength, self.xi = list(model.parameters()), strength, xi
        self.anchor, self.omega = weights(model), [torch.zeros_like(p) for p in self.params]
        self.path = [torch.zeros_like(p) for p in self.params]

    def penalty(self) -> torch.Tensor:
        terms = zip(self.params, self.anchor, self.omega, strict=True)
        return self.strength * sum((o * (p - a) ** 2).sum() for p, a, o in terms)

    def step(self, gradients: list[torch.Tensor], before: list[torch.Tensor]) -> None:
        for w, g, p, old in zip(self.path, gradients, self.params, before, strict=True):
            w -= g * (p.detach() - old)

    def end_task(self) -> None:
        for i, p in enumerate(self.params):
            moved = p.detach() - self.anchor[i]
            self.omega[i] += self.path[i].clamp(min=0) / (moved**2 + self.xi)
            self.anchor[i], self.path[i] = p.detach().clone(), torch.zeros_like(p)


def obvious_loop(
    model: nn.Module, seeds: dict, epochs: int, lr: float, si: ObviousSI | None = None
) -> np.ndarray:
    """Permuted digits, two tasks, batches of 128: everything written out."""
    data = load_dataset("digits")
    tasks_random = torch.Generator().manual_seed(seeds["scenario"])
    order_random = torch.Generator().manual_seed(seeds["shuffle"])
    permutations = [torch.randperm(64, generator=tasks_random) for _ in range(2)]
    accuracy = np.full((2, 2), np.nan)
    for k in range(2):
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        for _ in range(epochs):
            order = torch.randperm(len(data.train.labels), generator=order_random)
            for start in range(0, len(order), 128):
                rows = order[start : start + 128]
                x, y = data.train.inputs[rows][:, permutations[k]], data.train.labels[rows]
                loss = F.cross_entropy(model(x), y)
                gradients = torch.autograd.grad(loss, list(model.parameters()))
                optimizer.zero_grad()
                total = F.cross_entropy(model(x), y) + (0 if si is None else si.penalty())
                total.backward()
                before = weights(model)
                optimizer.step()
                if si is not None:
                    si.step(gradients, before)
        if si is not None:
            si.end_task()
        for j in range(k + 1):
            predicted = model(data.test.inputs[:, permutations[j]]).argmax(dim=1)
            accuracy[k, j] = (predicted == data.test.labels).double().mean()
    return accuracy


class TestLoop:
    @pytest.mark.parametrize("method", ["baseline", "si"])
    def test_equals_a_slow_and_obvious_loop(self, method):
        ours, theirs = small(), small()
        strength = 5.0 if method == "si" else None
        result = clext.train(
            method, model=ours, lr=1e-2, seed=11, device="cpu", strength=strength, **QUICK
        )
        si = ObviousSI(theirs, strength) if method == "si" else None
        expected = obvious_loop(theirs, result.config["seeds"], QUICK["epochs"], 1e-2, si)
        torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(result.accuracy, expected, atol=1.5 / 355)
        assert result.average_accuracy[-1] > 0.5

    def test_the_default_model_is_the_courses_drawn_from_the_seed(self):
        result = clext.train("baseline", **{**QUICK, "epochs": 1, "tasks": 1}, device="cpu")
        torch.manual_seed(result.config["seeds"]["model"])
        layers = itertools.pairwise((64, 1024, 512, 256, 10))
        modules = [m for a, b in layers for m in (nn.Linear(a, b), nn.ReLU())][:-1]
        copied = nn.Sequential(*modules)
        again = clext.train(
            "baseline", **{**QUICK, "epochs": 1, "tasks": 1}, device="cpu", model=copied
        )
        assert again.curve == result.curve
        assert result.config["model"] == "MLP 64-1024-512-256-10"

    @pytest.mark.parametrize("method", sorted(clext.METHODS))
    def test_every_method_learns(self, method, device):
        result = clext.train(method, model=small(), lr=1e-2, device=device, **QUICK)
        assert result.average_accuracy[0] > 0.5
        assert result.config["method"] == method

    def test_the_last_smaller_batch_is_used_and_a_batch_may_exceed_the_data(self):
        sizes = []

        class Counting(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                if self.training:
                    sizes.append(len(x))
                return super().forward(x)

        def run(batch_size: int) -> list[int]:
            sizes.clear()
            options = {**QUICK, "tasks": 1, "epochs": 1, "batch_size": batch_size}
            clext.train("baseline", model=Counting(64, 10), device="cpu", **options)
            return list(sizes)

        assert run(1000) == [1000, 442]
        assert run(5000) == [1442]

    def test_one_accuracy_per_epoch_and_a_triangle_of_them_per_task(self):
        result = clext.train("baseline", model=small(), **{**QUICK, "tasks": 3})
        assert len(result.curve) == 6
        assert np.isnan(result.accuracy[np.triu_indices(3, k=1)]).all()
        assert np.isfinite(result.accuracy[np.tril_indices(3)]).all()
        assert result.curve[1::2] == pytest.approx(result.average_accuracy)
        assert set(result.timings) == {"training", "evaluation", "consolidation"}
        assert result.seconds > 0
        assert result.before[0] == result.untrained[0]
        assert np.isfinite(result.before).all()

    def test_accuracies_within_tasks_are_taken_every_so_many_steps(self):
        result = clext.train("baseline", model=small(), evaluate_every=5, **QUICK)
        places = [(entry["task"], entry["step"]) for entry in result.steps]
        assert places == [(task, step) for task in (0, 1) for step in (5, 10, 15, 20)]  # of 24
        assert [len(entry["accuracy"]) for entry in result.steps] == [1] * 4 + [2] * 4


class TestSeeds:
    @pytest.mark.parametrize("method", ["baseline", "rwalk", "dgr"])
    def test_same_seed_same_bits(self, method, device):
        a, b = small(), small()
        options = {**QUICK, "epochs": 1, "seed": 4, "device": device}
        first = clext.train(method, model=a, **options)
        torch.rand(17)
        second = clext.train(method, model=b, **options)
        assert first.curve == second.curve
        assert same(weights(a), weights(b))

    def test_another_seed_gives_another_run(self):
        first, second = (clext.train("baseline", seed=s, **{**QUICK, "tasks": 1}) for s in (0, 1))
        assert first.curve != second.curve
        seeds = [*first.config["seeds"].values(), *second.config["seeds"].values()]
        assert len(set(seeds)) == 8

    def test_dropout_draws_from_the_seed(self):
        def run() -> list[torch.Tensor]:
            model = nn.Sequential(small(), nn.Dropout(0.5))
            clext.train("baseline", model=model, **QUICK)
            return weights(model)

        first = run()
        torch.rand(5)
        assert same(first, run())

    @pytest.mark.parametrize("model", [None, nn.Sequential(nn.Dropout(0.1), nn.Linear(64, 10))])
    def test_the_global_random_state_is_left_as_it_was(self, model, device):
        state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        on_device = None if device == "cpu" else torch.cuda.get_rng_state()
        options = {**QUICK, "epochs": 1}
        clext.train("ewc", fisher="sample", model=model, device=device, **options)
        assert torch.get_rng_state().equal(state)
        assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
        assert on_device is None or torch.cuda.get_rng_state().equal(on_device)

    def test_ewc_takes_its_importance_from_the_runs_optimizer(self):
        method = clext.EWC(small(), fisher="optimizer")
        result = clext.train(method, **QUICK)
        assert result.config["method_options"]["fisher"] == "optimizer"
        assert method.importance["2.weight"].any()

    def test_a_methods_own_seed_comes_from_the_runs_seed(self):
        result = clext.train("ewc", model=small(), **QUICK)
        assert result.config["method_options"]["seed"] == result.config["seeds"]["method"]


class TestThreads:
    def test_runs_at_the_same_time_give_the_bits_of_each_alone(self):
        def run(method: str) -> list[float]:
            return clext.train(method, **{**QUICK, "tasks": 1, "epochs": 1}).curve

        methods, together = ("ewc", "si"), {}
        alone = {method: run(method) for method in methods}
        state = torch.get_rng_state()
        threads = [
            threading.Thread(target=lambda method=method: together.update({method: run(method)}))
            for method in methods
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert together == alone
        assert torch.get_rng_state().equal(state)
        assert torch._dynamo.eval_frame._stance.stance == "default"

    def test_whoever_leaves_last_restores_the_random_state(self):
        state, device = torch.get_rng_state(), torch.device("cpu")
        first, second = isolated_rng(1, device), isolated_rng(2, device)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not torch.get_rng_state().equal(state)
        second.__exit__(None, None, None)
        assert torch.get_rng_state().equal(state)


class TestBuilding:
    """The method is made once, on the model that is trained."""

    @pytest.fixture
    def built(self, monkeypatch) -> list[nn.Module]:
        models: list[nn.Module] = []
        make = clext.EWC.__init__

        @functools.wraps(make)
        def count(self, model: nn.Module, **options: object) -> None:
            models.append(model)
            make(self, model, **options)

        monkeypatch.setattr(clext.EWC, "__init__", count)
        return models

    def test_on_a_given_model(self, built):
        model = small()
        clext.train("ewc", model=model, **{**QUICK, "epochs": 1})
        assert len(built) == 1
        assert built[0] is model

    def test_on_the_courses_model(self, built, monkeypatch):
        split = Split(torch.rand(20, 784), torch.arange(20) % 10)
        data = Dataset("mnist", split, split, 10, "a test")
        monkeypatch.setattr("clext.training.runs.load_dataset", lambda *_args, **_kwargs: data)
        result = clext.train("ewc", tasks=1, epochs=1, progress=False)
        assert len(built) == 1
        assert result.config["model"] == "MLP 784-1024-512-256-10"


class TestModel:
    def test_a_given_model_is_trained_in_place_and_keeps_its_modes(self):
        model = nn.Sequential(small(), nn.BatchNorm1d(10))
        model[1].eval()
        before = weights(model)
        clext.train("si", model=model, **QUICK)
        assert not same(before, weights(model))
        assert model.training
        assert not model[1].training

    def test_frozen_parameters_stay(self):
        model = small()
        model[0].requires_grad_(False)
        frozen = weights(model[0])
        result = clext.train("si", model=model, **QUICK)
        assert same(frozen, weights(model[0]))
        assert result.config["parameters"] == 330

    def test_an_instance_is_used_with_its_model_and_settings(self):
        model = small()
        method = clext.SI(model, strength=2.0, xi=0.5)
        result = clext.train(method, **QUICK)
        assert method.tasks == 2
        assert result.config["strength"] == 2.0
        options = {"xi": 0.5, "clamp": "task", "state_dtype": None}
        assert result.config["method_options"] == options
        halved = clext.train("si", state_dtype=torch.bfloat16, **QUICK)
        assert halved.config["method_options"]["state_dtype"] == "bfloat16"
        clext.train(method, model=model, **{**QUICK, "tasks": 1})
        assert method.tasks == 3

    def test_double_and_half_precision_models(self):
        for dtype in (torch.float64, torch.bfloat16):
            result = clext.train("si", model=small().to(dtype), lr=1e-2, **QUICK)
            assert result.average_accuracy[0] > 0.3


@pytest.mark.skipif(
    not os.environ.get("CLEXT_DATA"), reason="the real MNIST is needed: set CLEXT_DATA"
)
def test_real_mnist_is_learned(device, tmp_path, monkeypatch):
    data = load_dataset("mnist")
    assert (len(data.train.labels), len(data.test.labels)) == (60_000, 10_000)
    assert data.train.inputs.float().div(255).mean().item() == pytest.approx(0.1307, abs=1e-4)
    part = dataclasses.replace(data, train=Split(*(t[:10_000] for t in data.train)))
    monkeypatch.setattr("clext.training.runs.load_dataset", lambda *_args, **_kwargs: part)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = clext.train(
            "ewc", tasks=2, epochs=1, lr=1e-3, device=device, out=tmp_path, progress=False
        )
    assert result.accuracy[0, 0] > 0.8
    assert result.average_accuracy[1] > 0.6
    assert clext.Result.load(tmp_path).config["data"]["name"] == "mnist"
