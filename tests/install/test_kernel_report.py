"""The compiler's report on the kernels: what scripts/check_kernels.py reads out of it."""

from __future__ import annotations

from pathlib import Path

import check_kernels
import pytest
from check_kernels import Kernel, NothingToCheck, read_report, summary

# From cuobjdump 13.1 on a library of three files, shortened: a kernel of clext for two
# architectures, PTX (which has no registers yet), code that was linked in from elsewhere, and a
# kernel that indexes an array at run time.
REPORT = """
Fatbin elf code:
================
arch = sm_80
code version = [1,8]
host = linux
compile_size = 64bit
identifier = csrc/cuda/penalty.cu

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN5clext4cuda12apply_kernelINS_16QuadraticPenaltyEfEEvNS0_11LaunchTableIXsrNT_5listsE5countEEES4_Pd:
  REG:59 STACK:0 SHARED:64 LOCAL:0 CONSTANT[0]:33120 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin ptx code:
================
arch = sm_90
code version = [9,0]
host = linux
compile_size = 64bit
compressed
identifier = csrc/cuda/penalty.cu
ptxasOptions =  --generate-line-info 

Fatbin elf code:
================
arch = sm_90
code version = [1,8]
host = linux
compile_size = 64bit
identifier = csrc/cuda/penalty.cu

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN5clext4cuda12apply_kernelINS_16QuadraticPenaltyEfEEvNS0_11LaunchTableIXsrNT_5listsE5countEEES4_Pd:
  REG:64 STACK:0 SHARED:1088 LOCAL:0 CONSTANT[0]:33120 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90
code version = [1,8]
host = linux
compile_size = 64bit
identifier = spill.cu

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN5other7foreignIN5clext16QuadraticPenaltyEEEvPf:
  REG:10 STACK:96 SHARED:0 LOCAL:0 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN5clext4cuda6stackyEPKiPfi:
  REG:32 STACK:256 SHARED:0 LOCAL:8 CONSTANT[0]:548 TEXTURE:0 SURFACE:0 SAMPLER:0
"""  # noqa: E501, W291

PENALTY = (
    "_ZN5clext4cuda12apply_kernelINS_16QuadraticPenaltyEfEEv"
    "NS0_11LaunchTableIXsrNT_5listsE5countEEES4_Pd"
)
STACKY = "_ZN5clext4cuda6stackyEPKiPfi"


def test_finds_every_kernel_of_clext_for_every_architecture():
    assert read_report(REPORT) == [
        Kernel(PENALTY, "sm_80", registers=59, stack=0, local=0),
        Kernel(PENALTY, "sm_90", registers=64, stack=0, local=0),
        Kernel(STACKY, "sm_90", registers=32, stack=256, local=8),
    ]


def test_reads_the_report_on_a_cubin_which_names_no_architecture():
    only = REPORT.split("identifier = spill.cu")[1]
    assert read_report(only) == [Kernel(STACKY, "", registers=32, stack=256, local=8)]


def test_only_registers_are_allowed():
    assert [k.stays_in_registers for k in read_report(REPORT)] == [True, True, False]
    assert not Kernel("k", "sm_90", registers=8, stack=0, local=4).stays_in_registers
    assert Kernel("k", "sm_90", registers=128, stack=32, local=0).stays_in_registers
    assert not Kernel("k", "sm_90", registers=128, stack=40, local=0).stays_in_registers


def test_the_summary_counts_per_architecture_and_names_what_leaves_the_registers(monkeypatch):
    monkeypatch.setattr(check_kernels, "readable", lambda mangled: mangled)
    assert summary(read_report(REPORT)) == [
        f"sm_80: 1 kernels, at most 59 registers ({PENALTY})",
        f"sm_90: 2 kernels, at most 64 registers ({PENALTY})",
        f"sm_90: {STACKY} uses 256 bytes of stack and 8 bytes of local memory per thread, "
        "expected at most 32 and 0",
    ]


def test_names_are_readable_where_binutils_are_installed(monkeypatch):
    if check_kernels.shutil.which("c++filt"):
        assert check_kernels.readable(PENALTY) == "apply_kernel<QuadraticPenalty, float>"
    monkeypatch.setattr(check_kernels.shutil, "which", lambda _tool: None)
    assert check_kernels.readable(PENALTY) == PENALTY


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["check_kernels.py", *arguments])
    return check_kernels.main()


@pytest.mark.parametrize(
    ("report", "code"),
    [
        (REPORT, 1),
        (REPORT.replace("STACK:256", "STACK:0"), 1),
        (REPORT.split("identifier = spill")[0], 0),
    ],
    ids=["stack and local", "local", "registers"],
)
def test_the_exit_code_tells_whether_all_is_well(monkeypatch, capsys, report: str, code: int):
    monkeypatch.setattr(check_kernels, "report_of", lambda _module: report)
    assert run_main(monkeypatch, "_C.so") == code
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        "kernels must keep all they compute with in registers" if code else
        "no kernel uses local memory, or more than 32 bytes of stack"
    )  # fmt: skip


def test_a_report_without_kernels_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(check_kernels, "report_of", lambda _module: "")
    assert run_main(monkeypatch, "_C.so") == 1
    assert "_C.so holds no kernel of clext" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "code"), [((), 1), (("--optional",), 0)])
def test_nothing_to_check_is_said_and_fails_unless_optional(monkeypatch, capsys, arguments, code):
    def missing(module: Path) -> str:
        raise NothingToCheck("cuobjdump was not found")

    monkeypatch.setattr(check_kernels, "report_of", missing)
    assert run_main(monkeypatch, "_C.so", *arguments) == code
    assert capsys.readouterr().out == "kernels NOT CHECKED: cuobjdump was not found\n"


def test_takes_the_tool_of_the_toolkit_first(monkeypatch, tmp_path: Path):
    tools = [tmp_path / name for name in ("none", "toolkit", "triton")]
    for folder in tools[1:]:
        folder.mkdir()
        (folder / "cuobjdump").touch(mode=0o755)
    monkeypatch.setattr(check_kernels, "_tool_folders", lambda: iter(tools))
    assert check_kernels.find_cuobjdump() == str(tmp_path / "toolkit" / "cuobjdump")


def test_says_that_no_tool_was_found(monkeypatch):
    monkeypatch.setattr(check_kernels, "_tool_folders", lambda: iter(()))
    monkeypatch.setattr(check_kernels.shutil, "which", lambda _tool: None)
    with pytest.raises(NothingToCheck, match="cuobjdump was found neither"):
        check_kernels.find_cuobjdump()
