"""Loading clext._C: the versions fit, or one sentence says what is wrong and what to run."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import toolchain
import torch

import clext
from clext.ops import _extension


def load_anew() -> ModuleType:
    """Runs clext/_extension.py again, under another name."""
    spec = importlib.util.spec_from_file_location("_extension_under_test", _extension.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pretend(monkeypatch: pytest.MonkeyPatch, **facts: str | None) -> None:
    record = {"TORCH_VERSION": str(torch.__version__), "CUDA_VERSION": None, **facts}
    monkeypatch.setitem(sys.modules, "clext._build", SimpleNamespace(**record))


def test_built_against_the_torch_that_is_imported():
    info = clext.build_info()
    assert info["torch_built"] == torch.__version__ == info["torch"]


def test_build_info_names_what_a_bug_report_needs():
    info = clext.build_info()
    assert list(info) == [
        "clext", "python", "torch", "torch_built", "cuda", "cuda_archs", "openmp", "cpu_path",
        "compiler",
    ]  # fmt: skip
    assert info["clext"] == clext.__version__
    assert info["cpu_path"] in ("avx512", "avx2", "baseline")
    assert isinstance(info["openmp"], bool)
    assert (info["cuda"] is None) == (info["cuda_archs"] == "")


def test_cuda_was_built_if_it_could_be():
    toolkit = toolchain.find_cuda_toolkit(dict(__import__("os").environ))
    if torch.version.cuda is None or toolkit is None:
        pytest.skip("torch without CUDA, or no toolkit")
    assert clext.build_info()["cuda"] == toolkit.version


def test_every_op_has_its_kernels():
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("clext::")]
    keys = ["CPU", "CUDA"] if clext.build_info()["cuda"] else ["CPU"]
    assert len(schemas) >= 13
    # Per-sample products run by the reference on CUDA, whose products are cuBLAS's.
    on_cpu_alone = {"clext::per_sample_sum"}
    for schema in schemas:
        for key in keys[:1] if schema.name in on_cpu_alone else keys:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, key), schema.name


def test_not_built(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "clext._build", None)
    with pytest.raises(ImportError, match=r"^clext in .*clext has no compiled module; run `pip"):
        load_anew()


def test_built_for_another_python(monkeypatch: pytest.MonkeyPatch):
    pretend(monkeypatch)
    monkeypatch.setitem(sys.modules, "clext._C", None)
    with pytest.raises(ImportError, match=r"no compiled module for Python 3.*; run `pip install"):
        load_anew()


def test_built_with_another_torch_is_refused_before_loading(monkeypatch: pytest.MonkeyPatch):
    pretend(monkeypatch, TORCH_VERSION="1.13.1+cu117")
    loaded = []
    monkeypatch.setattr(importlib, "import_module", watch_imports(loaded))
    imported = re.escape(str(torch.__version__))
    with pytest.raises(
        ImportError,
        match=rf"built with torch 1\.13\.1\+cu117 but torch {imported} is imported.*; run `pip "
        r"install --force-reinstall --no-deps \.`.*or install torch 1\.13\.$",
    ):
        load_anew()
    assert loaded == ["clext._build"]


def watch_imports(loaded: list[str]):
    original = importlib.import_module

    def import_module(name: str) -> ModuleType:
        loaded.append(name)
        return original(name)

    return import_module


def test_another_patch_release_of_torch_is_fine(monkeypatch: pytest.MonkeyPatch):
    major, minor = str(torch.__version__).split(".")[:2]
    pretend(monkeypatch, TORCH_VERSION=f"{major}.{minor}.99")
    assert load_anew().C is _extension.C


@pytest.mark.parametrize("torch_cuda", [None, "12.8"])
def test_built_with_cuda_for_a_torch_with_other_cuda(monkeypatch: pytest.MonkeyPatch, torch_cuda):
    pretend(monkeypatch, CUDA_VERSION="13.0")
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    has = f"CUDA {torch_cuda}" if torch_cuda else "no CUDA"
    with pytest.raises(ImportError, match=rf"built with CUDA 13\.0 but torch \S+ has {has}; run"):
        load_anew()


def test_a_module_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch):
    pretend(monkeypatch)
    original = importlib.import_module

    def import_module(name: str) -> ModuleType:
        if name == "clext._C":
            raise ImportError("_C.so: undefined symbol:\n_ZN3c10")
        return original(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(
        ImportError,
        match=r"^clext's compiled module is broken \(_C.so: undefined symbol: _ZN3c10\); run `pip",
    ):
        load_anew()
