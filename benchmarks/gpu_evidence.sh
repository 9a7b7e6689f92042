#!/usr/bin/env bash
# On a machine with a GPU: everything that a change of the kernels has to show. Runs the suites, the
# sanitizers and the measurements, and leaves logs and result lines in a folder; the result lines belong
# into benchmarks/results/.
#
# usage: benchmarks/gpu_evidence.sh OUTPUT_FOLDER [COMMIT]      (SYSTEM=1 by default: installs nothing)
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: gpu_evidence.sh OUTPUT_FOLDER [COMMIT]}")
commit=${2:-$(git describe --always --dirty)}
export SYSTEM=${SYSTEM-1}
python=python3
export PYTHONPATH=$PWD/build/system/stage${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"
failures=()

step() { # name, seconds, command...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  timeout "$limit" "$@" > "$out/$name.log" 2>&1
  local status=$?
  [ $status = 0 ] || failures+=("$name (exit $status)")
  printf '%-12s %4d s  %s\n' "$name" $((SECONDS - start)) "$(grep -v '^$' "$out/$name.log" | tail -1 | cut -c1-120)"
}

step build 300 make install SYSTEM="$SYSTEM"
step cpp 120 ctest --test-dir build/system --output-on-failure --no-tests=error --parallel 8
step python 300 $python -m pytest -q -m gpu tests/python
for tool in memcheck synccheck initcheck racecheck; do
  step $tool 120 compute-sanitizer --tool $tool --error-exitcode 1 build/system/tests/cpp/test_gpu
done
bench() { step "$1" 240 $python -m flashcute bench --commit "$commit" --out "$out/$1.jsonl" "${@:2}"; }
bench gpu_forward --device cuda --grid peers --head-dims 64,128 --impls flashcute,sdpa_flash,sdpa_cudnn
bench gpu_overhead --device cuda --overhead
bench gpu_first_use --device cuda --first-use

if [ ${#failures[@]} -gt 0 ]; then
  echo "FAILED: ${failures[*]}"
  exit 1
fi
echo "all passed; commit the result lines of $out with the code they belong to"
