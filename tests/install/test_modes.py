"""Real builds and installs: each takes minutes, so they run only on request (`pytest -m install`).

All compile the C++ sources only (CLEXT_CUDA=0), against the torch of the environment that runs the
tests; that CUDA sources compile and link is seen by the ordinary installation before the tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.install

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(sys.executable)
SOURCES = ["clext", "csrc", "scripts"]
SOURCE_FILES = ["LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"]
BUILT = shutil.ignore_patterns("*.so", "_build.py", "__pycache__")

# One op end to end: compiled, registered, and right. The model is small but has several tensors.
USE = """
import json, torch, clext
params = [torch.randn(n) for n in (3, 1000, 70_000)]
anchors = [torch.zeros_like(p) for p in params]
importances = [torch.ones_like(p) for p in params]
value = clext.ops.quadratic_penalty(params, anchors, importances)
torch.testing.assert_close(value, sum((p * p).sum() for p in params))
print(json.dumps({"file": clext.__file__, **clext.build_info()}))
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the sources in which nothing was built yet."""
    for name in SOURCES:
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=BUILT)
    for name in SOURCE_FILES:
        shutil.copy(ROOT / name, tmp_path / "source")
    return tmp_path / "source"


def run(command: list[str | Path], folder: Path, **variables: str) -> str:
    environ = {**os.environ, "CLEXT_CUDA": "0", **variables}
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def pip(folder: Path, *arguments: str | Path, python: Path = PYTHON, **variables: str) -> str:
    return run([python, "-m", "pip", "-v", *arguments], folder, **variables)


def make_wheel(folder: Path, source: Path, *options: str, **variables: str) -> str:
    """Builds folder/wheels/*.whl; returns what pip printed."""
    return pip(folder, "wheel", "--no-deps", "-w", "wheels", *options, source, **variables)


def unpack(wheels: Path, target: Path) -> str:
    """Unpacks the only wheel in a folder; returns its metadata."""
    (wheel,) = wheels.glob("clext-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return next(target.glob("*.dist-info/METADATA")).read_text()


def use(folder: Path, python: Path = PYTHON, **variables: str) -> dict[str, object]:
    output = run([python, "-c", USE], folder, **variables)
    return json.loads(output.splitlines()[-1])


def test_source_archive_builds_in_isolation_against_the_installed_torch(
    source: Path, tmp_path: Path
):
    (source / "clext" / "_build.py").write_text("STALE = True\n")
    make = "import build_backend; print(build_backend.build_sdist('dist'))"
    run([PYTHON, "-c", make], source, PYTHONPATH="scripts")
    (archive,) = (source / "dist").glob("clext-*.tar.gz")
    with tarfile.open(archive) as sources:
        names = {name.partition("/")[2] for name in sources.getnames()}
    shipped = {p.relative_to(source).as_posix() for p in source.glob("csrc/**/*") if p.is_file()}
    assert shipped <= names
    assert "clext/_build.py" not in names

    log = make_wheel(tmp_path, archive)
    assert "compiling against the torch that is installed in" in log
    metadata = unpack(tmp_path / "wheels", tmp_path / "site")
    major, minor = str(torch.__version__).split(".")[:2]
    assert f"Requires-Dist: torch=={major}.{minor}.*" in metadata
    info = use(tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert info["file"] == str(tmp_path / "site" / "clext" / "__init__.py")
    assert info["torch_built"] == torch.__version__
    assert info["cuda"] is None


@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang is not installed")
def test_clang_without_openmp(source: Path, tmp_path: Path):
    """The compiler of macOS, which has no OpenMP of its own."""
    compiler = {"CC": "clang", "CXX": "clang++", "CLEXT_OPENMP": "0"}
    make_wheel(tmp_path, source, "--no-build-isolation", **compiler)
    unpack(tmp_path / "wheels", tmp_path / "site")
    info = use(tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert info["openmp"] is False
    assert str(info["compiler"]).startswith("clang")


def test_editable_installation_serves_the_sources(source: Path, tmp_path: Path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    packages = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    # Lends the packages of this environment, torch first of all, to the new one.
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("clext", "__editable__", "pip", "setuptools")):
            with contextlib.suppress(FileExistsError):
                (packages / entry.name).symlink_to(entry)
    pip(tmp_path, "install", "--upgrade", "setuptools", python=python)
    options = ["--no-deps", "--no-build-isolation", "-e"]
    pip(tmp_path, "install", *options, source, python=python)
    assert (source / "clext" / "_build.py").is_file()
    info = use(tmp_path, python)
    assert info["file"] == str(source / "clext" / "__init__.py")


def test_without_torch_a_build_fails_with_one_sentence(source: Path, tmp_path: Path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip(tmp_path, "install", "--upgrade", "setuptools", python=python)
    command = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "torch is not installed for this Python" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA here")
def test_cuda_demanded_of_a_torch_without_it_fails_with_one_sentence(source: Path):
    command = [PYTHON, "setup.py", "build_ext", "--inplace"]
    environ = {**os.environ, "CLEXT_CUDA": "1"}
    done = subprocess.run(
        command, cwd=source, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("clext: CLEXT_CUDA=1 cannot be met")
