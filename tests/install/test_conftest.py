"""What tests/conftest.py promises: the clext that was meant, and no skip that goes unseen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"

# Stand-ins, so that a GPU is there or not as a test needs it.
TORCH = """
class cuda:
    is_available = staticmethod(lambda: {gpu})
manual_seed = print
"""
CLEXT = "build_info = lambda: {{'cuda': {cuda!r}}}"
TESTS = """
import pytest
def test_passes(device): pass
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_passes_on_cuda(device): pass
@pytest.mark.skip(reason="not today")
def test_skips(): pass
def test_skips_on_cuda(device):
    if device == "cuda": pytest.skip("no luck")
def test_lacks_a_library(device): pytest.importorskip("no_such_module")
@pytest.mark.xfail(reason="known", strict=True)
def test_fails_as_expected(): assert False
"""


@pytest.fixture
def run_pytest(tmp_path: Path):
    """Runs pytest on a checkout with conftest.py, fake packages beside it, and a few tests."""

    def run(*, gpu: bool, cuda: str | None, require: bool, tests: str = TESTS) -> tuple[int, str]:
        packages = tmp_path / "packages"
        for name, text in {
            "torch": TORCH.format(gpu=gpu),
            "clext": CLEXT.format(cuda=cuda),
        }.items():
            (packages / name).mkdir(parents=True)
            (packages / name / "__init__.py").write_text(text)
        checkout = tmp_path / "checkout"
        (checkout / "tests").mkdir(parents=True)
        (checkout / "clext").mkdir()  # sources alone, nothing built
        (checkout / "clext" / "__init__.py").write_text("raise ImportError('the checkout')")
        (checkout / "tests" / "conftest.py").write_text(CONFTEST.read_text())
        (checkout / "tests" / "test_x.py").write_text(tests)
        environ = {
            **os.environ,
            "PYTHONPATH": str(packages),
            "CLEXT_REQUIRE_CUDA": str(int(require)),
        }
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "tests"]
        done = subprocess.run(
            command, cwd=checkout, env=environ, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    return run


def test_without_a_gpu_there_are_no_cuda_tests_and_it_is_said(run_pytest):
    code, output = run_pytest(gpu=False, cuda="13.0", require=False)
    assert code == 0, output
    assert "2 passed, 3 skipped, 1 xfailed" in output
    assert "devices: cpu alone, because no CUDA device is visible" in output
    assert "test_passes[cuda]" not in output


def test_with_a_gpu_tests_run_on_it(run_pytest):
    code, output = run_pytest(gpu=True, cuda="13.0", require=False)
    assert code == 0, output
    assert "4 passed, 4 skipped, 1 xfailed" in output
    assert "devices: cpu, cuda" in output


def test_the_installed_clext_is_tested_not_the_unbuilt_checkout(run_pytest):
    _, output = run_pytest(gpu=False, cuda=None, require=False)
    assert "clext: " in output
    assert "packages/clext" in output
    assert "clext was built without CUDA" in output


def test_required_cuda_makes_a_skip_on_it_a_failure(run_pytest):
    """Other skips, and those for want of a library, are what they are elsewhere."""
    code, output = run_pytest(gpu=True, cuda="13.0", require=True)
    assert code == 1, output
    assert "1 failed, 4 passed, 3 skipped, 1 xfailed" in output
    reason = "CLEXT_REQUIRE_CUDA=1 allows no skip on CUDA, but: Skipped: no luck"
    at_once, _, report = output.partition("= FAILURES =")
    assert reason in at_once
    assert reason in report


@pytest.mark.parametrize(
    ("gpu", "cuda", "problem"),
    [(False, "13.0", "no CUDA device is visible"), (True, None, "clext was built without CUDA")],
)
def test_required_cuda_that_is_missing_stops_the_run(run_pytest, gpu, cuda, problem):
    code, output = run_pytest(gpu=gpu, cuda=cuda, require=True)
    assert code == 4
    assert f"CLEXT_REQUIRE_CUDA=1 cannot be met: {problem}" in output
