"""Files of results: JSON that people can read and any program can parse, written in one piece."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from clext.core.checks import as_path

FORMAT = 1

# What a run leaves in its folder, of whatever kind it is.
RESULT_NAME, COMPARISON_NAME, SWEEP_NAME = "result.json", "comparison.json", "sweep.json"
PICTURE_NAME, TASKS_NAME, MATRIX_NAME = "accuracy.png", "tasks.png", "matrix.png"
MODEL_NAME, METHOD_NAME = "model.safetensors", "method.safetensors"
CHECKPOINT_NAME, REPORT_NAME = "checkpoint.safetensors", "report.html"
LOG_NAME, EVENTS_NAME = "log.csv", "tensorboard"
_SCRATCH = ".writing-"
_NAMES = (
    *(RESULT_NAME, COMPARISON_NAME, SWEEP_NAME, PICTURE_NAME, TASKS_NAME, MATRIX_NAME),
    *(MODEL_NAME, METHOD_NAME, CHECKPOINT_NAME, REPORT_NAME, LOG_NAME),
)


def writable_folder(path: str | os.PathLike[str], argument: str) -> Path:
    """`path` as a folder, made if need be, in which a file could be written just now.

    Raises OSError in one sentence, better before hours of work than after, and ValueError if it is
    no path.
    """
    folder = as_path(path, argument)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        what = "is a file, not a folder" if folder.is_file() else (error.strerror or str(error))
        raise OSError(
            f"{argument}: cannot write in {folder} ({what}); choose another folder"
        ) from error
    return folder


def new_folder(name: str) -> Path:
    """runs/NAME, or runs/NAME-2 and so on, so that no earlier result is replaced unasked."""
    folder, number = Path("runs") / name, 2
    while folder.exists():
        folder, number = Path("runs") / f"{name}-{number}", number + 1
    return folder


@contextmanager
def claimed_folder(path: str | os.PathLike[str] | None, argument: str) -> Iterator[Path | None]:
    """As `writable_folder`; None for None. If the work inside is refused, a new one goes again."""
    if path is None:
        yield None
        return
    is_new = not as_path(path, argument).exists()
    folder = writable_folder(path, argument)
    try:
        yield folder
    except BaseException:
        if is_new:
            with suppress(OSError):
                folder.rmdir()
        raise


def check_free(folder: Path, argument: str, *, overwrite: bool, resume: bool = False) -> None:
    """FileExistsError if the folder holds results that nobody said to overwrite.

    With `resume` those of a run may be there, which are looked at later; not those of several.
    """
    names = (COMPARISON_NAME, SWEEP_NAME) if resume else _NAMES
    there = [name for name in names if (folder / name).is_file()]
    if there and not overwrite:
        raise FileExistsError(
            f"{argument}: {folder} holds {', '.join(there)} of another run; overwrite=True "
            "(--overwrite) removes these, or choose another folder"
        )


def clear(folder: Path) -> None:
    """Remove what other runs have left in the folder."""
    for name in _NAMES:
        if (folder / name).is_file():
            (folder / name).unlink()
    shutil.rmtree(folder / EVENTS_NAME, ignore_errors=True)
    tidy(folder)


def tidy(folder: Path) -> None:
    """Remove what killed processes had only begun to write there."""
    for scratch in folder.glob(f"{_SCRATCH}*"):
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A file to write to, which takes the place of this one in whole; or goes, after an error.

    What a process leaves behind that is killed meanwhile is in a folder of its own, see `tidy`.
    """
    scratch = file.parent / f"{_SCRATCH}{os.getpid()}"
    scratch.mkdir(exist_ok=True)
    try:
        yield scratch / file.name
        # Some writers make files that nobody else may read.
        (scratch / file.name).chmod(file.parent.stat().st_mode & 0o666)
        (scratch / file.name).replace(file)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def keep(save: Callable[[], Path | None]) -> Path | None:
    """Call `save`; a full disk must not cost the hours of work that are still in memory."""
    try:
        return save()
    except OSError as error:
        warnings.warn(f"the result could not be saved ({error})", stacklevel=2)
        return None


def write_json(path: Path, kind: str, content: dict[str, Any]) -> None:
    """Write strict JSON (NaN as null) headed by format and kind; the old file stays until then."""
    document = {"format": FORMAT, "kind": kind, **content}
    text = json.dumps(_plain(document), indent=2, allow_nan=False)
    # A matrix is read row by row, so what holds only numbers or words goes on one line.
    text = re.sub(r"\[\n[^\[\]{}]*\]", _on_one_line, text)
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file of text; the old one stays until the new one is whole."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike[str], kind: str, file_name: str) -> tuple[Path, Any]:
    """The content of `path`, or of `file_name` in the folder `path`, checked for format and kind.

    Raises FileNotFoundError or ValueError in one sentence that names the file.
    """
    file = as_path(path, "load: the file")
    if file.is_dir():
        file = file / file_name
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a {kind} saved by clext")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # the latter is of what is nested too deeply
        raise ValueError(f"{file}: not a JSON file ({error}); expected a {kind}") from error
    found = content.get("kind") if isinstance(content, dict) else None
    if found != kind:
        raise ValueError(f"{file}: expected a {kind} saved by clext, found kind {found!r}")
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{file}: expected format {FORMAT}, found {content.get('format')!r}; "
            "it was saved by another version of clext"
        )
    return file, content


def as_read(content: dict[str, Any]) -> Any:  # noqa: ANN401
    """What `read_json` would give back of `content`."""
    return json.loads(json.dumps(_plain(content)))


def _on_one_line(matched: re.Match[str]) -> str:
    entries = (line.strip() for line in matched[0][1:-1].strip().splitlines())
    return f"[{' '.join(entries)}]"


def _plain(value: object) -> object:
    """The same value with what JSON has: null for NaN and infinity, strings for unknown types."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)
