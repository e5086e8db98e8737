#!/usr/bin/env bash
# Evidence from a machine with a GPU: builds in place, checks the compiler's report on the kernels,
# runs the whole test suite with skips turned into failures, small cases under compute-sanitizer, the
# benchmarks, and where MNIST is at hand the course's whole protocol and the published tables. Needs
# torch with CUDA, a CUDA toolkit, pytest, pytest-benchmark, hypothesis and expecttest;
# no network.
#
#   scripts/gpu_check.sh            everything
#   scripts/gpu_check.sh tests      only these parts: tests, sanitizer, bench, protocol, published
#
# PYTHON chooses the interpreter, CLEXT_BENCH_ARGS selects among the benchmarks (-k ...), CLEXT_DATA
# is the folder with MNIST. Summaries go to bench/results/gpu_check.txt, full logs to build/, timings
# to bench/results/*.jsonl and from there into the tables of the documents.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
parts=${*:-tests sanitizer bench protocol published}
logs=build/gpu_check
report=bench/results/gpu_check.txt
mkdir -p "$logs" bench/results

export CLEXT_CUDA=1 CLEXT_REQUIRE_CUDA=1
for data in shared/data ../shared/data; do
  if [ -z "${CLEXT_DATA:-}" ] && [ -d "$data" ]; then export CLEXT_DATA=$PWD/$data; fi
done
# The checkout is what is tested: its clext/ comes first, in child processes as well.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

status=0
lines=()
note() {
  lines+=("$1")
  echo "$1"
}

# The lines of a log that tell how it went: pytest's last, the sanitizer's, those of our scripts.
summaries='=+ .*(passed|failed|error|no tests).*=+|[0-9]+ passed.*|========= .*SUMMARY.*'
summaries+='|sm_[0-9a-z]+: .*|no kernel uses .*|kernels .*|\w+ (fp32|bf16), .* tasks of .*'
summaries+='|.* published .*: (agrees|differs) .*'

# step NAME COMMAND...: runs it, keeps its log, notes how it ended.
step() {
  local name=$1 start=$SECONDS outcome=passed
  shift
  echo "=== $name: $*"
  "$@" >"$logs/$name.log" 2>&1 || outcome=FAILED
  tail -n 15 "$logs/$name.log"
  local summary
  summary=$(grep -E "^($summaries)\$" "$logs/$name.log" | tail -n 4 | tr -d '=' | tr '\n' ';')
  note "$name: $outcome in $((SECONDS - start)) s; ${summary:-see $logs/$name.log}"
  [ "$outcome" = passed ] || status=1
}

commit() {
  git rev-parse --verify -q HEAD 2>/dev/null || { echo unknown; return; }
  git diff --quiet HEAD || echo "with local changes"
}

has_mnist() {
  "$python" -c 'import sys; from clext.data.datasets import whereabouts
sys.exit(whereabouts()["mnist"].startswith("not found"))'
}

find_sanitizer() {
  command -v compute-sanitizer && return
  local home
  home=$("$python" -c 'import os, sys; sys.path.insert(0, "scripts"); import toolchain
found = toolchain.find_cuda_toolkit(os.environ)
print(found.root if found else "")')
  [ -x "$home/bin/compute-sanitizer" ] && echo "$home/bin/compute-sanitizer"
}

step build "$python" setup.py build_ext --inplace
if [ $status -ne 0 ]; then
  grep -n -m 20 -E 'error|clext:' "$logs/build.log"
  exit 1
fi

# Older toolkits and bare machines have no cuobjdump; CI checks the kernels too.
step kernels "$python" scripts/check_kernels.py --optional clext/_C.*.so

for part in $parts; do
  case $part in
    # The adapters are Python around methods tested here, and their frameworks are no part of this.
    tests) step tests "$python" -m pytest -q -rfE --ignore=tests/integrations tests ;;
    sanitizer)
      if sanitizer=$(find_sanitizer); then
        # torch's caching allocator would hide accesses beyond a tensor in its large blocks.
        export PYTORCH_NO_CUDA_MEMORY_CACHING=1
        for tool in memcheck racecheck initcheck; do
          step "sanitizer-$tool" "$sanitizer" --tool "$tool" --error-exitcode 86 \
            "$python" -m pytest -q -m sanitize -k cuda --ignore=tests/integrations tests
        done
        unset PYTORCH_NO_CUDA_MEMORY_CACHING
      else
        note "sanitizer: NOT RUN, compute-sanitizer was not found"
      fi
      ;;
    # shellcheck disable=SC2086  (several arguments)
    bench) step bench "$python" -m pytest -q bench ${CLEXT_BENCH_ARGS:-} ;;
    protocol)
      if has_mnist; then
        # 5 tasks of 10 epochs with evaluation after each, the course's 20 minutes.
        step protocol "$python" bench/bench_protocol.py si --epochs 10 --device cuda --no-course
      else
        note "protocol: NOT RUN, MNIST was not found; set CLEXT_DATA"
      fi
      ;;
    published)
      if has_mnist; then
        for name in agem2019 vandeven2018 vandeven2018-split zenke2017; do
          step "published-$name" "$python" bench/published/reproduce.py "$name"
        done
      else
        note "published: NOT RUN, MNIST was not found; set CLEXT_DATA"
      fi
      ;;
    *)
      echo "unknown part '$part': expected tests, sanitizer, bench, protocol or published" >&2
      exit 2
      ;;
  esac
done
# A test fails while results and tables differ.
case $parts in *bench* | *protocol* | *published*) step tables "$python" bench/report/report.py ;; esac

{
  echo "commit:" $(commit)
  echo "date: $(date -u +%Y-%m-%dT%H:%MZ)"
  "$python" -c 'import torch, clext
print("gpu:", torch.cuda.get_device_name())
for key, value in clext.build_info().items(): print(f"{key}: {value}")'
  printf '%s\n' "${lines[@]}"
} >"$report"
echo "=== $report"
cat "$report"
exit $status
