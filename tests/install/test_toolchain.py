"""Finding a CUDA toolkit, choosing architectures, trying OpenMP: scripts/toolchain.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import toolchain
from toolchain import BuildError, CudaToolkit


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def fake_toolkit(root: Path, version: str = "13.0", runtime: str = "lib64/libcudart.so") -> Path:
    """A folder that looks like a toolkit, with an nvcc that answers what the finder asks."""
    script(
        root / "bin" / "nvcc",
        f"""case "$1" in
        --dryrun) echo '#$ _HERE_={root}/bin' >&2; echo '#$ TOP={root}/bin/..' >&2 ;;
        --version) echo 'Cuda compilation tools, release {version}, V{version}.88' ;;
        --list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\ncompute_120\\n' ;;
        esac""",
    )
    if runtime:
        (root / runtime).parent.mkdir(parents=True, exist_ok=True)
        (root / runtime).touch()
    return root


def path_of(*folders: Path) -> dict[str, str]:
    return {"PATH": ":".join([*map(str, folders), "/usr/bin", "/bin"])}


def test_finds_the_toolkit_behind_a_wrapper_script(tmp_path: Path):
    root = fake_toolkit(tmp_path / "cuda-13.0")
    wrapper = script(tmp_path / "local" / "bin" / "nvcc", f'exec {root}/bin/nvcc "$@"')
    found = toolchain.find_cuda_toolkit(path_of(wrapper.parent))
    assert found == CudaToolkit(root, "13.0", ("7.5", "8.0", "9.0", "12.0"))


def test_a_wrapper_in_a_folder_with_foreign_libraries_is_no_toolkit(tmp_path: Path):
    broken = fake_toolkit(tmp_path / "cuda", runtime="")
    wrapper = script(tmp_path / "local" / "bin" / "nvcc", f'exec {broken}/bin/nvcc "$@"')
    (tmp_path / "local" / "lib").mkdir()
    assert toolchain.find_cuda_toolkit(path_of(wrapper.parent)) is None


@pytest.mark.parametrize(
    "runtime",
    ["lib64/libcudart.so", "lib/libcudart.so", "targets/sbsa-linux/lib/libcudart.so",
     "lib/x86_64-linux-gnu/libcudart.so"],
)  # fmt: skip
def test_knows_the_places_of_the_runtime_library(tmp_path: Path, runtime: str):
    root = fake_toolkit(tmp_path / "cuda", runtime=runtime)
    found = toolchain.find_cuda_toolkit(path_of(root / "bin"))
    assert found is not None
    assert found.root == root


def test_cuda_home_wins_when_it_is_valid(tmp_path: Path):
    on_path = fake_toolkit(tmp_path / "a", version="12.8")
    named = fake_toolkit(tmp_path / "b")
    found = toolchain.find_cuda_toolkit({**path_of(on_path / "bin"), "CUDA_HOME": str(named)})
    assert found is not None
    assert found.root == named


def test_an_invalid_cuda_home_does_not_hide_a_valid_toolkit(tmp_path: Path):
    root = fake_toolkit(tmp_path / "cuda")
    environ = {**path_of(root / "bin"), "CUDA_HOME": str(tmp_path / "nowhere")}
    found = toolchain.find_cuda_toolkit(environ)
    assert found is not None
    assert found.root == root


def test_torchs_own_guess_comes_last(tmp_path: Path):
    guess = fake_toolkit(tmp_path / "guess")
    environ = {"PATH": str(tmp_path)}
    assert toolchain.find_cuda_toolkit(environ) is None
    found = toolchain.find_cuda_toolkit(environ, [None, guess])
    assert found is not None
    assert found.root == guess


TOOLKIT = CudaToolkit(Path("cuda"), "13.0", ("7.5", "8.0", "8.6", "9.0"))
OLD_TOOLKIT = CudaToolkit(Path("old"), "12.0", ("7.0", "7.5", "8.0"))


def test_cuda_is_chosen_by_torch_and_toolkit_not_by_a_visible_gpu():
    assert toolchain.choose_cuda("auto", "2.15.0", "13.2", TOOLKIT)[0]
    assert not toolchain.choose_cuda("0", "2.15.0", "13.2", TOOLKIT)[0]


@pytest.mark.parametrize(
    ("torch_cuda", "toolkit", "problem"),
    [
        (None, TOOLKIT, "torch 2.15.0 was built without CUDA"),
        ("13.2", None, "no CUDA toolkit with nvcc and libcudart was found"),
        ("12.8", TOOLKIT, "is version 13.0, but torch 2.15.0 needs 12.x"),
        ("12.8", OLD_TOOLKIT, "is version 12.0, and clext's kernels need 12.1 or newer"),
    ],
)
def test_cuda_that_cannot_be_built_is_left_out_or_refused(torch_cuda, toolkit, problem):
    with_cuda, why = toolchain.choose_cuda("auto", "2.15.0", torch_cuda, toolkit)
    assert not with_cuda
    assert problem in why
    with pytest.raises(BuildError, match=r"^CLEXT_CUDA=1 cannot be met: .*; .*CLEXT_CUDA=0.$") as e:
        toolchain.choose_cuda("1", "2.15.0", torch_cuda, toolkit)
    assert problem in str(e.value)


def test_a_torch_for_rocm_is_told_from_one_without_gpus():
    with_cuda, why = toolchain.choose_cuda("auto", "2.15.0", None, None, "6.4")
    assert not with_cuda
    assert why.startswith("torch 2.15.0 is for ROCm, for which clext has no kernels; ")


def test_windows_is_refused_in_one_sentence():
    with pytest.raises(BuildError, match=r"^clext builds on Linux and macOS, .* install it in WSL"):
        toolchain.check_platform("win32")
    for name in ("linux", "darwin"):
        toolchain.check_platform(name)


def test_a_switch_has_three_values():
    assert toolchain.read_switch("CLEXT_CUDA", {}) == "auto"
    assert toolchain.read_switch("CLEXT_CUDA", {"CLEXT_CUDA": "1"}) == "1"
    with pytest.raises(BuildError, match="CLEXT_CUDA must be 0, 1 or auto, but is 'yes'"):
        toolchain.read_switch("CLEXT_CUDA", {"CLEXT_CUDA": "yes"})


@pytest.mark.parametrize(
    ("variable", "gpus", "known", "expected"),
    [
        ("", [], ("7.5", "8.0", "8.6", "9.0", "12.0"), "7.5;8.0;8.6;9.0;12.0+PTX"),
        ("", [], ("8.0", "9.0"), "8.0;9.0+PTX"),
        ("", [], ("13.0", "14.0"), "14.0+PTX"),  # a toolkit that knows none of the defaults
        ("", [(9, 0), (8, 0), (9, 0)], ("8.0", "9.0"), "8.0;9.0+PTX"),
        ("", [(12, 0)], ("8.0", "9.0"), "9.0+PTX"),  # newer than the toolkit: PTX serves it
        ("", [(7, 0), (8, 0)], ("7.0", "7.5", "8.0"), "8.0+PTX"),  # Volta has no kernels here
        ("", [(7, 5), (9, 0)], ("8.0", "9.0"), "9.0+PTX"),  # nor what the toolkit has dropped
        ("", [(6, 1)], ("7.5", "8.0"), "7.5;8.0+PTX"),
        ("8.9", [(9, 0)], ("8.0", "9.0"), "8.9"),
        ("native", [(8, 6)], ("8.0", "8.6", "9.0"), "8.6+PTX"),
    ],
)
def test_architectures(variable, gpus, known, expected):
    environ = {"TORCH_CUDA_ARCH_LIST": variable} if variable else {}
    assert toolchain.choose_archs(environ, gpus, known) == expected


class BrokenDriver:
    """As torch.cuda, where a GPU is there but its driver is too old."""

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def get_device_capability(_index: int) -> tuple[int, int]:
        raise RuntimeError("The NVIDIA driver on your system is too old")


def test_a_broken_driver_does_not_stop_a_build(capsys: pytest.CaptureFixture[str]):
    gpus = toolchain.visible_gpus(BrokenDriver)
    assert toolchain.choose_archs({"TORCH_CUDA_ARCH_LIST": "8.6"}, gpus, ("8.6",)) == "8.6"
    assert not capsys.readouterr().out  # nobody asked
    assert toolchain.choose_archs({}, gpus, ("8.0", "9.0")) == "8.0;9.0+PTX"
    assert "driver on your system is too old" in capsys.readouterr().out


def test_openmp_is_used_where_the_compiler_and_torch_have_it(tmp_path: Path):
    without = str(script(tmp_path / "c++", "exit 1"))
    assert toolchain.openmp_flags("auto", True, without) == []
    assert toolchain.openmp_flags("auto", True, str(tmp_path / "missing")) == []
    assert toolchain.openmp_flags("0", True, without) == []
    with pytest.raises(BuildError, match=r"CLEXT_OPENMP=1 cannot be met: .*c\+\+ does not compile"):
        toolchain.openmp_flags("1", True, without)
    with_openmp = str(script(tmp_path / "omp", "exit 0"))
    assert toolchain.openmp_flags("auto", True, with_openmp) == ["-fopenmp"]
    assert toolchain.openmp_flags("auto", False, with_openmp) == []
    assert toolchain.openmp_flags("1", False, with_openmp) == ["-fopenmp"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_openmp_probe_compiles_with_a_real_compiler():
    assert toolchain.openmp_flags("1", True, "g++ -O0") == ["-fopenmp"]


def test_sanitizers_are_named_or_refused():
    assert toolchain.sanitizer_flags({}) == []
    assert "-fsanitize=thread" in toolchain.sanitizer_flags({"CLEXT_SANITIZE": "thread"})
    with pytest.raises(BuildError, match=r"^CLEXT_SANITIZE must be address,undefined or thread"):
        toolchain.sanitizer_flags({"CLEXT_SANITIZE": "memory"})
