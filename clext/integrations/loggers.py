"""Callbacks of `clext.train` that hand its numbers to a logger: CSV, TensorBoard, W&B, MLflow.

Each writes what it is about, by its own library. The x axis is the number of steps over all tasks;
the names are "accuracy/average", "accuracy/task_1", ..., "loss" (of the last step) and "lr" (of the
next).
"""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clext.training.callbacks import Callback
from clext.training.storage import EVENTS_NAME, LOG_NAME

if TYPE_CHECKING:
    from clext.training.loop import Training

_FOLDER = Path("runs") / "log"  # of a run that is not kept


class Logger(Callback):
    """What the loggers share: which numbers, and when.

    Args:
        every: also log loss and learning rate every so many steps.
    """

    def __init__(self, every: int | None = None) -> None:
        self.every = every

    def log(self, values: dict[str, float], step: int) -> None:
        """Write the numbers of a step."""
        raise NotImplementedError

    def on_step(self, training: Training) -> None:
        """Loss and learning rate, if it is time."""
        if self._is_due(training):
            self.log(_of_step(training), training.total_steps)

    def _is_due(self, training: Training) -> bool:
        return self.every is not None and training.total_steps % self.every == 0

    def on_epoch_end(self, training: Training) -> None:
        """The accuracies too."""
        accuracies = {f"accuracy/task_{k}": a for k, a in enumerate(training.accuracies, 1)}
        average = {"accuracy/average": training.result.curve[-1]}
        more = {} if self._is_due(training) else _of_step(training)  # or it is logged already
        self.log({**average, **accuracies, **more}, training.total_steps)


class CSVLogger(Logger):
    """`log.csv`, a row for each number (step, name, value), in the folder of the run.

    Args:
        folder: another one.
        every: see `Logger`.
    """

    def __init__(self, folder: str | Path | None = None, every: int | None = None) -> None:
        super().__init__(every)
        self.folder = folder

    def on_begin(self, training: Training) -> None:
        """Open the file; of a run that goes on, rows from after its checkpoint go."""
        file = Path(self.folder or training.folder or _FOLDER) / LOG_NAME
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [["step", "name", "value"]]
        if training.total_steps and file.exists():
            with file.open(newline="") as there:
                rows += [row for row in [*csv.reader(there)][1:] if _is_before(row, training)]
        self._file = file.open("w", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerows(rows)

    def log(self, values: dict[str, float], step: int) -> None:
        """Rows, which others can read at once."""
        self._writer.writerows([step, name, value] for name, value in values.items())
        self._file.flush()

    def on_end(self, training: Training) -> None:  # noqa: ARG002
        """Close the file."""
        self._file.close()


class TensorBoardLogger(Logger):
    """Scalars for TensorBoard, in the folder `tensorboard` of the run (`pip install tensorboard`).

    Args:
        folder: another one.
        every: see `Logger`.
    """

    def __init__(self, folder: str | Path | None = None, every: int | None = None) -> None:
        super().__init__(every)
        self._library = _library("torch.utils.tensorboard", "tensorboard")
        self.folder = folder

    def on_begin(self, training: Training) -> None:
        """Open the files; TensorBoard then hides what was written after the checkpoint."""
        folder = self.folder or (training.folder or _FOLDER) / EVENTS_NAME
        self._writer = self._library.SummaryWriter(str(folder), purge_step=training.total_steps + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        """Scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def on_end(self, training: Training) -> None:  # noqa: ARG002
        """Close the files."""
        self._writer.close()


class WandbLogger(Logger):
    """A run of Weights & Biases, with the settings of the result (`pip install wandb`).

    Args:
        every: see `Logger`.
        options: of `wandb.init`, such as `project`, `id` (to go on with a run: with
            `resume="allow"`), or `mode="offline"`.
    """

    def __init__(self, every: int | None = None, **options: Any) -> None:
        super().__init__(every)
        self._library, self.options = _library("wandb", "wandb"), options

    def on_begin(self, training: Training) -> None:
        """Begin the run."""
        self._run = self._library.init(config=training.result.config, **self.options)

    def log(self, values: dict[str, float], step: int) -> None:
        """Of this step."""
        self._run.log(values, step=step)

    def on_end(self, training: Training) -> None:
        """Close it, with the summary of the result."""
        self._run.summary.update(training.result.to_json()["summary"])
        self._run.finish()


class MLflowLogger(Logger):
    """A run of MLflow, with the settings as parameters (`pip install mlflow-skinny`, or `mlflow`).

    Args:
        every: see `Logger`.
        options: of `mlflow.start_run`, such as `run_name`, or `run_id` to go on with a run.
    """

    def __init__(self, every: int | None = None, **options: Any) -> None:
        super().__init__(every)
        self._library, self.options = _library("mlflow", "mlflow-skinny"), options

    def on_begin(self, training: Training) -> None:
        """Begin the run."""
        self._library.start_run(**self.options)
        self._library.log_params(training.result.config)

    def log(self, values: dict[str, float], step: int) -> None:
        """Of this step."""
        self._library.log_metrics(values, step=step)

    def on_end(self, training: Training) -> None:
        """Close it."""
        self._library.end_run("FINISHED" if training.result.complete else "FAILED")


_KINDS: dict[str, type[Logger]] = {
    "csv": CSVLogger,
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "mlflow": MLflowLogger,
}


def make_loggers(names: Iterable[str]) -> list[Logger]:
    """Those of `clext.core.names.LOGGERS`, as the command line takes them."""
    return [_KINDS[name]() for name in dict.fromkeys(names)]


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{package} cannot be imported ({error}); pip install {package}"
        ) from error


def _of_step(training: Training) -> dict[str, float]:
    assert training.optimizer is not None
    rate = training.optimizer.optimizer.param_groups[0]["lr"]
    return {"loss": float(training.loss), "lr": float(rate)}


def _is_before(row: list[str], training: Training) -> bool:
    return bool(row) and row[0].isdigit() and int(row[0]) <= training.total_steps
