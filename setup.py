"""Builds clext._C from csrc/. Everything that does not depend on the machine is in pyproject.toml.

Switches (environment): CLEXT_CUDA, CLEXT_OPENMP = 0 | 1 | auto; CLEXT_WERROR = 1 makes warnings
errors; CLEXT_SANITIZE = address,undefined | thread builds with sanitizers; CUDA_HOME,
TORCH_CUDA_ARCH_LIST, CXX, CC and MAX_JOBS mean what they mean to torch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "scripts"))

import toolchain  # noqa: E402

if TYPE_CHECKING:
    import types

OLDEST_TORCH = "2.11"
RUNTIME_REQUIREMENTS = [
    "click",
    "jinja2",
    "joblib>=1.4",
    "matplotlib",
    "numpy",
    "pyyaml",
    "safetensors",
    "scikit-learn",
    "scipy",
    "tqdm",
]

# Fused multiply-adds would make results depend on the instruction set that a machine has.
# A root that could set errno is a call, and a loop with a call is not vectorised.
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-fopenmp-simd",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
]
# Members left out of an initializer are zero by the rules of C++; clang remarks on each `omp simd`
# loop that it keeps scalar, which is slower but right.
CXX_WARNINGS = ["-Wall", "-Wextra", "-Wno-missing-field-initializers", "-Wno-pass-failed"]
# --fmad=false is nvcc's -ffp-contract=off: elements are the CPU's to the bit, but where a function
# of the math library (expm1, for Adam) rounds differently.
# nvcc only warns when device code calls a host function (20011, 20014); the kernel is then broken.
NVCC_FLAGS = [
    "-O3",
    "-lineinfo",
    "--fmad=false",
    "--Werror=cross-execution-space-call",
    "--diag-error=20011,20014",
    "-Xcompiler=-fvisibility=hidden",
]


def import_torch() -> types.ModuleType | None:
    """Returns torch, or None where only metadata or a source archive is asked for without it."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return None
    version = torch.__version__
    if tuple(map(int, version.split(".")[:2])) < tuple(map(int, OLDEST_TORCH.split("."))):
        raise toolchain.BuildError(
            f"clext needs torch {OLDEST_TORCH} or newer, but torch {version} is installed; "
            "run `pip install --upgrade torch`."
        )
    return torch


def torch_requirement(torch: types.ModuleType | None) -> str:
    """The C++ interface of torch changes with the minor version, so a wheel is tied to one."""
    if torch is None:
        return f"torch>={OLDEST_TORCH}"
    major, minor = torch.__version__.split(".")[:2]
    return f"torch=={major}.{minor}.*"


class NoTorch(build_ext):
    """Stands in for torch's build command where torch is missing."""

    def run(self) -> None:
        raise toolchain.BuildError(
            "torch is not installed for this Python, so the extension cannot be compiled; run "
            "`pip install torch` first, or `pip install .` without --no-build-isolation."
        )


def sources(*patterns: str) -> list[str]:
    # setuptools wants paths relative to setup.py.
    found = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    return [path.relative_to(ROOT).as_posix() for path in found]


def build_record(record: dict[str, str | bool | None]) -> str:
    """clext/_build.py: what _C was built with, readable where _C itself cannot be loaded."""
    lines = ['"""What clext._C was built with. Written by setup.py."""', ""]
    lines += [f"{name} = {value!r}" for name, value in record.items()]
    return "\n".join(lines) + "\n"


def cuda_settings(torch: types.ModuleType) -> tuple[str | None, str]:
    """Decides about CUDA and tells torch's helpers; returns the toolkit's version and archs."""
    toolkit = toolchain.find_cuda_toolkit(os.environ)
    if toolkit:
        os.environ["CUDA_HOME"] = str(toolkit.root)  # before torch makes its own guess
    from torch.utils import cpp_extension

    toolkit = toolkit or toolchain.find_cuda_toolkit(os.environ, [cpp_extension.CUDA_HOME])
    switch = toolchain.read_switch("CLEXT_CUDA", os.environ)
    with_cuda, why = toolchain.choose_cuda(
        switch, torch.__version__, torch.version.cuda, toolkit, torch.version.hip
    )
    print(f"clext: building {'with' if with_cuda else 'without'} CUDA: {why}")
    if not with_cuda or toolkit is None:
        return None, ""
    gpus = toolchain.visible_gpus(torch.cuda)
    archs = toolchain.choose_archs(os.environ, gpus, toolkit.archs)
    os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    cpp_extension.CUDA_HOME = str(toolkit.root)
    return toolkit.version, archs


def build_options(torch: types.ModuleType) -> dict[str, Any]:
    """The extension module and the command that builds it, as arguments of `setup`."""
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    cuda, archs = cuda_settings(torch)
    from torch.utils import cpp_extension

    openmp = toolchain.openmp_flags(
        toolchain.read_switch("CLEXT_OPENMP", os.environ),
        torch.backends.openmp.is_available(),
        cpp_extension.get_cxx_compiler(),
    )
    print(f"clext: building {'with' if openmp else 'without'} OpenMP")
    sanitizers = toolchain.sanitizer_flags(os.environ)
    # Warnings are about clext: torch's headers count as system headers.
    system = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    errors = ["-Werror"] if os.environ.get("CLEXT_WERROR") == "1" else []
    extension_class = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    extension: Extension = extension_class(
        "clext._C",
        sources("csrc/torch/*.cpp", "csrc/cpu/*.cpp", *(["csrc/cuda/*.cu"] if cuda else [])),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[
            ("CLEXT_TORCH_VERSION", f'"{torch.__version__}"'),
            *([("CLEXT_WITH_CUDA", None)] if cuda else []),
        ],
        depends=sources("csrc/**/*.h", "csrc/**/*.cuh"),  # which ninja finds out by itself
        extra_compile_args={
            "cxx": [*CXX_FLAGS, *CXX_WARNINGS, *errors, *openmp, *sanitizers, *system],
            "nvcc": NVCC_FLAGS,
        },
        extra_link_args=[*openmp, *sanitizers],
    )

    class BuildExt(cpp_extension.BuildExtension):
        """torch's build command, which also leaves the record of the build beside the module."""

        def run(self) -> None:
            record = build_record(
                {
                    "TORCH_VERSION": str(torch.__version__),
                    "CUDA_VERSION": cuda,
                    "CUDA_ARCHS": archs,
                    "OPENMP": bool(openmp),
                    "SANITIZERS": os.environ.get("CLEXT_SANITIZE", ""),
                }
            )
            path = Path(self.get_ext_fullpath("clext._C")).parent / "_build.py"
            # What was built with another torch or switch is out of date, whatever the sources say.
            self.force = self.force or not path.is_file() or path.read_text() != record
            super().run()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(record)

    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExt}}


def main() -> None:
    toolchain.check_platform(sys.platform)
    torch = import_torch()
    if torch:
        options = build_options(torch)
    else:
        options = {"ext_modules": [Extension("clext._C", [])], "cmdclass": {"build_ext": NoTorch}}
    requirements = [torch_requirement(torch), *RUNTIME_REQUIREMENTS]
    setup(license="BSD-3-Clause", install_requires=requirements, **options)


try:
    main()
except toolchain.BuildError as error:
    sys.exit(f"clext: {error}")
