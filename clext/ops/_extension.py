"""Loads the compiled module `clext._C`, or says in one sentence why it cannot be loaded."""

from __future__ import annotations

import importlib
import platform
from types import ModuleType

import torch

from clext._version import __version__

__all__ = ["C", "build_info"]

_INSTALL = "run `pip install .` in clext's source folder"
_REBUILD = (
    "run `pip install --force-reinstall --no-deps .` in clext's source folder to build it again"
)


def _load_record() -> ModuleType:
    """Imports clext._build, which setup.py writes beside `_C`: it can be read without `_C`."""
    try:
        return importlib.import_module("clext._build")
    except ModuleNotFoundError:
        raise ImportError(
            f"clext in {_package_folder()} has no compiled module; {_INSTALL}, or start Python in "
            "another folder if clext is installed already."
        ) from None


def _package_folder() -> str:
    return __file__.rpartition("clext")[0] + "clext"


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _check_record(record: ModuleType) -> None:
    """Refuses a build for another torch before it is loaded: it could crash, not only fail."""
    built, imported = record.TORCH_VERSION, str(torch.__version__)
    if _minor(built) != _minor(imported):
        raise ImportError(
            f"clext was built with torch {built} but torch {imported} is imported, and their C++ "
            f"interfaces differ; {_REBUILD}, or install torch {_minor(built)}."
        )
    cuda, torch_cuda = record.CUDA_VERSION, torch.version.cuda
    if cuda is not None and (torch_cuda is None or cuda.split(".")[0] != torch_cuda.split(".")[0]):
        has = f"CUDA {torch_cuda}" if torch_cuda else "no CUDA"
        raise ImportError(
            f"clext was built with CUDA {cuda} but torch {imported} has {has}; {_REBUILD}."
        )


def _load_module() -> ModuleType:
    try:
        return importlib.import_module("clext._C")
    except ModuleNotFoundError:
        raise ImportError(
            f"clext in {_package_folder()} has no compiled module for Python "
            f"{platform.python_version()}; {_INSTALL}."
        ) from None
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ImportError(f"clext's compiled module is broken ({reason}); {_REBUILD}.") from error


_record = _load_record()
_check_record(_record)
C = _load_module()


def build_info() -> dict[str, object]:
    """Returns what clext was built with and runs with.

    Keys: "clext" (version), "python", "torch" (imported), "torch_built" (compiled against), "cuda"
    (toolkit version, None if built without), "cuda_archs" (as in TORCH_CUDA_ARCH_LIST), "openmp"
    (bool), "cpu_path" ("avx512", "avx2" or "baseline", chosen on this processor), "compiler".
    """
    compiled = C.build_info()
    return {
        "clext": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torch_built": compiled["torch"],
        "cuda": _record.CUDA_VERSION,
        "cuda_archs": _record.CUDA_ARCHS,
        "openmp": compiled["openmp"],
        "cpu_path": compiled["cpu_path"],
        "compiler": compiled["compiler"],
    }
