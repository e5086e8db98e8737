"""What docs/training.md shows is run as it is written."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from quick_runs import QUICK

import clext
from clext.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
BLOCKS = dict(enumerate(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)))


@pytest.fixture
def train(monkeypatch, tmp_path):
    """`clext.train`, which trains for a moment only."""
    whole = clext.train

    def quickly(*given, **options):
        quick = {"epochs": 1, "progress": False}
        return whole(*given, **{**options, **quick, "data_dir": tmp_path})

    monkeypatch.setattr(clext, "train", quickly)
    monkeypatch.chdir(tmp_path)


def run(block):
    names = {"clext": clext}
    exec(compile(BLOCKS[block], f"docs/training.md, block {block}", "exec"), names)
    return names


def test_as_the_benchmarks_train(train, monkeypatch, tmp_path):
    pytest.importorskip("torchvision")
    import vision_files

    vision_files.write("cifar10", tmp_path, monkeypatch)
    result = run(0)["result"]
    assert result.complete
    assert result.config["label_smoothing"] == 0.1
    assert isinstance(result.model, torch.nn.Module)
    assert (tmp_path / "runs" / "cifar10" / "model.safetensors").exists()


def test_settings_in_a_file(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1]
    assert yaml.safe_load(text)["options"] == {"gamma": 0.9, "samples": 2000}
    Path("run.yaml").write_text(text)
    quick = ["--dataset", "digits", "--tasks", "2", "--epochs", "1", "--model", "mlp", "--quiet"]
    outcome = CliRunner().invoke(main, ["train", "--config", "run.yaml", *quick, "--lr", "0.01"])
    assert outcome.exit_code == 0, outcome.stderr
    config = clext.Result.load("runs/ewc").config
    assert (config["strength"], config["optimizer"], config["scenario"]) == (100, "sgd", "split")


def test_callbacks_and_loggers(train, monkeypatch, tmp_path):
    pytest.importorskip("tensorboard")
    quickly = clext.train
    monkeypatch.setattr(clext, "train", lambda *a, **k: quickly(*a, **{**QUICK, **k}))
    run(1)
    assert (tmp_path / "runs" / "si" / "log.csv").exists()
    assert [*(tmp_path / "runs" / "si" / "tensorboard").iterdir()]


def test_every_file_of_a_run_is_named(tmp_path):
    clext.train("si", out=tmp_path, **QUICK)
    for file in tmp_path.iterdir():
        assert (f"`{file.name}`" if file.suffix != ".png" else "`*.png`") in PAGE, file.name
