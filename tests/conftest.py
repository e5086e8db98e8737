"""What every test shares: which clext is tested, on which devices, and what a skip means."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REQUIRE_CUDA = os.environ.get("CLEXT_REQUIRE_CUDA") == "1"

os.environ.setdefault("MPLBACKEND", "Agg")


def _has_built_module(folder: Path) -> bool:
    return any(folder.glob("clext/_C.*")) and (folder / "clext" / "_build.py").is_file()


# `python -m pytest` puts the checkout on sys.path, where clext/ has no compiled module unless it
# was built in place; the installed package is meant then, as it is with plain `pytest`.
if not _has_built_module(ROOT):
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # the same for Python processes that tests start
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


def pytest_configure(config: pytest.Config) -> None:
    try:
        import clext

        clext.build_info()  # which loads the compiled module
    except ModuleNotFoundError as error:
        if error.name != "clext":
            raise
        raise pytest.UsageError('clext is not installed: run `pip install ".[test]"`') from None
    except ImportError as error:
        raise pytest.UsageError(str(error)) from None
    if REQUIRE_CUDA and (problem := cuda_problem()):
        raise pytest.UsageError(f"CLEXT_REQUIRE_CUDA=1 cannot be met: {problem}")
    if REQUIRE_CUDA:
        config.pluginmanager.register(FailuresAtOnce(config))
    del clext


class FailuresAtOnce:
    """Writes each failure when it happens: a run whose time is over does not get to its report."""

    def __init__(self, config: pytest.Config) -> None:
        self._plugins = config.pluginmanager

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        reporter = self._plugins.get_plugin("terminalreporter")  # xdist's workers have none
        if report.failed and reporter is not None:
            reporter.write_line(f"\n{report.longreprtext}")


def pytest_report_header() -> list[str]:
    import clext

    facts = ", ".join(f"{key} {value}" for key, value in clext.build_info().items())
    problem = cuda_problem()
    devices = f"cpu alone, because {problem}" if problem else "cpu, cuda"
    return [f"clext: {Path(clext.__file__).parent}", f"build: {facts}", f"devices: {devices}"]


def cuda_problem() -> str | None:
    """Why kernels cannot run on CUDA here, or None if they can."""
    import torch

    from clext import build_info

    if build_info()["cuda"] is None:
        return "clext was built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    return None


def has_cuda() -> bool:
    try:
        return cuda_problem() is None
    except ImportError:  # pytest_configure says what is wrong
        return False


@pytest.fixture(params=["cpu", "cuda"] if REQUIRE_CUDA or has_cuda() else ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Runs the test on each device that has kernels and is here.

    A test of CUDA alone says so: `@pytest.mark.parametrize("device", ["cuda"], indirect=True)`.
    """
    if request.param == "cuda" and (problem := cuda_problem()):
        pytest.skip(problem)
    return request.param


@pytest.fixture(params=["compiled", "plain torch"])
def plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test with compiled plans, and with the ones for devices without kernels."""
    if request.param == "plain torch":
        monkeypatch.setattr("clext.ops.plan.has_kernels", lambda _device: False)
    return request.param


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    import torch

    torch.manual_seed(0)


# With CLEXT_REQUIRE_CUDA=1 the run is evidence that everything works on CUDA: what did not run
# there cannot count as passed, unless for want of a library.
@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if REQUIRE_CUDA and report.skipped and not hasattr(report, "wasxfail") and _is_on_cuda(item):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        if "could not import" not in str(reason):
            report.outcome = "failed"
            report.longrepr = f"CLEXT_REQUIRE_CUDA=1 allows no skip on CUDA, but: {reason}"
    return report


def _is_on_cuda(item: pytest.Item) -> bool:
    call = getattr(item, "callspec", None)  # of parameters
    return call is not None and call.params.get("device") == "cuda"
