"""What docs/sweeps.md shows is run as it is written: here, on a local Ray, with Ray Tune."""

import copy
import re
from pathlib import Path

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
def quick_sweeps(monkeypatch, tmp_path):
    """Sweeps take seconds, and write into a folder that goes again."""
    whole = clext.sweep

    def sweep(methods, **settings):
        quick = {**QUICK, "epochs": 1, "model": small(), "threads": 1}
        return whole(methods, **{**settings, **quick})

    monkeypatch.setattr(clext, "sweep", sweep)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def ray(tmp_path_factory):
    """A local Ray, whose processes import from the folder where it is started: no checkout."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.chdir(tmp_path_factory.mktemp("ray"))
        ray.init(num_cpus=2, include_dashboard=False)
    yield ray
    ray.shutdown()


def test_here(quick_sweeps, tmp_path):
    sweep = run(0)["sweep"]
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


def test_on_ray(quick_sweeps, ray, monkeypatch, tmp_path):
    monkeypatch.setattr(ray, "init", lambda: None)  # it is there
    there = run(1, clext=clext)["sweep"]
    here = clext.sweep("ewc, si", strengths=[1, 10, 100], out=tmp_path / "here")
    assert there.table("csv") == here.table("csv")
    assert [r.curve for r in there.results.values()] == [r.curve for r in here.results.values()]


def test_ray_tune_prunes(ray, tmp_path):
    pytest.importorskip("ray.tune")
    model = make_model(torch.float32)

    def accuracy(model, batches):
        with torch.no_grad():
            hits = torch.cat([model(x).argmax(1) == y for x, y in batches])
        return hits.float().mean().item()

    tasks = [(make_task(k, torch.float32), make_task(k, torch.float32)) for k in range(3)]
    names = {"tasks": tasks, "make_model": lambda: copy.deepcopy(model), "accuracy": accuracy}
    done = run(2, clext=clext, folder=str(tmp_path), **names)
    ends = [end.metrics["training_iteration"] for end in done["found"]]
    assert len(ends) == 8
    assert max(ends) == 9
    assert 4 <= min(ends) < 9  # given up, but not in the first task
    assert done["best"].metrics["accuracy"] == max(
        end.metrics["accuracy"] for end in done["found"] if end.metrics["training_iteration"] == 9
    )
