"""scripts/gpu_check.sh on a pretended GPU: which stages there are, and what becomes of each.

`.ci/run` walks through the stages themselves, on the CPU (`--dry`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
FIRST = ["build", "small", "steps", "bench", "tests", "memcheck"]
MORE = ["build", "racecheck", "ncu", "protocol", "initcheck"]
OURS = {"PYTEST_ADDOPTS", "TORCH_CUDA_ARCH_LIST"}  # what the script sets, and CI may have set

if not SCRIPT.is_file():
    pytest.skip("scripts/gpu_check.sh is absent", allow_module_level=True)

# Stands in for Python: keeps how it was called; fails or hangs where its arguments have a word.
PYTHON = """#!{python} -S
import json, os, signal, sys, time

given = sys.argv[1:]
if given == ["-"]:
    print("python 3, torch 2, GPU architecture 9.0", "9.0", "hypothesis", sep="\\n")
    sys.exit()
with open({calls!r}, "a") as calls:
    calls.write(json.dumps([given, dict(os.environ)]) + "\\n")
print("begins", flush=True)
if {hangs!r} in given:
    if {deaf}:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
print("===== 7 passed in 0.1s =====")
sys.exit({fails!r} in given)
"""


class Outcome:
    def __init__(self, folder: Path, calls: Path, done: subprocess.CompletedProcess[str]) -> None:
        self.code, self.said = done.returncode, done.stdout + done.stderr
        self.files = sorted(path.name for path in folder.iterdir())
        self.logs = {path.stem: path.read_text() for path in folder.iterdir()}
        self.calls = [json.loads(line) for line in calls.read_text().splitlines()]

    @property
    def stages(self) -> dict[str, str]:
        """How each ended, in the order of the summary."""
        lines = [line.partition(": ") for line in self.logs["summary"].splitlines()]
        return {name: rest.partition(",")[0] for name, _, rest in lines if name in FIRST + MORE}

    def call(self, *words: str) -> tuple[list[str], dict[str, str]]:
        """The only one with these arguments."""
        (found,) = (call for call in self.calls if {*words} <= {*call[0]})
        return found


@pytest.fixture
def check(tmp_path: Path):
    """Runs the script as on a machine with a GPU."""

    def run(*arguments: str, hangs="no", fails="no", deaf=False, seconds="", path=True) -> Outcome:
        python, calls, folder = (tmp_path / name for name in ("python", "calls", "folder"))
        calls.touch()
        text = PYTHON.format(
            python=sys.executable, calls=str(calls), hangs=hangs, fails=fails, deaf=deaf
        )
        python.write_text(text)
        python.chmod(0o755)
        tools = ROOT / "tests" / "support" / "pretended_gpu"
        environ = {
            **{name: value for name, value in os.environ.items() if name not in OURS},
            "PATH": f"{tools}:{os.environ['PATH']}" if path else os.environ["PATH"],
            "PYTHON": str(python),
            "CLEXT_DATA": str(tmp_path),
            "CLEXT_GPU_CHECK_SECONDS": seconds,
        }
        done = subprocess.run(
            ["bash", SCRIPT, *arguments, folder],
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
        return Outcome(folder, calls, done)

    return run


def test_its_stages_and_their_commands(check):
    found = check()
    assert found.code == 0, found.said
    assert found.stages == dict.fromkeys(FIRST, "passed")
    assert found.files == sorted([*(f"{name}.log" for name in FIRST), "summary.txt"])
    assert "A pretended GPU" in found.said
    _, environ = found.call("build_ext")
    assert environ["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert environ["CLEXT_CUDA"] == environ["CLEXT_REQUIRE_CUDA"] == "1"
    command, _ = found.call("tests")
    assert command[command.index("-k") + 1] == "cuda"
    plain, checked = (call for call in found.calls if "sanitize" in call[0])
    assert plain[0] == checked[0]
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING" in checked[1].keys() - plain[1].keys()


def test_its_other_stages(check):
    found = check("more")
    assert found.code == 0, found.said
    assert found.stages == dict.fromkeys(MORE, "passed")
    assert len(found.files) <= 8
    cases = [call[0][-1] for call in found.calls if "bench/gpu.py" in call[0]]
    assert cases == ["adam si fp32 resnet18", "gram resnet18", "sliced resnet18"]


def test_what_is_missing_is_said_and_done_without(check):
    found = check()
    (line,) = (line for line in found.said.splitlines() if line.startswith("missing: hypothesis"))
    assert "tests/ops/test_ops.py" in line
    _, environ = found.call("tests")
    assert "--ignore=tests/ops/test_ops.py" in environ["PYTEST_ADDOPTS"]


@pytest.mark.parametrize("deaf", [False, True])
def test_a_stage_that_takes_too_long_is_ended_and_the_others_are_run(check, deaf):
    found = check(hangs="build_ext", deaf=deaf, seconds="7")
    assert found.code == 1
    assert found.stages == {**dict.fromkeys(FIRST, "passed"), "build": "OUT OF TIME"}
    assert found.logs["build"].startswith("begins")


def test_a_stage_that_fails_does_not_stop_the_others(check):
    found = check(fails="bench/gpu.py")
    assert found.code == 1
    assert found.stages == {**dict.fromkeys(FIRST, "passed"), "bench": "FAILED"}
    assert "7 passed" in found.logs["summary"]


def test_tools_that_are_not_there_are_no_failure(check):
    found = check(path=False)
    assert found.code == 0
    assert found.stages["memcheck"] == "NOT RUN"


@pytest.mark.parametrize("arguments", [(), ("tests", "bench"), ("--wet", "folder")])
def test_other_arguments_are_refused(arguments):
    done = subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: scripts/gpu_check.sh" in done.stderr
