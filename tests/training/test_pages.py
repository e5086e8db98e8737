"""What the README and the pages of docs show is run as it is written.

Programs run whole. Commands, and lines that take names of a reader's own for granted, run with
small data and few epochs. docs/data.md, training.md, frameworks.md, sweeps.md and processes.md have
tests of their own, and scripts/notebook.py runs docs/students.md.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from quick_runs import small
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import clext
from clext.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = {page.stem: page.read_text() for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}


def blocks(page, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def programs():
    for page in ("loop", "extending"):
        for number, code in enumerate(blocks(page)):
            if code.startswith("import "):
                yield pytest.param(code, id=f"{page}-{number}")


def commands():
    """Those of all pages that are complete: no names in capitals."""
    pattern = r"^clext [a-z].*|`(clext [a-z][^`]*)`"
    for text in PAGES.values():
        for found in re.finditer(pattern, text, re.MULTILINE):
            line = found[1] or found[0]
            if not re.search(r" [A-Z]|--config|--log|report runs", line):
                yield line


@pytest.mark.slow
@pytest.mark.parametrize("code", list(programs()))
def test_a_program_runs_as_it_is_written(code, tmp_path):
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip()


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_a_command_runs(line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command, *given = shlex.split(line)[1:]
    quickly = {
        "train": [],
        "compare": ["--methods", "baseline,ewc"],
        "sweep": ["--seeds", "0", "--n-jobs", "1"],
    }
    if command in quickly and "--help" not in given:
        few_images = ["--dataset", "digits", "--tasks", "2", "--epochs", "1", "--quiet"]
        given += few_images + quickly[command]
    if "--resume" in given:
        begun = CliRunner().invoke(main, [command, *(o for o in given if o != "--resume")])
        assert begun.exit_code == 0, begun.stderr
    done = CliRunner().invoke(main, [command, *given])
    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip()


@pytest.fixture
def few(monkeypatch, tmp_path):
    """clext's runs on few images, in an empty folder."""
    pytest.importorskip("torchvision")
    import vision_files

    for name in ("cifar10", "cifar100"):
        vision_files.write(name, tmp_path, monkeypatch)
    monkeypatch.setenv("CLEXT_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("train", "compare", "sweep"):
        monkeypatch.setattr(clext, name, quick(getattr(clext, name)))


def quick(run):
    def quickly(*given, **options):
        if "scenario" not in options or isinstance(options["scenario"], str):
            options = {"dataset": "digits", "tasks": 2} | options
        if "model" in options and options["model"] == "resnet18":
            options["model"] = "cnn"
        if "seeds" in options:
            options["seeds"] = options["seeds"][:2]
        return run(*given, **options | {"epochs": 1, "progress": False})

    return quickly


def execute(page, number, names):
    code = compile(dedent(blocks(page)[number]), f"{page}: block {number}", "exec")
    exec(code, names)


@pytest.mark.slow
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("page", "number"), [("README", 0), ("start", 0), ("start", 1), ("methods", 0)]
)
def test_runs(page, number, tmp_path):
    execute(page, number, {"clext": clext})
    assert [*tmp_path.glob("*/*.json")] or [*tmp_path.glob("runs/*/*.json")]


@pytest.mark.usefixtures("few")
def test_scenarios(tmp_path):
    data = [TensorDataset(torch.rand(16, 4), torch.arange(16) % 2 + 2 * task) for task in range(2)]
    pairs = {f"{part}_{k + 1}": data[k] for k in range(2) for part in ("train", "test")}
    execute("scenarios", 0, {"clext": clext, "model": nn.Linear(4, 4), **pairs})
    assert (tmp_path / "matrix.png").exists()


def loop(optimizer_too=True):
    """The names of a loop."""
    model = small()
    data = TensorDataset(torch.rand(32, 64), torch.arange(32) % 10)
    tasks = [DataLoader(data, 8) for _ in range(2)]
    names = {"clext": clext, "torch": torch, "F": F, "model": model, "net": model, "tasks": tasks}
    if optimizer_too:
        names["reg"] = clext.SI(model)
        names["optimizer"] = torch.optim.Adam(model.parameters())
        names["loss"] = F.cross_entropy(model(data.tensors[0]), data.tensors[1])
    return names


def test_the_loop_of_the_readme():
    names = loop(optimizer_too=False)
    execute("README", 1, names)
    assert any(values.any() for values in names["reg"].importance.values())


@pytest.mark.parametrize("page", ["README", "loop"])
def test_other_optimizers(page):
    first = 2 if page == "README" else 3
    names = loop()
    execute(page, first, names)
    names["handle"].remove()
    execute(page, first + 1, names)
    assert names["reg"].steps == 1


def test_what_is_said_of_models_and_labels():
    execute("loop", 5, loop())


def test_state(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = loop()
    names["reg"] = clext.EWC(names["model"])
    names["reg"].consolidate(names["tasks"][0])
    execute("loop", 6, names)


def test_everything_is_found():
    assert len(list(programs())) == 4
    assert len(set(commands())) >= 12
    here = {"README": 4, "start": 2, "scenarios": 1, "loop": 7, "methods": 1, "extending": 1}
    elsewhere = {"data": 3, "training": 2, "frameworks": 8, "sweeps": 3, "processes": 4}
    known = here | elsewhere | {"students": 4}
    assert {page: len(blocks(page)) for page in PAGES if blocks(page)} == known
