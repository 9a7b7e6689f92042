#!/usr/bin/env bash
# The package in its other forms: without a CUDA toolkit, and editable. Takes the interpreter to make
# virtual environments with.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

fail() { echo "packaging: $*" >&2; exit 1; }

# ---- (b) no CUDA toolkit: builds without images and says so, in the log and in `info` -----------------
# A wheel build in isolation, from a copy of the sources alone, with every trace of a toolkit hidden.
git ls-files -z | xargs -0 tar cf - | tar xf - -C "$(mkdir -p "$scratch/source" && echo "$scratch/source")"
mkdir "$scratch/bin"
# (The last two are how Debian's Python names its compilers, which scikit-build-core then asks for.)
for tool in sh bash cc c++ gcc g++ as ld ar ranlib nm env git uname "$(uname -m)"-linux-gnu-{gcc,g++}; do
  found=$(command -v $tool) && ln -s "$found" "$scratch/bin/$tool"
done
env -u CUDA_HOME -u CUDA_PATH PATH="$scratch/bin" FLASHCUTE_CUDA_HOME="$scratch/no-toolkit" \
  "$(realpath "$python")" -m pip wheel --verbose --no-deps --wheel-dir "$scratch/wheel" "$scratch/source" \
  > "$scratch/log" 2>&1 || { tail -40 "$scratch/log"; fail "the build without a CUDA toolkit failed"; }
grep -q "built WITHOUT kernel images" "$scratch/log" || fail "the install log does not say that there are no images"
install_command='pip install nvidia-cuda-nvrtc=='
grep -q "$install_command" "$scratch/log" || fail "the install log does not say what brings run-time compilation"

$python -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet "$scratch"/wheel/*.whl
for program in "$scratch"/venv/lib/python3*/site-packages/flashcute/flashcute_compiler; do
  [ -x "$program" ] || fail "$program, in which kernels are compiled, is not there or cannot be run"
done
(
  cd "$scratch"
  info=$(env -u CUDA_HOME PATH=/nowhere "$scratch/venv/bin/python" -m flashcute info)
  grep -q "images *none: each GPU kernel is compiled" <<< "$info" || fail "info does not say that there are no images: $info"
  grep -q "$install_command" <<< "$info" || fail "info does not say what brings run-time compilation: $info"
  "$scratch/venv/bin/python" -c '
import numpy as np, flashcute
q = np.random.default_rng(0).standard_normal((1, 5, 2, 8), dtype=np.float32)
assert np.isfinite(flashcute.flash_attention(q, q, q)).all()
'
)
echo "packaging: without a CUDA toolkit: passed"

# ---- editable: a second install compiles no image again ----------------------------------------------
build=build/make # that of the Makefile, which holds the images
install() { $python -m pip install --quiet --no-deps --no-build-isolation --config-settings=build-dir=$build "$@"; }
install -e .
images=$(echo $build/images/*.fatbin)
[ -e "${images%% *}" ] || fail "no images in $build: is there a CUDA toolkit?"
before=$(stat -c %Y $images)
touch src/plan/plan_forward.cpp
install -e .
[ "$before" = "$(stat -c %Y $images)" ] || fail "an editable install compiled unchanged images again"
install .
echo "packaging: editable: passed"
