"""What this machine can build with: a CUDA toolkit, GPU architectures, OpenMP.

Imports neither torch nor setuptools, so that setup.py can use it before either matters and tests
can use it without a build.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

# One binary for every GPU since Turing: 8.6 also serves 8.7 and 8.9, 10.0 also 10.3 and 12.0 also
# 12.1; PTX of the last one is compiled by the driver for whatever is newer. More entries only cost
# compile time.
DEFAULT_ARCHS = ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0")
# Turing; and kernels take 32 KB of parameters, which toolkits have since this version.
OLDEST_ARCH = (7, 5)
OLDEST_TOOLKIT = (12, 1)


class BuildError(RuntimeError):
    """A build setting that cannot be met; the message is one sentence for the user."""


@dataclass(frozen=True)
class CudaToolkit:
    """A directory with `bin/nvcc` and a CUDA runtime to link."""

    root: Path
    version: str
    """For example "13.0"."""
    archs: tuple[str, ...]
    """What nvcc can compile for, for example ("7.5", "8.0")."""


def read_switch(name: str, environ: Mapping[str, str]) -> str:
    """Returns "0", "1" or "auto", the value of a build switch such as CLEXT_CUDA."""
    value = environ.get(name, "").strip().lower() or "auto"
    if value not in ("0", "1", "auto"):
        raise BuildError(f"{name} must be 0, 1 or auto, but is {value!r}.")
    return value


def find_cuda_toolkit(
    environ: Mapping[str, str], more_roots: Iterable[str | os.PathLike[str] | None] = ()
) -> CudaToolkit | None:
    """Finds a CUDA toolkit that can compile and link.

    Looks at CUDA_HOME and CUDA_PATH, then at the toolkit of the nvcc on PATH, then at `more_roots`,
    and takes the first that is complete.
    """
    for root in _candidate_roots(environ, more_roots):
        nvcc = root / "bin" / "nvcc"
        if not os.access(nvcc, os.X_OK) or not _has_cuda_runtime(root):
            continue
        version = re.search(r"release (\d+\.\d+)", _output_of([str(nvcc), "--version"]))
        if version:
            return CudaToolkit(root, version[1], _supported_archs(nvcc))
    return None


def _candidate_roots(
    environ: Mapping[str, str], more_roots: Iterable[str | os.PathLike[str] | None]
) -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            yield Path(environ[variable])
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    if nvcc:
        # nvcc on PATH can be a wrapper script that lies outside the toolkit, so its own folder says
        # nothing. What it would run does: `#$ TOP=...` is the root, `#$ _HERE_=...` its bin folder.
        dryrun = _output_of([nvcc, "--dryrun", "-x", "cu", os.devnull])
        for pattern in (r"^#\$ TOP=(.+)$", r"^#\$ _HERE_=(.+)$"):
            match = re.search(pattern, dryrun, re.MULTILINE)
            if match:
                path = Path(os.path.normpath(match[1].strip()))
                yield path.parent if path.name == "bin" else path
        yield Path(os.path.realpath(nvcc)).parent.parent
        yield Path(nvcc).parent.parent
    for root in more_roots:
        if root:
            yield Path(root)


def _has_cuda_runtime(root: Path) -> bool:
    folders = ("lib64", "lib", "targets/*/lib", "lib/*-linux-gnu")
    return any(any(root.glob(f"{folder}/libcudart.so")) for folder in folders)


def _supported_archs(nvcc: Path) -> tuple[str, ...]:
    listed = _output_of([str(nvcc), "--list-gpu-arch"])
    numbers = re.findall(r"compute_(\d+)$", listed, re.MULTILINE)
    return tuple(f"{number[:-1]}.{number[-1]}" for number in numbers)


def _output_of(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def check_platform(name: str) -> None:
    """BuildError where `name`, sys.platform, is one that clext has not been made for."""
    if name == "win32":
        raise BuildError(
            "clext builds on Linux and macOS, and this is Windows; install it in WSL, the Windows "
            "Subsystem for Linux."
        )


def choose_cuda(
    switch: str,
    torch_version: str,
    torch_cuda: str | None,
    toolkit: CudaToolkit | None,
    torch_hip: str | None = None,
) -> tuple[bool, str]:
    """Decides whether the CUDA sources are compiled, and says why.

    `switch` is CLEXT_CUDA; `torch_cuda` and `torch_hip` are of torch.version. Whether a GPU is
    visible now plays no part: the machine that compiles need not be the one that computes.
    """
    if switch == "0":
        return False, "CLEXT_CUDA=0"
    if torch_hip is not None:
        problem = f"torch {torch_version} is for ROCm, for which clext has no kernels"
        remedy = "install a torch with CUDA"
    elif torch_cuda is None:
        problem = f"torch {torch_version} was built without CUDA"
        remedy = "install a torch with CUDA"
    elif toolkit is None:
        problem = f"no CUDA toolkit with nvcc and libcudart was found for torch's CUDA {torch_cuda}"
        remedy = "install one or set CUDA_HOME"
    elif toolkit.version.split(".")[0] != torch_cuda.split(".")[0]:
        problem = (
            f"the CUDA toolkit in {toolkit.root} is version {toolkit.version}, "
            f"but torch {torch_version} needs {torch_cuda.split('.')[0]}.x"
        )
        remedy = "set CUDA_HOME to a matching toolkit"
    elif _capability(toolkit.version) < OLDEST_TOOLKIT:
        oldest = ".".join(map(str, OLDEST_TOOLKIT))
        problem = (
            f"the CUDA toolkit in {toolkit.root} is version {toolkit.version}, and clext's kernels "
            f"need {oldest} or newer"
        )
        remedy = "set CUDA_HOME to a newer toolkit"
    else:
        return True, f"CUDA {toolkit.version} in {toolkit.root}, torch has CUDA {torch_cuda}"
    if switch == "1":
        raise BuildError(f"CLEXT_CUDA=1 cannot be met: {problem}; {remedy}, or set CLEXT_CUDA=0.")
    return False, f"{problem}; to change that, {remedy}"


def visible_gpus(cuda: ModuleType) -> Iterator[tuple[int, int]]:
    """Compute capabilities of the GPUs that `cuda` (torch.cuda) can use, found when asked for.

    None where the driver fails (too old, busy): what happens to be there must not stop a build.
    """
    try:
        for index in range(cuda.device_count()):
            yield cuda.get_device_capability(index)
    except RuntimeError as error:
        print(f"clext: the GPUs of this machine cannot be asked for their architecture: {error}")


def choose_archs(
    environ: Mapping[str, str],
    visible_gpus: Iterable[tuple[int, int]],
    toolkit_archs: Iterable[str],
) -> str:
    """Returns the architectures to compile for, as torch wants them in TORCH_CUDA_ARCH_LIST.

    The variable itself wins; else the visible GPUs, less those that are older than `OLDEST_ARCH`
    or than what the toolkit knows; else `DEFAULT_ARCHS`, less what the toolkit does not know. torch
    alone would fail on a machine without a GPU, where a list is needed most.
    """
    chosen = environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if chosen and chosen != "native":
        return chosen
    known = sorted({_capability(arch) for arch in toolkit_archs})
    oldest = max(OLDEST_ARCH, known[0]) if known else OLDEST_ARCH
    wanted = [min(gpu, known[-1]) if known else gpu for gpu in visible_gpus if gpu >= oldest]
    if not wanted:
        defaults = [_capability(arch) for arch in DEFAULT_ARCHS]
        wanted = [arch for arch in defaults if not known or arch in known] or known[-1:]
    names = [f"{major}.{minor}" for major, minor in sorted(set(wanted))]
    return ";".join(names) + "+PTX"


def _capability(arch: str) -> tuple[int, int]:
    major, minor = arch.split(".")
    return int(major), int(minor)


def openmp_flags(switch: str, torch_has_openmp: bool, compiler: str) -> list[str]:
    """Returns the flags that turn on OpenMP, to compile and to link; none to build one-threaded.

    `compiler` is a command such as "g++" or "ccache clang++".
    """
    if switch == "0" or (switch == "auto" and not torch_has_openmp):
        return []
    if _compiles_openmp(compiler):
        return ["-fopenmp"]
    if switch == "1":
        raise BuildError(
            f"CLEXT_OPENMP=1 cannot be met: {compiler} does not compile and link with -fopenmp; "
            "install its OpenMP runtime, choose another compiler with CXX, or set CLEXT_OPENMP=0."
        )
    return []


def sanitizer_flags(environ: Mapping[str, str]) -> list[str]:
    """Returns the flags for the sanitizers of CLEXT_SANITIZE, to compile and to link."""
    value = environ.get("CLEXT_SANITIZE", "").strip()
    if not value:
        return []
    if not set(value.split(",")) <= {"address", "undefined", "thread"}:
        raise BuildError(
            f"CLEXT_SANITIZE must be address,undefined or thread, but is {value!r}; unset it for "
            "a build without sanitizers."
        )
    return [
        f"-fsanitize={value}",
        "-fno-sanitize-recover=all",  # a finding ends the process: no test passes over it
        "-fno-sanitize=vptr",  # asks for type information that torch does not export
        "-O1",
        "-g1",  # reports name lines
        # The kernels of wider vectors are the same templates, and half of the compile time; the
        # host tests run them with sanitizers.
        "-DCLEXT_BASELINE",
    ]


def _compiles_openmp(compiler: str) -> bool:
    program = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "probe.cpp").write_text(program)
        command = [*shlex.split(compiler), "-fopenmp", "probe.cpp", "-o", "probe"]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, timeout=120, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0
