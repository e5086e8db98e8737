"""Settings of a run in a file: YAML, or the result of an earlier run."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import clext
from clext.cli import main


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    return CliRunner().invoke(main, ["train", *map(str, arguments)])


def write(text, name="run.yaml"):
    Path(name).write_text(text)
    return name


YAML = """
method: ewc
strength: 30.0
dataset: digits
model: mlp-40
tasks: 2
epochs: 2
batch_size: 64
lr: 1e-2            # YAML 1.1 reads a text here
optimizer: sgd
momentum: 0.9
label_smoothing: 0.1
keep_optimizer: true
progress: false
out: runs/first
options: {gamma: 0.9, samples: 100}
"""


def test_a_file_is_what_its_options_are():
    outcome = run("--config", write(YAML))
    assert outcome.exit_code == 0, outcome.stderr
    result = clext.Result.load("runs/first")
    expected = {
        "method": "ewc",
        "strength": 30.0,
        "dataset": "digits",
        "model": "MLP 64-40-10",
        "tasks": 2,
        "epochs": 2,
        "batch_size": 64,
        "lr": 0.01,
        "optimizer": "sgd",
        "momentum": 0.9,
        "label_smoothing": 0.1,
        "keep_optimizer": True,
    }
    assert {name: result.config[name] for name in expected} == expected
    assert result.config["method_options"]["gamma"] == 0.9
    assert result.config["method_options"]["samples"] == 100


def test_what_is_given_beside_it_counts():
    outcome = run("--config", write(YAML), "--epochs", 1, "--method", "si", "--option", "xi=0.5")
    assert outcome.exit_code == 0, outcome.stderr
    config = clext.Result.load("runs/first").config
    assert (config["method"], config["epochs"], config["lr"]) == ("si", 1, 0.01)
    assert config["method_options"]["xi"] == 0.5


@pytest.mark.parametrize("method", ["rwalk", "ewc+replay"])
def test_a_result_is_such_a_file(method):
    options = ["--option", "budget=50"] if "replay" in method else ["--option", "alpha=0.8"]
    first = run(
        *("--method", method, "--dataset", "digits", "--tasks", 2, "--epochs", 2, "--seed", 3),
        *("--lr", 0.003, "--model", "mlp-30-20", "--quiet", "--out", "a", *options),
    )
    assert first.exit_code == 0, first.stderr
    again = run("--config", "a/result.json", "--out", "b", "--quiet")
    assert again.exit_code == 0, again.stderr
    one, two = clext.Result.load("a"), clext.Result.load("b")
    assert one.config == two.config
    assert one.curve == two.curve
    other = run("--config", "a/result.json", "--out", "c", "--quiet", "--seed", 4)
    assert other.exit_code == 0
    assert clext.Result.load("c").config["seeds"] != one.config["seeds"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- ewc\n", "expected names and values, such as 'method: ewc', got list"),
        ("method: [ewc\n", "not a YAML file"),
        ("learning-rate: 1\n", "unknown setting in run.yaml: 'learning_rate'"),
        ("epoch: 1\n", "unknown setting in run.yaml: 'epoch'; did you mean 'epochs'"),
        ("options: 3\n", "options must be names and values, got 3"),
        ("lr: [1, 2]\n", "lr must be one value, got [1, 2]"),
        ("loggers: csv\n", "unknown setting in run.yaml: 'loggers'; did you mean 'log'"),
        ("method: ewx\n", "unknown method 'ewx'"),
        ("!!python/object/apply:os.system ['touch x']\n", "not a YAML file"),
    ],
)
def test_one_sentence(text, said, tmp_path):
    outcome = run("--config", write(text))
    assert outcome.exit_code == 2
    assert said in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_file_that_is_not_there():
    outcome = run("--config", "none.yaml")
    assert outcome.exit_code == 2
    assert "none.yaml" in outcome.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "Sequential"}, "Sequential"),
        ({"loss": "own"}, "the run had a loss of its own (own), which is a function"),
        ({"scenario": "own"}, "unknown scenario 'own'"),
    ],
)
def test_a_result_of_what_the_command_line_cannot_make(change, said):
    config = {"method": "si", "method_options": {}, "dataset": "digits", **change}
    write(json.dumps({"kind": "result", "format": 1, "config": config}), "r.json")
    outcome = run("--config", "r.json")
    assert outcome.exit_code == 2
    assert said in outcome.stderr
