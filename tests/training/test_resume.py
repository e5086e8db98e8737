"""A run that is stopped anywhere goes on to the bits of one in one piece."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from quick_runs import QUICK, SPLIT, small
from safetensors.torch import load_file
from torch import nn

import clext
from clext.training.run_folder import RunFolder

METHODS = [*clext.METHODS, "ewc+replay", "si+lwf", "scp+dgr"]
PICTURES = {"accuracy.png", "matrix.png", "tasks.png"}
LEFT = {*PICTURES, "method.safetensors", "model.safetensors", "result.json"}


class StopAt(clext.Callback):
    """As a kill after a step, but what was written stays as it was then."""

    def __init__(self, step):
        self.step = step

    def on_step(self, training):
        if training.total_steps == self.step:
            raise KeyboardInterrupt


def drawing():
    """A model that draws, has statistics, and whose weights are partly shared."""
    torch.manual_seed(0)
    hidden = nn.Linear(32, 32)
    return nn.Sequential(
        *(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), hidden, nn.ReLU(), hidden),
        *(nn.Dropout(0.2), nn.Linear(32, 10)),
    )


def ended(result):
    """All that must be the same."""
    numbers = (result.curve, result.steps, result.accuracy.tolist(), result.before.tolist())
    weights = [entry.tolist() for entry in result.model.state_dict().values()]
    return json.dumps([*numbers, result.untrained.tolist(), weights])


def whole_and_parts(method, stops, folder, **options):
    """How a run in one piece ends, and one that was stopped after each of these steps."""
    whole = clext.train(method, model=drawing(), **options)
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            clext.train(
                *(method,),
                **{**options, "callbacks": [StopAt(stop)]},
                model=drawing(),
                out=folder,
                checkpoint_every=7,
                resume=True,
            )
    parts = clext.train(method, model=drawing(), out=folder, resume=True, **options)
    return whole, parts


@pytest.mark.parametrize("scenario", ["permuted", "split"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_to_the_same_bits(method, scenario, tmp_path):
    options = {**(QUICK if scenario == "permuted" else SPLIT), "lr": 1e-2, "batch_size": 64}
    # Before the first checkpoint, at the end of an epoch, and in the second task.
    stops = (3, 23, 60) if scenario == "permuted" else (3, 17, 40)
    whole, parts = whole_and_parts(method, stops, tmp_path / "run", **options)
    assert ended(parts) == ended(whole)
    assert {path.name for path in (tmp_path / "run").iterdir()} == LEFT
    again = clext.train(method, model=drawing(), out=tmp_path / "run", resume=True, **options)
    assert ended(again) == ended(whole)


def noisy_schedule(optimizer, steps):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def attached_sgd(parameters, method):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "momentum": 0.9, "lr": 0.05, "scheduler": "one-cycle"},
        {"optimizer": "adamw", "scheduler": "step", "keep_optimizer": True, "max_grad_norm": 0.5},
        {"optimizer": attached_sgd, "scheduler": noisy_schedule, "keep_optimizer": True},
        {"iterations": 31, "epochs": None, "evaluate_every": 5, "label_smoothing": 0.1},
        {"precision": "bf16", "keep_optimizer": True},
    ],
    ids=["one-cycle", "kept", "functions", "iterations", "bf16"],
)
def test_every_way_to_train_does(options, tmp_path):
    settings = {**QUICK, "lr": 1e-2, "batch_size": 64, **options}
    whole, parts = whole_and_parts("si", (17, 33, 45), tmp_path / "run", **settings)
    assert ended(parts) == ended(whole)


def test_in_a_course_model_the_global_random_state_has_no_part(tmp_path):
    before = torch.get_rng_state()
    whole = clext.train("ewc", **QUICK)
    with pytest.raises(KeyboardInterrupt):
        clext.train("ewc", out=tmp_path, callbacks=[StopAt(20)], **QUICK)
    parts = clext.train("ewc", out=tmp_path, resume=True, **QUICK)
    assert ended(parts) == ended(whole)
    assert torch.get_rng_state().equal(before)


def test_it_says_where_it_goes_on(tmp_path, capsys):
    settings = {**QUICK, "model": small(), "out": tmp_path, "progress": True}
    with pytest.raises(KeyboardInterrupt):
        clext.train("ewc", callbacks=[StopAt(20)], **settings)
    capsys.readouterr()
    clext.train("ewc", resume=True, **settings)
    assert "clext: ewc goes on with task 1, epoch 2\n" in capsys.readouterr().err


class Power(clext.EWC):
    """An option that may be given by its position."""

    name = "power"

    def __init__(self, model, power=1.0, **options):
        super().__init__(model, **options)
        self.power = power


def test_every_option_of_a_method_of_ones_own_counts(tmp_path):
    method = Power(small(), 2.0, gamma=0.5)
    assert "power=2.0" in repr(method)
    result = clext.train(method, out=tmp_path, **QUICK)
    assert result.config["method_options"]["power"] == 2.0
    for name, other in (("power", Power(small(), gamma=0.5)), ("gamma", Power(small(), 2.0))):
        with pytest.raises(ValueError, match=name):
            clext.train(other, out=tmp_path, resume=True, **QUICK)


class TestFolder:
    def test_weights_and_method_are_those_of_the_result(self, tmp_path):
        result = clext.train("ewc", model=small(), out=tmp_path, **QUICK)
        loaded = small()
        loaded.load_state_dict(load_file(tmp_path / "model.safetensors"))
        for name, entry in result.model.state_dict().items():
            assert loaded.state_dict()[name].equal(entry)
        method = clext.EWC(loaded)
        method.load_flat_state_dict(load_file(tmp_path / "method.safetensors"))
        assert method.tasks == 2
        assert sum(map(torch.sum, method.importance.values())) > 0

    def test_another_run_is_not_overwritten_unasked(self, tmp_path):
        clext.train("ewc", model=small(), out=tmp_path, **QUICK)
        kept = (tmp_path / "result.json").read_bytes()
        for function in (clext.train, clext.compare):
            with pytest.raises(FileExistsError, match=r"holds result.json.* overwrite=True"):
                function("si", model=small(), out=tmp_path, **QUICK)
        assert (tmp_path / "result.json").read_bytes() == kept
        clext.compare("si", model=small(), out=tmp_path, overwrite=True, **QUICK)
        there = {path.name for path in tmp_path.iterdir()}
        assert {"comparison.json", "accuracy.png"} == there

    def test_results_of_several_are_not_gone_on_with_and_stay(self, tmp_path):
        clext.compare("si", model=small(), out=tmp_path, **QUICK)
        with pytest.raises(FileExistsError, match=r"holds comparison.json of another run"):
            clext.train("si", model=small(), out=tmp_path, resume=True, **QUICK)
        assert clext.Comparison.load(tmp_path)["si"].complete

    def test_a_wrong_argument_overwrites_nothing(self, tmp_path):
        clext.train("ewc", model=small(), out=tmp_path, **QUICK)
        for function in (clext.train, clext.compare):
            with pytest.raises(ValueError, match="data set|split"):
                function("si", out=tmp_path, overwrite=True, **{**SPLIT, "tasks": 3})
            with pytest.raises(ValueError, match="model must turn"):
                function("si", model=nn.Linear(3, 10), out=tmp_path, overwrite=True, **QUICK)
            with pytest.raises(ValueError, match="model must turn"):
                function("si", model=nn.Linear(3, 10), out=tmp_path / "new", **QUICK)
        assert clext.Result.load(tmp_path).label == "ewc"
        assert {path.name for path in tmp_path.iterdir()} == LEFT

    def test_another_run_is_not_gone_on_with(self, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            clext.train("ewc", model=small(), out=tmp_path, callbacks=[StopAt(20)], **QUICK)
        for changed, said in (
            ({"lr": 0.5}, r"holds a run with lr 0.0001, not 0.5; choose another folder"),
            ({"seed": 1}, "with seed 0, not 1"),
            ({"strength": 3.0}, "with strength .*, not 3.0"),
        ):
            with pytest.raises(ValueError, match=said):
                clext.train("ewc", model=small(), out=tmp_path, resume=True, **{**QUICK, **changed})
        done = clext.train("ewc", model=small(), out=tmp_path, resume=True, **QUICK)
        assert done.complete
        with pytest.raises(ValueError, match="with lr"):
            clext.train("ewc", model=small(), out=tmp_path, resume=True, **{**QUICK, "lr": 0.5})

    def test_a_damaged_checkpoint_is_one_sentence(self, tmp_path):
        (tmp_path / "checkpoint.safetensors").write_bytes(b"\x00" * 100)
        with pytest.raises(ValueError, match="checkpoint.safetensors: not a checkpoint of clext"):
            clext.train("ewc", model=small(), out=tmp_path, resume=True, **QUICK)

    def test_resume_and_overwrite_exclude_each_other(self, tmp_path):
        with pytest.raises(ValueError, match="give one of them"):
            clext.train("ewc", out=tmp_path, resume=True, overwrite=True, **QUICK)

    def test_resume_needs_a_folder(self):
        with pytest.raises(ValueError, match="need out"):
            clext.train("ewc", resume=True, **QUICK)

    def test_a_full_disk_does_not_cost_the_run(self, tmp_path, monkeypatch):
        def full(*_args):
            raise OSError("No space left on device")

        monkeypatch.setattr("clext.training.run_folder.save_file", full)
        with pytest.warns(UserWarning, match="No space left") as said:
            result = clext.train("ewc", model=small(), out=tmp_path, **QUICK)
        assert result.complete
        assert any("weights could not be saved" in str(one.message) for one in said)
        monkeypatch.undo()
        again = clext.train("ewc", model=small(), out=tmp_path / "whole", **QUICK)
        assert ended(result) == ended(again)

    def test_weights_that_were_not_written_are_made_again(self, tmp_path, monkeypatch):
        """The last files fail; the checkpoint is still there, and the same call ends the run."""
        keep = RunFolder.keep_weights
        monkeypatch.setattr(RunFolder, "keep_weights", lambda *_args: False)
        whole = clext.train("ewc", model=small(), out=tmp_path, **QUICK)
        monkeypatch.setattr(RunFolder, "keep_weights", keep)
        assert (tmp_path / "checkpoint.safetensors").exists()
        parts = clext.train("ewc", model=small(), out=tmp_path, resume=True, **QUICK)
        assert ended(parts) == ended(whole)
        assert {path.name for path in tmp_path.iterdir()} == LEFT

    def test_a_state_that_is_no_json_costs_the_checkpoint_alone(self, tmp_path):
        def with_an_object(optimizer, steps):
            made = torch.optim.lr_scheduler.ConstantLR(optimizer)
            made.mine = object()
            return made

        with pytest.warns(UserWarning, match="cannot be gone on with from here"):
            result = clext.train(
                "si", model=small(), out=tmp_path, scheduler=with_an_object, **QUICK
            )
        assert result.complete
        assert (tmp_path / "model.safetensors").exists()

    def test_others_may_read_what_is_left(self, tmp_path):
        clext.train("si", model=small(), out=tmp_path / "run", **QUICK)
        modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "run").iterdir()}
        assert modes == {(tmp_path / "run").stat().st_mode & 0o666}


class TestKilled:
    """The command line, ended from outside."""

    COMMAND = (
        *(sys.executable, "-m", "clext", "train", "--method", "ewc+replay", "--dataset", "digits"),
        *("--tasks", "2", "--epochs", "8", "--model", "mlp-64", "--quiet"),
        *("--out", "run", "--resume"),
    )

    def numbers(self, folder):
        content = json.loads((folder / "run" / "result.json").read_text())
        weights = load_file(folder / "run" / "model.safetensors")
        return {name: content[name] for name in ("accuracy", "curve", "before", "untrained")}, {
            name: entry.tolist() for name, entry in weights.items()
        }

    def run(self, folder):
        folder.mkdir(exist_ok=True)
        return subprocess.Popen(
            self.COMMAND,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # The tests may run in the background, where Ctrl-C is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    @pytest.fixture(scope="class")
    def whole(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("whole")
        started = time.monotonic()
        process = self.run(folder)
        process.communicate()
        assert process.returncode == 0
        return self.numbers(folder), time.monotonic() - started

    def test_sigkill_at_random_times(self, whole, tmp_path):
        numbers, seconds = whole
        draw = random.Random(0)
        for _ in range(3):
            process = self.run(tmp_path)
            time.sleep(draw.uniform(0.2, 0.6) * seconds)
            process.kill()
            process.communicate()
        (tmp_path / "run" / ".writing-1").mkdir(exist_ok=True)  # as one that is killed leaves it
        process = self.run(tmp_path)
        assert process.wait(timeout=120) == 0, process.stderr.read()
        assert self.numbers(tmp_path) == numbers
        assert {path.name for path in (tmp_path / "run").iterdir()} == LEFT

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_is_waited_for_and_says_how_to_go_on(self, number, whole, tmp_path):
        process = self.run(tmp_path)
        while not (tmp_path / "run" / "checkpoint.safetensors").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGTERM)
        assert "the same call with resume=True (--resume) goes on from run" in said
        process = self.run(tmp_path)
        assert process.wait(timeout=120) == 0, process.stderr.read()
        assert self.numbers(tmp_path) == whole[0]


def test_signals_are_handled_as_before_when_it_ends(tmp_path):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    inside = []

    class Look(clext.Callback):
        def on_step(self, training):  # noqa: ARG002
            inside.append(signal.getsignal(signal.SIGTERM))

    clext.train("si", model=small(), callbacks=[Look()], **QUICK)
    assert set(inside) == {handlers[1]}  # nothing to save
    clext.train("si", model=small(), out=tmp_path, callbacks=[Look()], **QUICK)
    assert inside[-1] != handlers[1]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_signal_stops_at_once(tmp_path):
    class Twice(clext.Callback):
        def on_step(self, training):
            if training.total_steps == 20:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                pytest.fail("it went on")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            clext.train("si", model=small(), out=tmp_path, callbacks=[Twice()], **QUICK)
    finally:
        signal.signal(signal.SIGINT, before)
