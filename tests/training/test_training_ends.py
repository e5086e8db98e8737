"""What ends a run early, or before it begins, and what a run says while it works."""

import io
import itertools
import json
import math
import re
import warnings

import pytest
import torch
from quick_runs import QUICK, same, small, weights
from torch import nn

import clext
from clext.training import evaluate as evaluation
from clext.training import runs
from clext.training.progress import Progress

BAD_INPUT = [
    ({"method": "ewx"}, "unknown method 'ewx'.*'ewc'"),
    ({"method": "ewc", "gama": 0.5}, "unknown option.*'gama'.*'gamma'"),
    ({"method": "baseline", "gamma": 0.5}, "unknown option.*'gamma'"),
    ({"verbose": False}, "neither of si nor of train: 'verbose'.*'xi'.*'progress'"),
    ({"epoch": 1}, "neither of si nor of train: 'epoch'; did you mean 'epochs'"),
    ({"method": clext.SI(small()), "epoch": 1}, "neither of si nor of train: 'epoch'; .*'epochs'"),
    ({"out": 5}, "^train: out must be a path, such as 'runs/ewc', got 5$"),
    ({"data_dir": 5}, "^train: data_dir must be a path, such as 'runs/ewc', got 5$"),
    ({"method": "ewc", "gamma": 2.0}, "gamma must be .* got 2.0"),
    ({"dataset": "minst"}, "unknown dataset 'minst'.*'mnist'"),
    ({"scenario": "permutted"}, "unknown scenario 'permutted'.*'permuted'"),
    ({"scenario": ["permuted"]}, r"scenario is a list, expected a name \(permuted, .*from_data"),
    ({"tasks": 0}, "tasks must be an integer >= 1, got 0"),
    ({"epochs": 1.5}, "epochs must be an integer >= 1, got 1.5"),
    ({"batch_size": True}, "batch_size must be an integer >= 1, got True"),
    ({"evaluate_every": "5"}, "evaluate_every must be an integer >= 1, got '5'"),
    ({"seed": -1}, "seed must be an integer >= 0, got -1"),
    *(({"lr": value}, "lr must be a finite number > 0") for value in (0, math.nan)),
    ({"strength": -1.0}, "strength must be"),
    ({"device": "cuda:99"}, "device 'cuda:99' is not available here .* leave device out"),
    ({"device": "meta"}, "device 'meta' is not available here"),
    ({"model": "mlpp"}, "unknown model 'mlpp'; did you mean 'mlp'"),
    ({"model": nn.ReLU()}, "model has no trainable parameter"),
    ({"batch_size": 2**63}, r"batch_size must be an integer >= 1 and < 1,0.*, got 92233720"),
    ({"tasks": 10**8}, "tasks=100000000 takes at least .* GiB, more than the .* of memory here"),
    ({"method": "replay", "budget": 10**14}, "budget must be an integer >= 1 and < 1,0"),
    ({"method": "gem", "per_task": 10**14}, "per_task must be an integer >= 1 and < 1,0"),
    ({"method": "scp", "slices": 10**12}, "scp: slices=1000000000000 takes at least .* GiB"),
    (
        {"method": "dgr", "hidden": (10**7, 10**7)},
        r"hidden, latent\)=\(10000000, 10000000, 100\) ta",
    ),
    ({"method": "ewc", "lam": 5.0}, "'lam'; did you mean 'strength'"),
    ({"method": "ewc,si"}, r"write 'ewc\+si', to run one after .*compare\(\['ewc', 'si'\]\)"),
    ({"method": "ewc", "out": "~nosuchuser/x"}, "^train: out: the home folder in '~nosuchuser/x'"),
]


class TestBadInput:
    @pytest.mark.parametrize(("arguments", "message"), BAD_INPUT)
    def test_one_sentence_before_any_work(self, arguments, message, tmp_path, monkeypatch):
        monkeypatch.setattr(runs, "load_dataset", lambda *_args, **_kwargs: pytest.fail("work"))
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
            (
                nn.Sequential(nn.Linear(64, 10), nn.Flatten(0)),
                r"returned torch.float32 \[20\] for 2 samples",
            ),
        ],
    )
    def test_a_model_that_does_not_fit_the_data(self, model, message):
        before = weights(model)
        with pytest.raises(ValueError, match=message):
            clext.train("ewc", model=model, **QUICK)
        assert same(before, weights(model))

    def test_an_output_folder_that_cannot_be_written(self, tmp_path, monkeypatch):
        monkeypatch.setattr(runs, "load_dataset", lambda *_args, **_kwargs: pytest.fail("work"))
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

    def test_a_last_batch_that_a_norm_cannot_take_is_explained(self):
        x, y = torch.rand(65, 6), torch.arange(65) % 2
        scenario = clext.Scenario.from_datasets([((x, y), (x, y))] * 2, incremental="domain")
        model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        options = {"scenario": scenario, "epochs": 1, "progress": False}
        with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
            clext.train("baseline", model=model, batch_size=32, **options)
        note = " ".join(caught.value.__notes__)
        assert "The last batch of an epoch has one example (65 in batches of 32)" in note
        assert clext.train("baseline", model=model, batch_size=33, **options).complete

        class Refuses(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                if len(x) == 1:
                    raise ValueError("no")
                return super().forward(x)

        with pytest.raises(ValueError, match="^no$") as caught:
            clext.train("baseline", model=Refuses(6, 2), batch_size=32, **options)
        assert "last batch" not in " ".join(getattr(caught.value, "__notes__", ()))

    def test_a_huge_learning_rate_is_named_with_its_place(self, tmp_path):
        with pytest.raises(
            clext.NonFiniteLossError,
            match=r"baseline: .* at task 1, epoch 1, step \d+; .*try a smaller lr \(now 1e\+30\)",
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
        evaluate = evaluation.evaluate

        def interrupt(*args: object) -> float:
            if next(calls) == 7:  # in the first epoch of the second task
                raise KeyboardInterrupt
            return evaluate(*args)

        monkeypatch.setattr(evaluation, "evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt) as caught:
            clext.train("baseline", model=small(), out=tmp_path, **QUICK)
        assert "saved in" in caught.value.__notes__[0]
        saved = clext.Result.load(tmp_path)
        assert saved.stopped == "interrupted"
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
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            *("accuracy.png", "matrix.png", "method.safetensors", "model.safetensors"),
            *("result.json", "tasks.png"),
        ]

    def test_a_disk_that_fills_up_does_not_cost_the_run(self, tmp_path, monkeypatch):
        def full(*_args: object) -> None:
            raise OSError("No space left on device")

        monkeypatch.setattr("clext.training.result.write_json", full)
        with pytest.warns(UserWarning, match="could not be saved .No space left"):
            result = clext.train("baseline", model=small(), out=tmp_path, **QUICK)
        assert result.complete


class TestProgress:
    def test_a_log_gets_a_line_per_task(self, capsys):
        clext.train("si", model=small(), **{**QUICK, "progress": True})
        out, err = capsys.readouterr()
        assert out == ""
        lines = err.splitlines()[1:]  # the first is about the data
        places = [line.partition(", loss ")[0] for line in lines]
        assert places == ["si: task 1/2 epoch 2/2", "si: task 2/2 epoch 2/2"]
        assert re.search(r", accuracy 0\.\d{4}, after \d+\.\d s$", lines[1])

    def test_a_log_of_long_tasks_is_not_silent_for_minutes(self, capsys, monkeypatch):
        clock = itertools.count(step=25.0)  # seconds, each time it is looked at
        monkeypatch.setattr("clext.training.progress.time.perf_counter", lambda: next(clock))
        with Progress("si", tasks=1, epochs=8, show=True) as progress:
            for epoch in range(8):
                progress.epoch_end(0, epoch, 0.5, 0.5)
        lines = capsys.readouterr().err.splitlines()
        assert [line[: len("si: task 1/1 epoch 3/8")] for line in lines] == [
            f"si: task 1/1 epoch {epoch}/8" for epoch in (3, 6, 8)
        ]

    def test_a_notebook_gets_a_bar(self, monkeypatch):
        stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
        monkeypatch.setattr("sys.stderr", stream)
        clext.train("si", model=small(), **{**QUICK, "progress": True})
        assert "task 2/2 epoch 2/2 loss " in stream.getvalue()
        assert ", after " not in stream.getvalue()

    def test_a_terminal_gets_a_bar(self, capsys, monkeypatch):
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        clext.train("si", model=small(), **{**QUICK, "progress": True})
        bar = capsys.readouterr().err
        assert "task 2/2 epoch 2/2 loss" in bar
        assert "100%" in bar

    @pytest.mark.parametrize("method", ["baseline", "joint"])  # and one whose tasks grow
    def test_the_bar_is_that_of_all_tasks_from_the_first(self, capsys, monkeypatch, method):
        monkeypatch.setattr("clext.training.progress.shows_bars", lambda: True)
        clext.train(method, model=small(), **{**QUICK, "progress": True})
        shown = re.findall(r"(\d+)%.*?task (\d)/2", capsys.readouterr().err)
        furthest = {task: max(int(p) for p, t in shown if t == task) for task in "12"}
        assert furthest == {"1": 50, "2": 100}

    @pytest.mark.parametrize(("lr", "progress"), [(1e-4, True), (1e-3, True), (1e-4, False)])
    def test_settings_for_few_digits_are_said_until_they_are_followed(self, capsys, lr, progress):
        clext.train("si", model=small(), **{**QUICK, "lr": lr, "progress": progress})
        line = capsys.readouterr().err.splitlines()[0]
        assert ("Digits are few" in line) == (lr < 1e-3 and progress)

    def test_without_stderr_it_works_in_silence(self, monkeypatch, capsys):
        monkeypatch.setattr("sys.stderr", None)
        done = clext.train("si", model=small(), **{**QUICK, "progress": True})
        assert done.complete
        assert capsys.readouterr().out == ""

    def test_a_task_near_chance_says_so_and_what_to_try(self):
        model = small()
        nn.init.zeros_(model[2].weight)  # the outputs are the same for all examples
        with pytest.warns(UserWarning, match="near chance") as caught:
            clext.train("si", model=model, lr=1e-9, strength=0.1, **QUICK)
        first, second = (str(warning.message) for warning in caught)
        assert re.match(r"si: task 1 ended near chance, with accuracy 0\.\d\d, where its", first)
        assert first.endswith("gives 0.10; try another lr (now 1e-09) or more epochs (now 2)")
        assert second.endswith("or a smaller strength (now 0.1)")

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("tasks", [2, 10])  # ten have one class each, of which 1 is chance
    def test_a_task_that_was_learned_does_not(self, tasks):
        options = {**QUICK, "tasks": tasks, "scenario": "split"}
        clext.train("baseline", model=small(), lr=1e-2, **options)

    @pytest.mark.parametrize("able", [False, True])
    def test_bf16_on_a_cpu_without_it_says_that_it_is_slower(self, monkeypatch, able):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True, "amx_bf16": able})
        options = {"lr": 1e-2, "device": "cpu", "precision": "bf16"}
        with warnings.catch_warnings(record=True) as caught:
            clext.train("baseline", model=small(), **options, **QUICK)
        said = [str(warning.message) for warning in caught]
        assert any("no bf16 arithmetic" in message for message in said) != able

    def test_silence_leaves_the_line_about_the_data(self, capsys):
        clext.train("si", model=small(), **QUICK)
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("clext: data set digits")
        assert err.count("\n") == 1
