"""The `clext` command: `clext train`, `compare`, `sweep`, `report` and `info`.

Help and wrong options do not wait for torch: it is imported where work begins.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import click

from clext._version import __version__
from clext.core.checks import as_path
from clext.core.console import say
from clext.core.names import (
    DATASETS,
    DEFAULT_METHODS,
    INCREMENTAL,
    LOGGERS,
    METHOD_OPTIONS,
    MODELS,
    OPTIMIZERS,
    PRECISIONS,
    SCENARIOS,
    SCHEDULERS,
    TRANSFORMS,
    part_names,
)
from clext.training.arguments import (
    method_labels,
    options_by_method,
    parse_options,
    parse_seeds,
    parse_strengths,
)
from clext.training.exits import FAILED, one_line_errors
from clext.training.settings import NAMES, OF_TRAIN, Settings, check_option_names
from clext.training.storage import (
    MATRIX_NAME,
    METHOD_NAME,
    MODEL_NAME,
    PICTURE_NAME,
    RESULT_NAME,
    TASKS_NAME,
    new_folder,
)
from clext.training.tables import hanging

_FILES_OF_RUN = (RESULT_NAME, PICTURE_NAME, TASKS_NAME, MATRIX_NAME, MODEL_NAME, METHOD_NAME)

Command = TypeVar("Command", bound=Callable[..., None])

_SETTINGS = {
    "dataset": " | ".join(DATASETS),
    "data_dir": "Folder with the data set's files.  [default: $CLEXT_DATA, then the cache folder]",
    "scenario": " | ".join(SCENARIOS),
    "incremental": " | ".join(INCREMENTAL),
    "tasks": "Number of tasks.",
    "epochs": "Epochs per task.",
    "iterations": "Steps per task, in place of epochs.",
    "batch_size": "Examples a step.",
    "lr": "Learning rate.",
    "optimizer": " | ".join(OPTIMIZERS),
    "momentum": "Of sgd.",
    "weight_decay": "Of the optimizer.",
    "max_grad_norm": "Scale the task's gradient to at most this norm.",
    "scheduler": f"Of the learning rate in each task: {' | '.join(SCHEDULERS)}",
    "keep_optimizer": "Go on with the optimizer of the task before.",
    "label_smoothing": "Of the cross entropy.",
    "transform": f"Random, of each example in training: {' | '.join(TRANSFORMS)}",
    "precision": " | ".join(PRECISIONS),
    "graphs": "On CUDA record a step as a CUDA graph, and replay it.",
    "evaluate_every": "Also take accuracies within tasks.",
    "seed": "Seed of everything random.",
    "device": "cpu, cuda, cuda:1, ...  [default: cuda if there is one]",
}


def _takes_settings(command: Command, *, without: str = "") -> Command:
    """Options for all settings of a run but one, with their defaults."""
    command = click.option("--progress/--quiet", default=True, help="Show progress, or do not.")(
        command
    )
    for name, text in reversed(_SETTINGS.items()):
        if name == without:
            continue
        default = getattr(Settings, name)
        command = click.option(
            f"{_option(name)}/--no-{name}" if default is True else _option(name),
            default=default,
            show_default=default is not None,
            is_flag=isinstance(default, bool),
            type={"evaluate_every": int, "iterations": int, "max_grad_norm": float}.get(name),
            metavar={"data_dir": "FOLDER", "evaluate_every": "STEPS"}.get(name),
            help=text,
        )(command)
    return command


def _check(given: dict[str, Any]) -> None:
    """ValueError for wrong settings; iterations take the place of epochs, which have a default."""
    if given["iterations"] is not None:
        del given["epochs"]
    Settings(**{name: value for name, value in given.items() if name in NAMES})


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# The \b keeps click from joining the lines of a paragraph.
_MAIN_HELP = """Continual learning: train a method on a sequence of tasks, compare several.

\b
Examples:
  clext train --method rwalk    Permuted MNIST, 5 tasks of 10 epochs
  clext compare                 six methods on it, or those of --methods, and the picture
  clext compare --seeds 0-4     the same for several seeds: mean and confidence interval
  clext sweep --strengths 1,10  for several strengths and seeds, continued when interrupted
  clext report runs             a page of all results in a folder
  clext info                    versions, build, data, methods and options
  clext info --method gem       what a method is, its options and its memory
"""

_TRAIN_HELP = """Learn a sequence of tasks with one method; print the accuracies and save them.

Two names combine a method that protects with one that rehearses: --method ewc+replay.

\b
Examples:
  clext train --method si --epochs 2
  clext train --method ewc --strength 100 --option fisher=exact --option gamma=0.9
  clext train --method ewc+replay --option budget=500 --option replay.strength=3
  clext train --method scp --dataset digits --tasks 3 --out runs/digits
  clext train --method scp --dataset digits --tasks 3 --out runs/digits --resume
  clext train --config runs/digits/result.json --seed 1
"""

_COMPARE_HELP = """Run several methods on the same tasks; print a table and draw the picture.

\b
Examples:
  clext compare
  clext compare --methods baseline,ewc,si --epochs 2 --option ewc.strength=100
  clext compare --methods ewc,ewc+replay --option ewc+replay.replay.strength=3
  clext compare --methods ewc,si --seeds 0,1,2
"""

_SWEEP_HELP = """Run methods with several strengths and seeds; print means and their spread.

Each run has a folder of its own. The same command again does what is missing there: runs that were
interrupted or have failed, and those that the command did not name before.

\b
Examples:
  clext sweep --methods ewc,si --strengths 1,10,100 --seeds 0-4 --n-jobs 4
  clext sweep --methods ewc,si --strengths ewc=10,100 --strengths si=1,5 --out runs/two
  clext sweep --methods ewc --option ewc.gamma=0.9 --table latex
"""


def _take_config(context: click.Context, _option: click.Parameter, file: str | None) -> None:
    """What is in the file is the default of the other options."""
    if file is not None:
        from clext.training.config import read_config

        with one_line_errors():
            flags = {option.opts[-1].lstrip("-"): option for option in context.command.params}
            names = {flag.replace("-", "_"): str(option.name) for flag, option in flags.items()}
            names = {**names, "options": "options"}
            del names["option"], names["config"]
            settings = read_config(file, names)
            context.default_map = {names[name]: value for name, value in settings.items()}


_OVERWRITE = click.option(
    "--overwrite", is_flag=True, help="Remove what another run has left in --out."
)
_MODEL = click.option(
    "--model", help=f"{' | '.join(MODELS)}; mlp-400-400: its widths.  [default: mlp]"
)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help=_MAIN_HELP,
)
@click.version_option(__version__, prog_name="clext")
def main() -> None:
    """The `clext` command."""


@main.command(help=_TRAIN_HELP, short_help="Learn a sequence of tasks with one method.")
@click.option(
    "--method",
    default="rwalk",
    show_default=True,
    help=f"{' | '.join(METHOD_OPTIONS)}, or two of them: A+B",
)
@click.option("--strength", type=float, help="Weight of the penalty.  [default: the method's own]")
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    help="Option of the method, see `clext info --method`; repeatable. Of a combination NAME goes "
    "to each part that has it, PART.NAME to that part alone.",
)
@_MODEL
@click.option("--out", metavar="FOLDER", help="For results.  [default: runs/METHOD, a new one]")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out.")
@_OVERWRITE
@click.option("--checkpoint-every", type=int, metavar="STEPS", help="Beside after each epoch.")
@click.option("--log", "loggers", type=click.Choice(LOGGERS), multiple=True, help="Repeatable.")
@click.option(
    "--config",
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=_take_config,
    help="YAML with these options (those of the method as `options: {...}`), or a result.json; "
    "what is given here as well counts.",
)
@_takes_settings
def train(
    method: str,
    strength: float | None,
    options: tuple[str, ...],
    model: str | None,
    out: str | None,
    loggers: tuple[str, ...],
    **settings: Any,  # noqa: ANN401
) -> None:
    """`clext train`."""
    with one_line_errors():
        given = parse_options(options)
        for name in given:
            if name in {"method", *OF_TRAIN}:
                raise ValueError(f"--option {name}: use {_option(name)} instead")
        names = part_names(method)
        of_method = [option for name in names for option in METHOD_OPTIONS[name]]
        check_option_names("+".join(names), given, of_method, of_train=())
        _check(settings)
        if settings["resume"] and out is None:
            raise ValueError("--resume: needs --out, the folder of the run to go on with")

        import clext

        folder = out or new_folder("+".join(names))
        chosen: Any = {"strength": strength, "model": model, "out": folder}
        if loggers:
            from clext.integrations.loggers import make_loggers

            chosen["callbacks"] = make_loggers(loggers)
        result = clext.train(method, **chosen, **settings, **given)
        click.echo(result)
        there = as_path(folder, "--out")
        if not (there / RESULT_NAME).is_file():
            raise OSError(f"--out: the result could not be saved in {there}; see the warning above")
        saved = [name for name in _FILES_OF_RUN if (there / name).exists()]
        click.echo("\n" + hanging(f"Saved in {folder}: ", ", ".join(saved)))


# What compare and sweep take alike.
_METHODS = click.option(
    "--methods",
    metavar="A,B,...",
    help=f"Which to run.  [default: {','.join(DEFAULT_METHODS)}]",
)
_OPTIONS = click.option(
    "--option",
    "options",
    multiple=True,
    metavar="METHOD.NAME=VALUE",
    help="Option of one method, such as ewc.gamma=0.9; repeatable. The method, as in --methods, "
    "ends at the first dot: ewc+replay.replay.strength=3.",
)
_TABLE = click.option(
    "--table",
    "form",
    type=click.Choice(["text", "markdown", "latex", "csv"]),
    default="text",
    show_default=True,
    help="How to print the table.",
)


@main.command(help=_COMPARE_HELP, short_help="Run several methods on the same tasks.")
@_METHODS
@click.option("--seeds", help="Such as 0-4 or 0,1,7, in the place of --seed.")
@_OPTIONS
@_MODEL
@click.option("--out", metavar="FOLDER", help="For results.  [default: runs/compare, a new one]")
@_OVERWRITE
@_TABLE
@_takes_settings
def compare(
    methods: str | None,
    seeds: str | None,
    options: tuple[str, ...],
    model: str | None,
    out: str | None,
    overwrite: bool,
    form: str,
    **settings: Any,  # noqa: ANN401
) -> None:
    """`clext compare`."""
    with one_line_errors():
        chosen, per_method = method_labels(methods), options_by_method(options)
        _check(settings)
        several = {} if seeds is None else {"seeds": parse_seeds(seeds)}
        if several and settings.pop("seed") != Settings.seed:
            raise ValueError("--seeds: expected no --seed beside it; leave one of them out")

        import clext

        folder = out or new_folder("compare")
        chosen_options: Any = {"options": per_method, "model": model, **several, **settings}
        done = clext.compare(chosen, out=folder, overwrite=overwrite, **chosen_options)
        click.echo(done.table(form))
        done.save(folder)  # as for train
        say(f"Saved in {folder}: {', '.join(done.files)}")
    if not done.complete:
        sys.exit(FAILED)


@main.command(help=_SWEEP_HELP, short_help="Run methods with several strengths and seeds.")
@_METHODS
@click.option(
    "--strengths",
    multiple=True,
    metavar="[METHOD=]X,Y,...",
    help="For all methods that have one, or for one of them; repeatable.  [default: each "
    "method's own]",
)
@click.option("--seeds", default="0-4", show_default=True, help="Such as 0-4 or 0,1,7.")
@_OPTIONS
@_MODEL
@click.option("--out", metavar="FOLDER", default="runs/sweep", show_default=True, help="For runs.")
@click.option("--n-jobs", type=int, help="Runs at once; -1: one on each core.  [default: 1]")
@click.option("--threads", type=int, help="Of each run.  [default: the machine's, shared out]")
@_TABLE
@partial(_takes_settings, without="seed")
def sweep(
    methods: str | None,
    strengths: tuple[str, ...],
    seeds: str,
    options: tuple[str, ...],
    form: str,
    **given: Any,  # noqa: ANN401
) -> None:
    """`clext sweep`."""
    with one_line_errors():
        chosen, per_method = method_labels(methods), options_by_method(options)
        plan: Any = {"strengths": parse_strengths(strengths), "seeds": parse_seeds(seeds)}
        _check(given)

        import clext

        done = clext.sweep(chosen, options=per_method, **plan, **given)
        click.echo(done.table(form))
        folder = done.save(given["out"])  # as for train
        say(f"Saved in {folder}: {', '.join(done.files)}, result.json in a folder for each run")
    if not done.complete:
        sys.exit(FAILED)


@main.command(short_help="Write a page of all results in a folder.")
@click.argument("folder")
@click.option("--out", metavar="FILE", help="The page.  [default: report.html in FOLDER]")
def report(folder: str, out: str | None) -> None:
    """Write one page of the sweeps, comparisons and runs in FOLDER and below: tables and pictures.

    It needs no other file and no network.
    """
    with one_line_errors():
        from clext.training.report import write_report

        click.echo(f"Written: {write_report(folder, out)}")


@main.command(short_help="Print versions, build, data, methods and options.")
@click.option("--data-dir", metavar="FOLDER", help="Where to look for data sets.")
@click.option("--method", help="Say what this method is, its options and what it keeps in memory.")
def info(data_dir: str | None, method: str | None) -> None:
    """Print versions, how clext was built, where data comes from, methods and options."""
    with one_line_errors():
        if method is not None:
            part_names(method)

        from clext.training.describe import describe_everything, describe_method

        click.echo(describe_everything(data_dir) if method is None else describe_method(method))
