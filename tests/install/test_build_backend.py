"""Which torch a build uses: scripts/build_backend.py."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import build_backend
import pytest

SCRIPTS = Path(build_backend.__file__).parent


def packages_with_torch(folder: Path) -> Path:
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text("__version__ = '2.99.0'\n")
    return folder


def test_finds_the_first_folder_with_torch(tmp_path: Path):
    empty, first = tmp_path / "empty", packages_with_torch(tmp_path / "first")
    second = packages_with_torch(tmp_path / "second")
    (empty / "torch").mkdir(parents=True)  # left over by an uninstall: no package
    assert build_backend.find_torch([tmp_path / "missing", empty, first, second]) == first
    assert build_backend.find_torch([empty]) is None


def test_looks_in_the_environment_that_the_interpreter_belongs_to():
    assert sysconfig.get_path("purelib") in build_backend.installed_packages()


def test_an_importable_torch_needs_no_download(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build_backend.shutil, "which", lambda _: "ninja")
    path = list(sys.path)
    assert build_backend.get_requires_for_build_wheel() == []
    assert sys.path == path


def test_an_old_setuptools_is_refused_with_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build_backend.importlib.util, "find_spec", lambda _: None)
    build_backend.check_setuptools("70.1.0")
    with pytest.raises(SystemExit, match="setuptools 65.5.0 is too old .*; run `pip install --upg"):
        build_backend.check_setuptools("65.5.0")
    monkeypatch.setattr(build_backend.importlib.util, "find_spec", lambda name: name == "wheel")
    build_backend.check_setuptools("65.5.0")


def requirements_in(python: Path, code: str = "") -> tuple[list[str], str]:
    """Asks the backend as pip does: in the target's interpreter, with a sys.path of its own."""
    program = f"""
import sys, types
sys.path = [p for p in sys.path if "site-packages" not in p]
for name in ("setuptools", "setuptools.build_meta"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["setuptools"].__version__ = "80.0"
sys.modules["setuptools"].build_meta = sys.modules["setuptools.build_meta"]
sys.modules["setuptools.build_meta"].build_sdist = None
sys.path.insert(0, {str(SCRIPTS)!r})
import build_backend
print(build_backend.get_requires_for_build_editable())
{code}
"""
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    answer = next(line for line in lines if line.startswith("["))
    return [name.strip("'[], ") for name in answer.split(",")], done.stdout


@pytest.fixture
def fresh_environment(tmp_path: Path) -> tuple[Path, Path]:
    """The interpreter and the package folder of a virtual environment with nothing in it."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    packages = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    return tmp_path / "venv" / "bin" / "python", packages


def test_requires_torch_where_there_is_none(fresh_environment: tuple[Path, Path]):
    python, _ = fresh_environment
    assert "torch" in requirements_in(python)[0]


def test_uses_the_torch_that_isolation_hides(fresh_environment: tuple[Path, Path]):
    python, packages = fresh_environment
    packages_with_torch(packages)
    requirements, output = requirements_in(
        python, "import torch; print(torch.__version__); print(sys.path[-1])"
    )
    assert "torch" not in requirements
    assert f"clext: compiling against the torch that is installed in {packages}" in output
    # Last on sys.path, so that it shadows nothing of the isolated environment.
    assert output.splitlines()[-2:] == ["2.99.0", str(packages)]
