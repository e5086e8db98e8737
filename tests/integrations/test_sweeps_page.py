"""What docs/sweeps.md shows is run as it is written: here, on a local Ray, with Ray Tune."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from quick_runs import QUICK, small
from toy_training import make_model, make_task

import clext

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sweeps.md"


def blocks():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def run(number, **names):
    """A block of the page, among the names that it takes for granted."""
    exec(compile(blocks()[number], f"{PAGE.name}: {number}", "exec"), names)
    return names


@pytest.fixture
def page(monkeypatch, tmp_path):
    """The names of the page, with sweeps that take seconds."""
    monkeypatch.chdir(tmp_path)

    def sweep(methods, **settings):
        return clext.sweep(methods, **{**settings, **QUICK, "epochs": 1, "model": small()})

    return SimpleNamespace(sweep=sweep)


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False)
    yield ray
    ray.shutdown()


def test_here(page, tmp_path):
    sweep = run(0, clext=page)["sweep"]
    assert len(sweep.results) == 30
    assert {"sweep.pdf", "ewc.png", "runs"} <= {path.name for path in tmp_path.iterdir()}
    pytest.importorskip("pandas")
    frame = sweep.to_dataframe()
    assert list(frame[["method", "seed"]].itertuples(index=False, name=None)) == [
        (method, seed) for method, _, seed in sweep.runs
    ]
    means = frame.groupby(["method", "strength"])["accuracy"].mean()
    assert means["ewc", 1000] == pytest.approx(sweep.summary("accuracy", "ewc", 1000).mean)
    assert frame["failed"].isna().all()


def test_on_ray(page, ray, monkeypatch, tmp_path):
    monkeypatch.setattr(ray, "init", lambda: None)  # it is there
    there = run(1, clext=page)["sweep"]
    here = page.sweep("ewc, si", strengths=[1, 10, 100], threads=1, out=tmp_path / "here")
    assert there.table("csv") == here.table("csv")
    assert [r.curve for r in there.results.values()] == [r.curve for r in here.results.values()]


def test_ray_tune_prunes(ray):
    pytest.importorskip("ray.tune")

    def accuracy(model, batches):
        with torch.no_grad():
            hits = torch.cat([model(x).argmax(1) == y for x, y in batches])
        return hits.float().mean().item()

    tasks = [(make_task(k, torch.float32), make_task(k, torch.float32)) for k in range(3)]
    names = {"tasks": tasks, "make_model": lambda: make_model(torch.float32), "accuracy": accuracy}
    found = run(2, clext=clext, **names)
    whole = len(tasks) * found["epochs"]
    assert found["found"].metrics["training_iteration"] == whole
    assert 1 <= found["found"].config["strength"] <= 1e4
