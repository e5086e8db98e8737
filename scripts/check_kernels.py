"""Checks the compiler's report on the CUDA kernels of a built clext: all stay in registers.

    python scripts/check_kernels.py               # of the installed clext
    python scripts/check_kernels.py clext/_C.*.so # of this module, or of a cubin

A kernel that keeps values outside its registers (a spill, an array that is indexed at run time)
moves them through memory, and kernels that live on bandwidth lose by it. The exit code is 1 if any
kernel of clext does so on any architecture, but for a few bytes of a spill, or if nothing could be
checked; --optional makes the latter 0.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import toolchain

# Of stack: what fused steps with all lists lay aside where the compiler finds no place for it in
# 128 registers (10.0 and 12.0). With more of them a multiprocessor would hold half as many blocks.
MOST_SPILLED = 32


class NothingToCheck(Exception):  # noqa: N818  (a state of the machine, nobody's error)
    """There is no module, no device code in it, or no tool to look into it."""


class BrokenReport(RuntimeError):  # noqa: N818
    """A module that cuobjdump cannot read, or that lacks what it should hold."""


@dataclass(frozen=True)
class Kernel:
    """What one kernel uses on one architecture; bytes are per thread."""

    name: str
    """Mangled."""
    arch: str
    """For example "sm_90"; empty for a cubin, whose report does not say."""
    registers: int
    stack: int
    local: int

    @property
    def stays_in_registers(self) -> bool:
        """Whether it needs no memory of its own worth the name."""
        return self.stack <= MOST_SPILLED and self.local == 0


def read_report(text: str) -> list[Kernel]:
    """The kernels of clext in the text that `cuobjdump --dump-resource-usage` prints."""
    kernels = []
    arch = name = ""
    for line in text.splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):\s*$", line):
            name = match[1]
        elif name:
            usage = dict(re.findall(r"(\w+):(\d+)", line))
            # Code of libraries that were linked in is not clext's to tune.
            if _is_of_clext(name):
                kernels.append(
                    Kernel(name, arch, int(usage["REG"]), int(usage["STACK"]), int(usage["LOCAL"]))
                )
            name = ""
    return kernels


def _is_of_clext(mangled: str) -> bool:
    """Whether the function itself (not one of its arguments) is in the namespace clext."""
    return re.match(r"_ZN?K?5clext", mangled) is not None


def summary(kernels: Iterable[Kernel]) -> list[str]:
    """One line per architecture, then one per kernel that leaves the registers."""
    by_arch: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        by_arch.setdefault(kernel.arch, []).append(kernel)
    lines = []
    for arch, found in sorted(by_arch.items()):
        most = max(found, key=lambda kernel: kernel.registers)
        lines.append(
            f"{arch or 'cubin'}: {len(found)} kernels, at most {most.registers} registers "
            f"({readable(most.name)})"
        )
    lines += [
        f"{kernel.arch or 'cubin'}: {readable(kernel.name)} uses {kernel.stack} bytes of stack "
        f"and {kernel.local} bytes of local memory per thread, expected at most {MOST_SPILLED} "
        "and 0"
        for found in by_arch.values()
        for kernel in found
        if not kernel.stays_in_registers
    ]
    return lines


def readable(mangled: str) -> str:
    """The function's name and template arguments where c++filt is at hand, else as it is."""
    tool = shutil.which("c++filt")
    if tool is None:
        return mangled
    command = [tool, "--no-params", mangled]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    name = done.stdout.strip().removeprefix("void ")
    return name.replace("clext::cuda::", "").replace("clext::", "") or mangled


def find_cuobjdump() -> str:
    """The toolkit's, else the one that triton (which comes with torch) ships, else that on PATH."""
    for folder in _tool_folders():
        if os.access(folder / "cuobjdump", os.X_OK):
            return str(folder / "cuobjdump")
    found = shutil.which("cuobjdump")
    if found is None:
        raise NothingToCheck("cuobjdump was found neither in a CUDA toolkit nor with triton")
    return found


def _tool_folders() -> Iterator[Path]:
    toolkit = toolchain.find_cuda_toolkit(os.environ)
    if toolkit:
        yield toolkit.root / "bin"
    triton = importlib.util.find_spec("triton")
    for package in (triton.submodule_search_locations or ()) if triton else ():
        yield Path(package) / "backends" / "nvidia" / "bin"


def find_module() -> Path:
    """The compiled module of the clext that Python would import; the package is not imported."""
    package = importlib.util.find_spec("clext")
    for folder in (package.submodule_search_locations or ()) if package else ():
        for module in sorted(Path(folder).glob("_C.*so")):
            return module
    raise NothingToCheck("clext is not installed with a compiled module")


def report_of(module: Path) -> str:
    """What cuobjdump says of a module."""
    command = [find_cuobjdump(), "--dump-resource-usage", str(module)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if "does not contain device code" in said:
        raise NothingToCheck(f"{module} was built without CUDA")
    if done.returncode != 0:
        raise BrokenReport(f"{' '.join(command)} failed: {said.strip()}")
    return done.stdout


def check(module: Path) -> bool:
    """Prints the summary of a module; whether all its kernels stay in registers."""
    kernels = read_report(report_of(module))
    if not kernels:
        raise BrokenReport(f"{module} holds no kernel of clext, expected some")
    print("\n".join(summary(kernels)))
    return all(kernel.stays_in_registers for kernel in kernels)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", type=Path, help="by default the installed clext's")
    parser.add_argument("--optional", action="store_true", help="nothing to check is no failure")
    given = parser.parse_args()
    try:
        results = [check(module) for module in given.modules or [find_module()]]
    except NothingToCheck as reason:
        print(f"kernels NOT CHECKED: {reason}")
        return 0 if given.optional else 1
    except BrokenReport as problem:
        print(problem)
        return 1
    if not all(results):
        print("kernels must keep all they compute with in registers")
        return 1
    print(f"no kernel uses local memory, or more than {MOST_SPILLED} bytes of stack")
    return 0


if __name__ == "__main__":
    sys.exit(main())
