"""Docstrings of Python's standard library, by module: two text tasks that every machine has."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TASKS = (
    ("asyncio", "email", "http", "logging", "mailbox", "multiprocessing", "tarfile", "urllib"),
    ("_pydecimal", "encodings", "importlib", "inspect", "tkinter", "turtle", "unittest", "xml"),
)
# Of no task: on them one sees what became of the encoder itself.
OTHERS = (
    *("_pyio", "bdb", "codecs", "collections", "datetime", "doctest", "enum", "imaplib"),
    *("ipaddress", "pathlib", "pydoc", "statistics", "threading", "typing", "wsgiref", "zipfile"),
)
LEAST_WORDS = 5


class Texts(NamedTuple):
    """Texts and the places of their modules in the task."""

    texts: list[str]
    labels: list[int]


def docstrings(module: str) -> list[str]:
    """Each docstring of a module or package once, in the order of its files."""
    library = Path(sysconfig.get_path("stdlib"))
    package = library / module
    files = sorted(package.rglob("*.py")) if package.is_dir() else [library / f"{module}.py"]
    found = dict.fromkeys(
        text
        for file in files
        if not {"test", "tests"} & set(file.relative_to(library).parts)
        for text in _docstrings_in(file)
    )
    return list(found)


def _docstrings_in(file: Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, kinds):
            words = (ast.get_docstring(node) or "").split()
            if len(words) >= LEAST_WORDS:
                yield " ".join(words)


def task(number: int, seed: int, train: int, test: int) -> tuple[Texts, Texts]:
    """`train` and `test` texts of each of the eight modules, no text in both."""
    draws = random.Random(seed)
    parts = Texts([], []), Texts([], [])
    for label, module in enumerate(TASKS[number]):
        drawn = draws.sample(docstrings(module), train + test)
        for part, chosen in zip(parts, (drawn[:train], drawn[train:]), strict=True):
            part.texts.extend(chosen)
            part.labels.extend([label] * len(chosen))
    return parts


def others(each: int) -> Texts:
    """`each` texts of every module of no task."""
    draws, found = random.Random(0), Texts([], [])
    for label, module in enumerate(OTHERS):
        found.texts.extend(draws.sample(docstrings(module), each))
        found.labels.extend([label] * each)
    return found
