"""The command line, as its users meet it."""

import inspect
import re
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner, Result

import clext
from clext import cli
from clext.training.describe import option_values

QUICK = ("--dataset", "digits", "--tasks", "2", "--epochs", "1", "--quiet")
ONE_TASK = (*QUICK, "--tasks", "1")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


class TestTrain:
    def test_prints_the_table_and_saves_by_default(self, tmp_path):
        outcome = run("train", "--method", "si", *QUICK)
        assert outcome.exit_code == 0, outcome.output
        assert "si on permuted digits: average accuracy 0." in outcome.stdout
        assert "after task 2" in outcome.stdout
        assert (
            "Saved in runs/si: result.json, accuracy.png, tasks.png, matrix.png" in outcome.stdout
        )
        assert clext.Result.load(tmp_path / "runs" / "si").complete

    def test_never_replaces_an_earlier_result_unasked(self, tmp_path):
        (tmp_path / "runs" / "baseline").mkdir(parents=True)
        run("train", "--method", "baseline", *ONE_TASK)
        names = [path.name for path in (tmp_path / "runs").iterdir()]
        assert sorted(names) == ["baseline", "baseline-2"]

    def test_options_reach_the_method(self):
        outcome = run(
            *("train", "--method", "ewc", "--strength", "3", "--out", "here", *ONE_TASK),
            *("--option", "fisher=batch", "--option", "gamma=0.5"),
        )
        assert outcome.exit_code == 0, outcome.output
        config = clext.Result.load("here").config
        assert config["strength"] == 3
        assert config["method_options"]["fisher"] == "batch"
        assert config["method_options"]["gamma"] == 0.5

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--method", "ewx"], "Error: unknown method 'ewx'"),
            (["--method", "ewc,si"], "use clext compare --methods ewc,si"),
            (["--batch-size", str(2**63)], "train: batch_size must be an integer >= 1 and < 1,0"),
            (["--option", "lambda_=3"], "'lambda_'; did you mean 'strength'?"),
            (["--option", "alpha=3"], "'alpha'; did you mean 'strength'?"),
            (["--option", f"xi={'-' * 100_000}1"], "xi=-----------------...: expected at most"),
            (["--out", "~nosuchuser/x"], "train: out: the home folder in '~nosuchuser/x'"),
            (["--dataset", "minst"], "Error: unknown dataset 'minst'"),
            (["--tasks", "0"], "Error: train: tasks must be an integer >= 1, got 0"),
            (["--tasks", "x"], "Error: Invalid value for '--tasks'"),
            (["--strength", "nan"], "strength must be"),
            (["--option", "xi"], "Error: --option xi: expected NAME=VALUE"),
            (["--option", "xi=large"], "xi must be"),
            (["--option", "strength=1"], "Error: --option strength: use --strength instead"),
            (["--option", "batch_size=1"], "use --batch-size instead"),
            (["--option", "method=si"], "use --method instead"),
            (["--out", "file/below"], "Error: train: out: cannot write in file/below"),
            (["--dataset", "mnist", "--data-dir", "nowhere"], "Error: MNIST cannot be had"),
        ],
    )
    def test_bad_input_is_one_line_and_exit_code_2(self, arguments, message, tmp_path, monkeypatch):
        monkeypatch.setattr("clext.data.datasets.download", lambda *_args, **_kwargs: "no network")
        (tmp_path / "file").touch()
        outcome = run("train", "--method", "si", *QUICK, *arguments)
        assert outcome.exit_code == 2
        assert message in outcome.stderr
        assert "Traceback" not in outcome.output
        assert outcome.stdout == ""
        assert len(outcome.stderr) < 2000

    def test_no_memory_left_is_one_line_and_exit_code_1(self, monkeypatch):
        def allocate(*_args: object) -> None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nmore")

        monkeypatch.setattr("clext.training.evaluate.evaluate", allocate)
        outcome = run("train", "--method", "baseline", *QUICK)
        assert outcome.exit_code == 1
        assert outcome.stderr.splitlines()[-1] == (
            "Error: DefaultCPUAllocator: can't allocate memory: you tried. "
            "What was done so far is saved in runs/baseline."
        )

    def test_a_method_may_be_written_in_capitals(self):
        assert run("train", "--method", "EWC", *ONE_TASK).exit_code == 0
        assert clext.Result.load("runs/ewc").label == "ewc"

    def test_a_reader_that_has_seen_enough_ends_it_quietly(self):
        command = [sys.executable, "-m", "clext", "train", "--method", "baseline", *ONE_TASK]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            process.stdout.close()  # as `| head -1`, before anything is written
            said = process.stderr.read()
        assert process.returncode == 0
        assert said.count("\n") == 1  # about the data
        assert clext.Result.load("runs/baseline").complete

    def test_a_diverged_loss_is_exit_code_1_and_says_what_is_saved(self):
        outcome = run("train", "--method", "si", "--lr", "1e30", *QUICK)
        assert outcome.exit_code == 1
        last = outcome.stderr.splitlines()[-1]
        assert last.startswith("Error: si: ")
        assert "at task 1, epoch 1, step" in last
        assert last.endswith("What was done so far is saved in runs/si.")

    def test_a_result_that_cannot_be_saved_is_an_error_and_leaves_no_part(self, tmp_path):
        (tmp_path / "out" / "result.json").mkdir(parents=True)  # in the way of the file
        outcome = run("train", "--method", "baseline", "--out", "out", *ONE_TASK)
        assert outcome.exit_code != 0
        assert "could not be saved" in outcome.stderr
        assert "Saved in" not in outcome.stdout
        assert not [*(tmp_path / "out").glob(".*")]

    def test_ctrl_c_says_what_is_saved(self, monkeypatch):
        def interrupt(*_args: object) -> float:
            raise KeyboardInterrupt

        monkeypatch.setattr("clext.training.evaluate.evaluate", interrupt)
        outcome = run("train", "--method", "baseline", *QUICK)
        assert outcome.exit_code == 130
        assert outcome.stderr.splitlines()[-1] == (
            "Interrupted. What was done so far is saved in runs/baseline."
        )


class TestCompare:
    def test_prints_the_table_and_draws_the_picture(self, tmp_path):
        outcome = run(
            *("compare", "--methods", "baseline, si", "--option", "si.strength=3", *ONE_TASK)
        )
        assert outcome.exit_code == 0, outcome.output
        assert "Saved in runs/compare: comparison.json, accuracy.png" in outcome.stderr
        comparison = clext.Comparison.load(tmp_path / "runs" / "compare")
        assert comparison["si"].config["strength"] == 3
        assert outcome.stdout == f"{comparison}\n"

    def test_with_seeds_it_prints_means_and_leaves_the_runs(self, tmp_path):
        plan = ("--methods", "baseline,si", "--seeds", "0,1", "--table", "markdown")
        outcome = run("compare", *plan, *ONE_TASK)
        assert outcome.exit_code == 0, outcome.output
        sweep = clext.Sweep.load(tmp_path / "runs" / "compare")
        assert outcome.stdout == f"{sweep.table('markdown')}\n"
        assert [run[::2] for run in sweep.results] == [
            (method, seed) for method in ("baseline", "si") for seed in (0, 1)
        ]
        refused = run("compare", "--seed", "3", *plan, *ONE_TASK)
        assert refused.exit_code == 2
        assert "--seeds: expected no --seed beside it" in refused.stderr

    @pytest.mark.parametrize("command", [("compare",), ("train", "--method", "si")])
    def test_a_refused_run_leaves_no_folder(self, command, tmp_path):
        outcome = run(*command, *QUICK, "--scenario", "split", "--tasks", "3")
        assert outcome.exit_code == 2
        assert list((tmp_path / "runs").iterdir()) == []

    def test_a_diverged_method_is_exit_code_1_after_all_have_run(self):
        outcome = run(
            *("compare", "--methods", "si,baseline", "--option", "si.strength=1e300", *QUICK)
        )
        assert outcome.exit_code == 1
        assert "Warning: si: the loss became nan" in outcome.stderr
        assert "baseline" in outcome.stdout

    def test_the_method_of_an_option_ends_at_the_first_dot(self, tmp_path):
        options = ("--option", "ewc+replay.replay.strength=3", "--option", "ewc+replay.budget=50")
        outcome = run("compare", "--methods", "ewc,ewc+replay", *options, *ONE_TASK)
        assert outcome.exit_code == 0, outcome.output
        comparison = clext.Comparison.load(tmp_path / "runs" / "compare")
        assert comparison["ewc+replay"].strengths == [250, 3]
        assert comparison["ewc+replay"].config["method_options"]["replay"]["budget"] == 50
        assert "250, 3" in outcome.stdout

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--methods", "baseline,sii"], "Error: unknown method 'sii'"),
            (["--option", "strength=3"], "Error: --option strength: expected METHOD.NAME=VALUE"),
            (["--option", "foo.strength=3"], "Error: unknown method in options 'foo'"),
        ],
    )
    def test_bad_input_is_one_line_and_exit_code_2(self, arguments, message):
        outcome = run("compare", *QUICK, *arguments)
        assert outcome.exit_code == 2
        assert message in outcome.stderr


class TestSweep:
    PLAN = ("sweep", "--methods", "baseline,ewc", "--strengths", "ewc=1,10", "--seeds", "0-1")

    def test_prints_the_table_and_goes_on_in_the_same_folder(self, tmp_path):
        outcome = run(*self.PLAN, *ONE_TASK)
        assert outcome.exit_code == 0, outcome.output
        assert "Saved in runs/sweep: sweep.json, accuracy.png" in outcome.stderr
        sweep = clext.Sweep.load(tmp_path / "runs" / "sweep")
        assert outcome.stdout == f"{sweep}\n"
        assert list(sweep.results) == [
            *[("baseline", None, 0), ("baseline", None, 1)],
            *[("ewc", strength, seed) for strength in (1, 10) for seed in (0, 1)],
        ]
        file = tmp_path / "runs" / "sweep" / "ewc-10" / "seed-1" / "result.json"
        before = clext.Result.load(file).timings
        more = run(*self.PLAN, "--seeds", "1,2", "--table", "csv", *ONE_TASK)
        assert more.exit_code == 0, more.output
        assert [line.split(",")[:4] for line in more.stdout.splitlines()[1:]] == [
            *[["baseline", "", "2", "0"], ["ewc", "1.0", "2", "0"], ["ewc", "10.0", "2", "0"]],
        ]
        assert clext.Result.load(file).timings == before  # not run again

    def test_a_failed_run_is_exit_code_1_after_all_have_run(self):
        plan = ("sweep", "--methods", "ewc", "--strengths", "1e300,1", "--seeds", "3")
        outcome = run(*plan, *QUICK)
        assert outcome.exit_code == 1
        assert "Warning: sweep: ewc-1e+300/seed-3 failed: ewc: the loss became" in outcome.stderr
        assert "ewc-1e+300/seed-3: ewc: the loss became" in outcome.stdout
        assert clext.Result.load("runs/sweep/ewc-1/seed-3").complete

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--methods", "ewc,sii"], "Error: unknown method 'sii'"),
            (["--strengths", "ewc=x"], "--strengths ewc=x: expected numbers such as 1,10,100 or"),
            (["--strengths", "1"], "--strengths 1: expected METHOD=1, as strengths are given"),
            (["--strengths", "si=1"], "unknown method in strengths 'si'"),
            (["--seeds", "0..3"], "--seeds 0..3: expected seeds such as 0-4 or 0,1,7"),
            (["--seeds", "3-1"], "expected seeds such as 0-4 or 0,1,7, got none"),
            (["--option", "ewc.gama=1"], "'gama'; did you mean 'gamma'"),
            (["--seeds", f"0-{10**30}"], "sweep: expected at most 10,000 seeds, got more"),
            (["--seed", "1"], "No such option"),
            (["--epochs", "0"], "epochs must be an integer >= 1"),
        ],
    )
    def test_bad_input_is_exit_code_2(self, arguments, message):
        outcome = run(*self.PLAN, *ONE_TASK, *arguments)
        assert outcome.exit_code == 2
        assert message in outcome.stderr


def test_info_shows_versions_build_data_and_methods():
    outcome = run("info")
    assert outcome.exit_code == 0, outcome.output
    for expected in (clext.__version__, "cpu_path", "fashion_mnist", "scikit-learn", "rwalk"):
        assert expected in outcome.stdout


@pytest.mark.parametrize("kind", clext.METHODS.values(), ids=clext.METHODS)
def test_the_values_of_options_in_words_are_listed_the_default_first(kind):
    method = kind(torch.nn.Linear(2, 2))
    values = option_values(kind)
    worded = {name for name in values if isinstance(getattr(method, name), str)}
    assert worded - {"slices"} == set(kind.choices)  # slices: a number or "exact"
    for name, choices in kind.choices.items():
        assert values[name] == "|".join(choices)
        assert getattr(method, name) == choices[0]


def test_info_on_a_method_is_its_docstring_its_options_and_what_it_keeps():
    said = run("info", "--method", "ewc+replay").stdout
    for kind in (clext.EWC, clext.Replay):
        assert inspect.getdoc(kind) in said
        assert all(f"  {n}={v}\n" in said for n, v in option_values(kind).items())
    kept = dict(re.findall(r"^  (\w+) +([\d.]+ \w+)$", said, re.MULTILINE))
    assert {kept["anchor"], kept["importance"]} == {"5.6 MiB"}  # 1,462,538 floats
    assert "  8 bytes for each float32 parameter, 4 with state_dtype=bfloat16\n" in said
    assert kept["memory"] == "3.0 MiB"  # 1,000 images of 784 floats


@pytest.mark.parametrize(
    "command", [(), ("train",), ("compare",), ("sweep",), ("report",), ("info",)]
)
def test_help_shows_examples_and_every_choice(command):
    outcome = run(*command, "--help")
    assert outcome.exit_code == 0
    if command in {("train",), ("compare",), ("sweep",)}:
        for expected in (f"clext {command[0]} --method", "fashion_mnist", "permuted", "rwalk"):
            assert expected in outcome.stdout


def test_python_m_clext_is_the_same_command():
    command = [sys.executable, "-m", "clext", "--version"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == f"clext, version {clext.__version__}\n"
