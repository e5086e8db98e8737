"""Whole programs of the documentation run as they are written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


def programs():
    for page in ("loop", "students", "extending", "methods"):
        blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
        for number, code in enumerate(blocks):
            if code.startswith("found = "):
                code = f"import clext\n\n{code}"
            if code.startswith("import "):
                yield pytest.param(code, id=f"{page}-{number}")


@pytest.mark.slow
@pytest.mark.parametrize("code", list(programs()))
def test_a_program_runs_as_it_is_written(code, tmp_path):
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip()


def test_there_are_programs():
    assert len(list(programs())) >= 7
