"""Loggers, each read back by its own library."""

import csv

import pytest
from quick_runs import QUICK, small

import clext
from clext.integrations import loggers


@pytest.fixture
def train(tmp_path, monkeypatch):
    """A run of two tasks with these callbacks, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*callbacks, **options):
        return clext.train("si", model=small(), callbacks=[*callbacks], **QUICK, **options)

    return run


def expected():
    """What is logged of the accuracies, in this order."""
    first = ["accuracy/average", "accuracy/task_1"]
    return [*first, *first, *first, "accuracy/task_2", *first, "accuracy/task_2"]


def test_csv(train, tmp_path):
    result = train(loggers.CSVLogger(every=5), out=tmp_path / "run")
    with (tmp_path / "run" / "log.csv").open() as file:
        rows = [*csv.DictReader(file)]
    steps_of_loss = [int(row["step"]) for row in rows if row["name"] == "loss"]
    total = steps_of_loss[-1]
    ends = [total // 4, total // 2, total * 3 // 4, total]
    assert steps_of_loss == sorted({*range(5, total + 1, 5), *ends})
    average = [float(row["value"]) for row in rows if row["name"] == "accuracy/average"]
    assert average == result.curve
    assert [row["name"] for row in rows if row["name"].startswith("accuracy")] == expected()


def test_csv_of_a_run_that_goes_on_is_that_of_one_piece(train, tmp_path):
    class Stop(clext.Callback):
        def on_step(self, training):
            if training.total_steps == 30:
                raise clext.StopTraining("enough")

    train(loggers.CSVLogger(every=1), out=tmp_path / "whole")
    train(loggers.CSVLogger(every=1), Stop(), out=tmp_path / "parts")
    stopped = (tmp_path / "parts" / "log.csv").read_text()
    train(loggers.CSVLogger(every=1), out=tmp_path / "parts", resume=True)
    whole = (tmp_path / "whole" / "log.csv").read_text()
    assert (tmp_path / "parts" / "log.csv").read_text() == whole
    assert whole.startswith(stopped)
    assert len(stopped) < len(whole)


def test_tensorboard(train, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(loggers.TensorBoardLogger(), out=tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    scalars = events.Scalars("accuracy/average")
    assert [scalar.value for scalar in scalars] == pytest.approx(result.curve)
    assert {"loss", "lr", "accuracy/task_2"} <= set(events.Tags()["scalars"])
    assert [scalar.step for scalar in scalars] == sorted(scalar.step for scalar in scalars)


def test_wandb_offline(train, tmp_path):
    pytest.importorskip("wandb")
    result = train(loggers.WandbLogger(mode="offline", project="clext"))
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    kept = file.read_bytes()  # records, the values among them as text
    assert all(repr(average).encode() in kept for average in result.curve)
    assert b"accuracy/task_2" in kept


def test_mlflow(train, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # no database for a test
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    result = train(loggers.MLflowLogger(run_name="two tasks"))
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"])
    assert run.info.status == "FINISHED"
    assert run.data.params["method"] == "si"
    history = client.get_metric_history(run.info.run_id, "accuracy/average")
    assert [metric.value for metric in history] == result.curve


def test_a_library_that_is_missing_is_named_at_once(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        loggers.WandbLogger()
