"""The main job: the loop against a slow and obvious one, seeds, bad input, and early ends."""

import copy
import dataclasses
import itertools
import json
import math
import os
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import clext
from clext import training
from clext.data import Split, load_dataset

QUICK = {"dataset": "digits", "tasks": 2, "epochs": 2, "progress": False}


def small() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(x.equal(y) for x, y in zip(a, b, strict=True))


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


class TestSeeds:
    @pytest.mark.parametrize("method", ["baseline", "rwalk"])
    def test_same_seed_same_bits(self, method, device):
        a, b = small(), small()
        first = clext.train(method, model=a, seed=4, device=device, **QUICK)
        torch.rand(17)
        second = clext.train(method, model=b, seed=4, device=device, **QUICK)
        assert first.curve == second.curve
        assert same(weights(a), weights(b))

    def test_another_seed_gives_another_run(self):
        first = clext.train("baseline", seed=0, **QUICK)
        second = clext.train("baseline", seed=1, **QUICK)
        assert first.curve != second.curve
        assert first.config["seeds"] != second.config["seeds"]

    def test_dropout_draws_from_the_seed(self):
        def run() -> list[torch.Tensor]:
            model = nn.Sequential(small(), nn.Dropout(0.5))
            clext.train("baseline", model=model, **QUICK)
            return weights(model)

        first = run()
        torch.rand(5)
        assert same(first, run())

    def test_the_global_random_state_is_left_as_it_was(self, device):
        state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        on_device = None if device == "cpu" else torch.cuda.get_rng_state()
        clext.train("ewc", fisher="sample", device=device, **{**QUICK, "epochs": 1})
        assert torch.get_rng_state().equal(state)
        assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
        assert on_device is None or torch.cuda.get_rng_state().equal(on_device)

    def test_a_methods_own_seed_comes_from_the_runs_seed(self):
        result = clext.train("ewc", model=small(), **QUICK)
        assert result.config["method_options"]["seed"] == result.config["seeds"]["method"]


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
        assert result.config["method_options"] == {"xi": 0.5}
        clext.train(method, model=model, **{**QUICK, "tasks": 1})
        assert method.tasks == 3

    def test_double_and_half_precision_models(self):
        for dtype in (torch.float64, torch.bfloat16):
            result = clext.train("si", model=small().to(dtype), lr=1e-2, **QUICK)
            assert result.average_accuracy[0] > 0.3


BAD_INPUT = [
    ({"method": "ewx"}, "unknown method 'ewx'.*'ewc'"),
    ({"method": "ewc", "gama": 0.5}, "unknown option.*'gama'.*'gamma'"),
    ({"method": "baseline", "gamma": 0.5}, "unknown option.*'gamma'"),
    ({"method": "ewc", "gamma": 2.0}, "gamma must be .* got 2.0"),
    ({"dataset": "minst"}, "unknown dataset 'minst'.*'mnist'"),
    ({"scenario": "permutted"}, "unknown scenario 'permutted'.*'permuted'"),
    *(
        ({name: value}, f"{name} must be an integer >= 1, got {value!r}")
        for name in ("tasks", "epochs", "batch_size")
        for value in (0, -1, 1.5, True, "5")
    ),
    ({"seed": -1}, "seed must be an integer >= 0, got -1"),
    *(({"lr": value}, "lr must be a finite number > 0") for value in (0, -1, math.nan, math.inf)),
    *(({"strength": value}, "strength must be") for value in (-1.0, math.nan, math.inf)),
    ({"device": "cuda:99"}, "device 'cuda:99' is not available here .* leave device out"),
    ({"device": "gpu"}, "device 'gpu' is not available here"),
    ({"device": "meta"}, "device 'meta' is not available here"),
    ({"model": "mlp"}, "model must be a torch.nn.Module, got str"),
    ({"model": nn.ReLU()}, "model has no trainable parameter"),
]


class TestBadInput:
    @pytest.mark.parametrize(("arguments", "message"), BAD_INPUT)
    def test_one_sentence_before_any_work(self, arguments, message, tmp_path, monkeypatch):
        monkeypatch.setattr(training, "load_dataset", lambda *_args, **_kwargs: pytest.fail("work"))
        given = {"method": "si", **QUICK, "out": tmp_path / "out", **arguments}
        with pytest.raises(ValueError, match=message) as caught:
            clext.train(**given)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    def test_options_beside_an_instance(self):
        method = clext.SI(small())
        with pytest.raises(ValueError, match="xi"):
            clext.train(method, xi=0.2, **QUICK)
        with pytest.raises(ValueError, match="strength"):
            clext.train(method, strength=0.2, **QUICK)
        with pytest.raises(ValueError, match="another model"):
            clext.train(method, model=small(), **QUICK)

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (nn.Linear(784, 10), r"inputs \[N, 64\] into logits \[N, 10\], but failed"),
            (nn.Linear(64, 3), r"logits \[N, 10\], got \[2, 3\]"),
            (nn.Sequential(nn.Linear(64, 10), nn.Flatten(0)), r"got \[20\]"),
        ],
    )
    def test_a_model_that_does_not_fit_the_data(self, model, message):
        before = weights(model)
        with pytest.raises(ValueError, match=message):
            clext.train("ewc", model=model, **QUICK)
        assert same(before, weights(model))

    def test_an_output_folder_that_cannot_be_written(self, tmp_path, monkeypatch):
        monkeypatch.setattr(training, "load_dataset", lambda *_args, **_kwargs: pytest.fail("work"))
        (tmp_path / "file").write_text("mine")
        for out in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(OSError, match=r"out: cannot write in .*file.* choose another"):
                clext.train("si", out=out, **QUICK)
        assert (tmp_path / "file").read_text() == "mine"


class TestEarlyEnd:
    def test_a_non_finite_loss_stops_and_keeps_what_was_done(self, tmp_path):
        method = clext.SI(small())
        healthy = method.consolidate

        def consolidate(batches: object) -> None:
            healthy(batches)
            method.strength = 1e300  # finite, but infinite in the parameters' float32

        method.consolidate = consolidate
        with pytest.raises(
            clext.NonFiniteLossError, match=r"si: .*at task 2, epoch 1, step"
        ) as caught:
            clext.train(method, lr=1e-2, out=tmp_path, **QUICK)
        result = caught.value.result
        assert len(result.average_accuracy) == 1
        assert len(result.curve) == 2
        assert not result.complete
        saved = clext.Result.load(tmp_path)
        assert saved.curve == result.curve
        assert saved.stopped == str(caught.value)
        assert str(tmp_path) in " ".join(caught.value.__notes__)

    def test_a_huge_learning_rate_is_named_with_its_place(self, tmp_path):
        with pytest.raises(
            clext.NonFiniteLossError,
            match=r"baseline: .* at task 1, epoch 1, step \d+; try a smaller lr \(now 1e\+30\)",
        ):
            clext.train("baseline", lr=1e30, out=tmp_path, **QUICK)
        assert clext.Result.load(tmp_path).curve == []

    def test_a_parameter_that_breaks_in_the_last_step_is_noticed(self):
        model = nn.Linear(64, 10)
        options = {**QUICK, "tasks": 1, "epochs": 1, "batch_size": 5000}
        with pytest.raises(clext.NonFiniteLossError, match="a parameter became NaN or infinite"):
            clext.train("baseline", model=model, lr=1e39, **options)

    def test_ctrl_c_saves_what_was_done(self, tmp_path, monkeypatch):
        calls = itertools.count()
        evaluate = training.evaluate

        def interrupt(*args: object) -> float:
            if next(calls) == 3:
                raise KeyboardInterrupt
            return evaluate(*args)

        monkeypatch.setattr(training, "evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt) as caught:
            clext.train("baseline", model=small(), out=tmp_path, **QUICK)
        assert "saved in" in caught.value.__notes__[0]
        saved = clext.Result.load(tmp_path)
        assert saved.stopped == "KeyboardInterrupt"
        assert len(saved.average_accuracy) == 1

    def test_results_are_saved_after_each_task(self, tmp_path):
        seen = []

        class Spy(clext.Baseline):
            def consolidate(self, dataloader: object = None) -> None:
                if self.tasks:
                    seen.append(json.loads((tmp_path / "result.json").read_text()))
                super().consolidate(dataloader)

        clext.train(Spy(small()), out=tmp_path, **QUICK)
        assert len(seen[0]["summary"]["average_accuracy"]) == 1
        assert sorted(p.name for p in tmp_path.iterdir()) == ["accuracy.png", "result.json"]

    def test_a_disk_that_fills_up_does_not_cost_the_run(self, tmp_path, monkeypatch):
        def full(*_args: object) -> None:
            raise OSError("No space left on device")

        monkeypatch.setattr("clext.result.write_json", full)
        with pytest.warns(UserWarning, match="could not be saved .No space left"):
            result = clext.train("baseline", model=small(), out=tmp_path, **QUICK)
        assert result.complete


class TestProgress:
    def test_a_log_gets_a_line_per_epoch(self, capsys):
        clext.train("si", model=small(), **{**QUICK, "progress": True})
        out, err = capsys.readouterr()
        lines = err.splitlines()
        assert out == ""
        assert len(lines) == 5
        assert lines[1].startswith("si: task 1/2 epoch 1/2, loss ")
        assert "accuracy" in lines[4]

    def test_a_terminal_gets_a_bar(self, capsys, monkeypatch):
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        clext.train("si", model=small(), **{**QUICK, "progress": True})
        bar = capsys.readouterr().err
        assert "task 2/2 epoch 2/2, loss" in bar
        assert "100%" in bar

    def test_silence_leaves_the_line_about_the_data(self, capsys):
        clext.train("si", model=small(), **QUICK)
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("clext: data set digits")
        assert err.count("\n") == 1


class TestCompare:
    def test_all_start_from_the_same_weights_and_see_the_same_tasks(self):
        model = small()
        before = weights(model)
        comparison = clext.compare(["baseline", "ewc"], model=model, **QUICK)
        assert same(before, weights(model))
        assert list(comparison.results) == ["baseline", "ewc"]
        alone = clext.train("baseline", model=copy.deepcopy(model), **QUICK)
        assert comparison["baseline"].curve == alone.curve
        assert comparison["ewc"].curve[:2] == alone.curve[:2]  # no penalty in the first task

    def test_options_reach_their_method(self):
        comparison = clext.compare(
            ["ewc", "si"],
            model=small(),
            options={"ewc": {"strength": 3.0, "gamma": 0.5}, "si": {"xi": 0.3}},
            **QUICK,
        )
        assert comparison["ewc"].config["strength"] == 3.0
        assert comparison["ewc"].config["method_options"]["gamma"] == 0.5
        assert comparison["si"].config["method_options"] == {"xi": 0.3}

    def test_a_method_that_diverges_does_not_stop_the_others(self, tmp_path):
        with pytest.warns(UserWarning, match=r"si: the loss became nan at task 1"):
            comparison = clext.compare(
                ["si", "baseline"],
                model=small(),
                lr=1e-2,
                options={"si": {"strength": 1e300}},
                out=tmp_path,
                **QUICK,
            )
        assert not comparison["si"].complete
        assert comparison["baseline"].complete
        loaded = clext.Comparison.load(tmp_path)
        assert "stopped early: si" in str(loaded)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["accuracy.png", "comparison.json"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"methods": ["ewc", "sii"]}, "unknown method 'sii'.*'si'"),
            ({"methods": []}, "at least one method"),
            ({"methods": ["si", "si"]}, "'si' is given twice"),
            ({"methods": ["si"], "options": {"ewc": {}}}, "unknown method in options 'ewc'"),
            ({"methods": ["si"], "options": {"si": {"xii": 1}}}, "'xii'.*'xi'"),
            ({"methods": ["si"], "tasks": 0}, "tasks must be"),
        ],
    )
    def test_bad_input_before_any_work(self, arguments, message, monkeypatch):
        monkeypatch.setattr(
            "clext.comparison.load_dataset", lambda *_args, **_kwargs: pytest.fail("work")
        )
        with pytest.raises(ValueError, match=message):
            clext.compare(**{**QUICK, **arguments})


@pytest.mark.skipif(
    not os.environ.get("CLEXT_DATA"), reason="the real MNIST is needed: set CLEXT_DATA"
)
def test_real_mnist_is_learned(device, tmp_path, monkeypatch):
    data = load_dataset("mnist")
    assert (len(data.train.labels), len(data.test.labels)) == (60_000, 10_000)
    assert data.train.inputs.mean().item() == pytest.approx(0.1307, abs=1e-4)
    part = dataclasses.replace(data, train=Split(*(t[:10_000] for t in data.train)))
    monkeypatch.setattr(training, "load_dataset", lambda *_args, **_kwargs: part)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = clext.train(
            "ewc", tasks=2, epochs=1, lr=1e-3, device=device, out=tmp_path, progress=False
        )
    assert result.accuracy[0, 0] > 0.8
    assert result.average_accuracy[1] > 0.6
    assert clext.Result.load(tmp_path).config["data"]["name"] == "mnist"
