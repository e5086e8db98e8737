#!/usr/bin/env bash
# Evidence from a machine with a GPU, in two commands of at most nine minutes each on 16 cores:
#
#   scripts/gpu_check.sh FOLDER        builds in place for this GPU, with the compiler's report on
#                                      the kernels; every op once; steps and graphs; times
#                                      (bench/gpu.py); all tests on CUDA; memcheck
#   scripts/gpu_check.sh more FOLDER   builds; racecheck, Nsight Compute on three kernels, the
#                                      course's protocol, initcheck
#   scripts/gpu_check.sh --dry ...     the same on the CPU, with the clext that Python finds and a
#                                      few tests and cases a stage: whether the script works
#
# Needs torch with CUDA, a CUDA toolkit and pytest, no network; it begins by saying what else is
# missing, and does without. PYTHON chooses the interpreter, CLEXT_DATA is the folder with MNIST.
#
# FOLDER, another one for each command, gets at most eight files: the log of each stage, written as
# it runs, and summary.txt with a line for each. A stage may use the time that those before it have
# left; one that fails or takes longer does not stop the others. The exit code is 1 if one did so.
#
# Stages are called by their names:
# shellcheck disable=SC2329
set -uo pipefail

usage() {
  echo "usage: scripts/gpu_check.sh [--dry] [more] FOLDER" >&2
  exit 2
}

export device=cuda dry=
stages=first
if [ "${1:-}" = --dry ]; then device=cpu dry=1; shift; fi
if [ "${1:-}" = more ]; then stages='more'; shift; fi
if [ $# -ne 1 ] || [[ $1 == -* ]]; then usage; fi
mkdir -p "$1" || exit 2
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2

export python=${PYTHON:-python3} PYTHONUNBUFFERED=1
for data in shared/data ../shared/data; do
  if [ -z "${CLEXT_DATA:-}" ] && [ -d "$data" ]; then CLEXT_DATA=$PWD/$data; fi
done
export CLEXT_DATA=${CLEXT_DATA:-}
if [ "$dry" ]; then CLEXT_DATA=; fi # an epoch takes too long
# The checkout is what is tested: its clext/ comes first, in child processes as well.
if [ ! "$dry" ]; then
  export CLEXT_CUDA=1 CLEXT_REQUIRE_CUDA=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi

note() { echo "$*" | tee -a "$folder/summary.txt"; }

# ------------------------------------------------------------------------------- what is here

commit() {
  git rev-parse --verify -q HEAD 2>/dev/null || { echo unknown; return; }
  git diff --quiet HEAD || echo "with local changes"
}

# Facts of the machine, the capability of its GPU, and modules that are not there.
look_around() {
  "$python" - <<'PYTHON'
import importlib.util
import platform

import torch

gpu = torch.cuda.is_available()
arch = ".".join(map(str, torch.cuda.get_device_capability())) if gpu else ""
wanted = ("pytest", "xdist", "hypothesis", "expecttest", "ninja", "setuptools", "safetensors")
print(f"python {platform.python_version()}, torch {torch.__version__}, GPU architecture {arch}")
print(arch)
print(*(name for name in wanted if importlib.util.find_spec(name) is None))
PYTHON
}

# A tool of the CUDA toolkit, whose folder need not be on the PATH.
find_tool() {
  command -v "$1" && return
  local home
  home=$(PYTHONPATH=scripts "$python" -c 'import os, toolchain
found = toolchain.find_cuda_toolkit(os.environ)
print(found.root if found else "")')
  [ -x "$home/bin/$1" ] && echo "$home/bin/$1"
}

{
  read -r facts
  read -r arch
  read -r missing
} < <(look_around)
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch}
note "gpu_check $stages, $device: commit $(commit | xargs), $(date -u +%Y-%m-%dT%H:%MZ)"
note "$facts, $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>&1 | head -n 1)"


# pytest reads PYTEST_ADDOPTS. -v: the log of a stage that is ended has all that came before. The
# adapters are Python around methods that are tested here.
export PYTEST_ADDOPTS="-v -p no:cacheprovider --ignore=tests/integrations --tb=short -rfEs"
export tests=$device workers
workers="-n $(env -u OMP_NUM_THREADS nproc)" # which nproc takes for their number
for module in $missing; do
  files=$(grep -rlE "^(from|import) $module\b" tests | sort | xargs)
  note "missing: $module${files:+; left out without it: $files}"
  for file in $files; do PYTEST_ADDOPTS+=" --ignore=$file"; done
  if [ "$module" = xdist ]; then workers=; fi
done
if [ -z "$CLEXT_DATA" ]; then
  note "missing: MNIST, see CLEXT_DATA; left out without it: test_real_mnist, the protocol"
  tests+=" and not real_mnist"
fi
export sanitizer ncu
sanitizer=$(find_tool compute-sanitizer) || note "missing: compute-sanitizer"
ncu=$(find_tool ncu) || note "missing: ncu"

# ------------------------------------------------------------------------------- the stages

# Each is run by a shell of its own, where the first command that fails ends it.
run_build() {
  if [ "$dry" ]; then
    "$python" -P -c 'import clext; print(clext.build_info())' # -P: not the folder here
  else
    "$python" setup.py build_ext --inplace
    # Older toolkits have no cuobjdump; CI checks the kernels too.
    "$python" scripts/check_kernels.py --optional clext/_C.*.so
  fi
}

# Every op once; what is to run it may be given.
run_small() {
  "$@" "$python" -m pytest -m sanitize -k "$device${dry:+ and accumulate_abs_}" \
    tests/ops/test_sanitize.py
}

# Optimizers and training steps, launched and in graphs, and captures that fail.
run_steps() {
  "$python" -m pytest -k "$device${dry:+ and bf16}" tests/training/test_steps.py \
    tests/training/test_seeds.py tests/optim/test_fused_rules.py
}

run_bench() { "$python" bench/gpu.py --device "$device" --only "${dry:+si mlp fp32}"; }

# $workers is a flag and its value, or nothing. A thread for each: there are as many as cores.
run_tests() {
  export OMP_NUM_THREADS=1
  # shellcheck disable=SC2086
  "$python" -m pytest $workers -k "$tests" "tests${dry:+/ops/test_errors.py}"
}

run_memcheck() { under_sanitizer memcheck; }
run_racecheck() { under_sanitizer racecheck; }
run_initcheck() { under_sanitizer initcheck; }

under_sanitizer() {
  [ "$sanitizer" ] || not_run "compute-sanitizer was not found"
  # torch's caching allocator would hide accesses beyond a tensor in its large blocks.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  run_small "$sanitizer" --tool "$1" --error-exitcode 86
}

# A fused step, the products of gradients, and the slices.
run_ncu() {
  [ "$ncu" ] || not_run "ncu was not found"
  local kernel case model=resnet18
  if [ "$dry" ]; then model=mlp; fi
  while IFS=: read -r kernel case; do
    CLEXT_BENCH_ROUNDS=1 "$ncu" --clock-control none --set detailed \
      --kernel-name "regex:$kernel" --launch-skip 3 --launch-count 1 \
      "$python" bench/gpu.py --device "$device" --only "$case $model"
  done <<<$'apply_kernel:adam si fp32\npairs_kernel:gram\napply_kernel:sliced'
}

# Targets on an H200: a run under 4 s, those of five seeds under 8 s.
run_protocol() {
  [ "$CLEXT_DATA" ] || not_run "MNIST was not found"
  "$python" bench/bench_protocol.py si --epochs 10 --device "$device" --no-course --seeds 5
}

# ------------------------------------------------------------------------------- one by one

export not_run_status=77
not_run() { echo "$1"; exit "$not_run_status"; }
while read -r name; do export -f "${name?}"; done < <(compgen -A function)

# The lines of a log that tell how it went: pytest's last, the sanitizer's, those of our scripts;
# else the last.
summaries='=+ .*(passed|failed|error|no tests).*=+|========= .*SUMMARY.*|sm_[0-9a-z]+: .*'
summaries+='|no kernel uses .*|kernels .*|\w+ (fp32|bf16), .* tasks of .*'
summaries+='|\{"case": "copy".*|\{.*"error".*'

summary() {
  local found
  found=$(grep -E "^($summaries)\$" "$1" | tail -n 4 | tr -d '=' | paste -sd ';')
  if [ ! "$found" ] && grep -qE ' (PASSED|FAILED)' "$1"; then
    found="$(grep -c ' PASSED' "$1") passed and $(grep -c ' FAILED' "$1") failed until then"
  fi
  echo "${found:-$(grep . "$1" | tail -n 1 | cut -c 1-200)}"
}

status=0
deadline=0
grace=5 # seconds that a stage has to end when it is told to

# stage NAME SECONDS
stage() {
  local name=$1 start=$SECONDS outcome limit log=$folder/$1.log
  deadline=$((deadline + ${CLEXT_GPU_CHECK_SECONDS:-$2})) # the variable is for the script's tests
  limit=$((deadline - start - grace))
  timeout --kill-after=$grace "$limit" \
    bash -c "set -euo pipefail; run_$name" >"$log" 2>&1 </dev/null
  case $? in
    0) outcome=passed ;;
    "$not_run_status") outcome="NOT RUN" ;;
    124 | 137) outcome="OUT OF TIME" status=1 ;;
    *) outcome=FAILED status=1 ;;
  esac
  note "$name: $outcome, $((SECONDS - start)) s of at most $limit; $(summary "$log")"
}

if [ $stages = first ]; then
  stage build 150
  stage small 30
  stage steps 45
  stage bench 75
  stage tests 150
  stage memcheck 90
else
  stage build 150
  stage racecheck 120
  stage ncu 60
  stage protocol 60
  stage initcheck 150
fi
exit $status
