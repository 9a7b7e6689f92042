#!/usr/bin/env bash
# What C++ projects get: the library is installed static and shared, each into a prefix of its own, and the projects of
# examples/cpp/ are built against both, by CMake and by pkg-config, before and after the prefix moves.
#
#   tests/consumers.sh [PYTHON]          needs cmake, pkg-config, a C++20 compiler and NVRTC; with nvcc, own_kernel too
#   tests/consumers.sh --gpu [PYTHON]    runs the examples on GPU 0 as well: that there is none, or no nvcc, is an error
#
# Without a network: FLASHCUTE_CUTLASS_DIR and FLASHCUTE_CCCL_DIR name the headers of CUTLASS 4.2 and CCCL 13.0 (a CUDA
# toolkit 13.0 or 13.1 has the latter), and FLASHCUTE_NVRTC a libnvrtc.so where no toolkit has one.
set -euo pipefail
cd "$(dirname "$0")/.."
gpu=
fail() { echo "consumers: $*" >&2; exit 1; }
if [ "${1-}" = --gpu ]; then gpu=gpu; shift; fi
python=$(command -v "${1-python3}") || fail "there is no ${1-python3}"
export PATH="$(cd "$(dirname "$python")" && pwd):$PATH" # an environment's cmake is beside its interpreter
python=$(command -v "$(basename "$python")")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
jobs=$(nproc)

quietly() { "$@" > "$scratch/log" 2>&1 || { tail -40 "$scratch/log" >&2; fail "failed: $*"; }; }

for program in cmake pkg-config c++ nm readelf; do
  command -v $program > /dev/null || fail "$program is not installed"
done
have_nvcc=$(command -v nvcc || true)
[ -z "$gpu" ] || [ -n "$have_nvcc" ] || fail "there is no nvcc, which own_kernel needs"
nvrtc_of_python() {
  "$python" -c 'import nvidia; print(*(f"{p}/cu13/lib/libnvrtc.so.13" for p in nvidia.__path__))' 2> /dev/null || true
}
nvrtc=$(nvrtc_of_python)
if [ -z "${FLASHCUTE_NVRTC-}" ] && [ -f "$nvrtc" ]; then export FLASHCUTE_NVRTC=$nvrtc; fi
export FLASHCUTE_CACHE_DIR="$scratch/cache"

# ---- two prefixes from one build folder, without ahead-of-time images ---------------------------------
# What `make` has fetched is taken from there.
cutlass=${FLASHCUTE_CUTLASS_DIR-$(sed -n 's/^flashcute_cutlass_found:INTERNAL=//p' build/make/CMakeCache.txt 2> /dev/null || true)}
unset FLASHCUTE_CUTLASS_DIR
install_library() { # static|shared
  quietly cmake -S . -B "$scratch/build" -DFLASHCUTE_IMAGES=OFF -DFLASHCUTE_BUILD_TESTS=OFF \
    -DPython_EXECUTABLE="$python" -DFLASHCUTE_CUTLASS_DIR="$cutlass" -DFLASHCUTE_CCCL_DIR="${FLASHCUTE_CCCL_DIR-}" \
    -DBUILD_SHARED_LIBS="$([ "$1" = shared ] && echo ON || echo OFF)"
  quietly cmake --build "$scratch/build" --parallel "$jobs"
  quietly cmake --install "$scratch/build" --prefix "$scratch/$1"
}
install_library static
install_library shared
[ -n "$cutlass" ] || cutlass=$(sed -n 's/^flashcute_cutlass_found:INTERNAL=//p' "$scratch/build/CMakeCache.txt")
if grep -rl "$scratch" "$scratch"/{static,shared}/lib/{cmake,pkgconfig}; then fail "these name the place of the prefix"; fi
echo "consumers: installed in $SECONDS s"

# ---- what the shared library exports, and needs -------------------------------------------------------
library=$scratch/shared/lib/libflashcute.so
readelf -d "$library" | grep -q 'SONAME.*\[libflashcute\.so\.0\.1\]' || fail "libflashcute.so has another soname than 0.1"
exported=$(nm -DC --defined-only "$library" | cut -d' ' -f3-)
names=$(grep -oP '^((vtable|typeinfo|typeinfo name) for )?flashcute::\K\w+' <<< "$exported" | sort -u)
inside() { grep -ohP "$1" include/flashcute/api.hpp include/flashcute/error.hpp | sort -u; }
compiled=$(inside '^(?!inline)\w[\w:<>, ]* \K\w+(?=\()|^class \K\w+') # functions, and classes with functions
missing=$(comm -23 <(echo "$compiled") <(echo "$names"))
[ -z "$missing" ] || fail "the shared library does not export" $missing
others=$(comm -13 <( (echo "$compiled"; inside '^struct \K\w+') | sort -u) <(echo "$names"))
others+=$(grep -vE '^((vtable|typeinfo|typeinfo name) for )?flashcute::' <<< "$exported" || true)
[ -z "$others" ] || fail "the shared library exports what is not in its interface:" $others
needed=$(readelf -d "$library" | sed -n 's/.*NEEDED.*\[\(.*\)\.so.*/\1/p' | grep -vE '^(libc|libm|libstdc\+\+|libgcc_s|libdl|libpthread|ld-linux.*)$' || true)
[ -z "$needed" ] || fail "the shared library needs $needed"

# ---- the examples -------------------------------------------------------------------------------------
by_cmake() { # example prefix [-D...]: its program is $scratch/by_cmake/EXAMPLE
  rm -rf "$scratch/by_cmake"
  quietly cmake -S "examples/cpp/$1" -B "$scratch/by_cmake" -DCMAKE_PREFIX_PATH="$2" "${@:3}"
  quietly cmake --build "$scratch/by_cmake"
}
by_pkg_config() { # source prefix: the program is $scratch/by_pkg_config
  quietly c++ -std=c++20 -O2 "$1" -o "$scratch/by_pkg_config" \
    $(PKG_CONFIG_PATH="$2/lib/pkgconfig" pkg-config --cflags --libs flashcute) -Wl,-rpath,"$2/lib" -ldl
}
attends() { # program: on the CPU. There are no images, and a program with a static library, outside of the prefix, cannot
  # compile any.
  local text
  text=$(CUDA_VISIBLE_DEVICES='' "$@" 2>&1) || fail "$* says: $text"
  grep -q '^cpu: largest error' <<< "$text" || fail "$* does not say how large the error is: $text"
}
compiles() { # program [support folder]: at run time, in a process of its own
  local text
  rm -rf "$FLASHCUTE_CACHE_DIR"
  text=$("$@" 2>&1) || fail "$*: $text"
  grep -q 'flashcute: compiling flashcute_sm80_fwd_f16_d64' <<< "$text" || fail "$* compiled nothing: $text"
  if grep -q 'in this process' <<< "$text"; then fail "$* did not find flashcute_compiler: $text"; fi
}
for kind in static shared; do
  by_cmake attention "$scratch/$kind"
  attends "$scratch/by_cmake/attention"
  moved="$scratch/moved_$kind"
  mv "$scratch/$kind" "$moved"
  by_cmake attention "$moved"
  attends "$scratch/by_cmake/attention"
  by_pkg_config examples/cpp/attention/main.cpp "$moved"
  attends "$scratch/by_pkg_config"

  # The device headers and flashcute_compiler are found beside a shared library, and in the prefix of a program that has
  # a static one inside; for such a program elsewhere, they can be named.
  by_pkg_config tests/consumers/compile.cpp "$moved"
  mkdir -p "$moved/bin"
  mv "$scratch/by_pkg_config" "$moved/bin/compile"
  cp "$moved/bin/compile" "$scratch/compile"
  support=$(PKG_CONFIG_PATH="$moved/lib/pkgconfig" pkg-config --variable=supportdir flashcute)
  compiles "$moved/bin/compile"
  if [ $kind = shared ]; then
    compiles "$scratch/compile"
  else
    compiles "$scratch/compile" "$support"
    text=$("$scratch/compile" 2>&1) && fail "a program elsewhere found the device headers: $text"
    grep -q 'set_search_paths has to name' <<< "$text" || fail "what is missing is not said: $text"
  fi

  if [ -n "$have_nvcc" ]; then
    by_cmake own_kernel "$moved" -DFLASHCUTE_CUTLASS_DIR="$cutlass"
    quietly "$scratch/by_cmake/own_kernel" $gpu
    cat "$scratch/log"
  fi
  if [ -n "$gpu" ]; then
    by_cmake attention "$moved"
    program=$scratch/by_cmake/attention
    if [ $kind = static ]; then cp "$program" "$moved/bin/" && program=$moved/bin/attention; fi
    quietly "$program" gpu
    cat "$scratch/log"
  fi
  echo "consumers: $kind: passed ($SECONDS s)"
done
[ -n "$have_nvcc" ] || echo "consumers: there is no nvcc: own_kernel was not built"

# ---- what find_package refuses, and how ---------------------------------------------------------------
find_package() { # its arguments [-D...]
  mkdir -p "$scratch/asks"
  printf 'cmake_minimum_required(VERSION 3.24)\nproject(asks LANGUAGES CXX)\nfind_package(flashcute %s)\n' "$1" \
    > "$scratch/asks/CMakeLists.txt"
  rm -rf "$scratch/asks/build"
  cmake -S "$scratch/asks" -B "$scratch/asks/build" -DCMAKE_PREFIX_PATH="$scratch/moved_shared" "${@:2}" > "$scratch/log" 2>&1
}
refuses() { # arguments of find_package, what it is to say [-D...]
  if find_package "$1" "${@:3}"; then fail "find_package(flashcute $1) is not refused"; fi
  # CMake breaks lines.
  tr -s ' \n' ' ' < "$scratch/log" | grep -qF "$2" || fail "find_package(flashcute $1) does not say '$2': $(cat "$scratch/log")"
}
mkdir -p "$scratch/old/include/cutlass"
printf '#define CUTLASS_MAJOR 3\n#define CUTLASS_MINOR 9\n' > "$scratch/old/include/cutlass/version.h"
refuses "0.1 REQUIRED COMPONENTS headers" "flashcute::headers needs CUTLASS 4.2: set FLASHCUTE_CUTLASS_DIR"
refuses "0.1 REQUIRED COMPONENTS headers" "has 3.9" -DFLASHCUTE_CUTLASS_DIR="$scratch/old"
refuses "0.1 REQUIRED COMPONENTS kernels" "no component 'kernels'"
refuses "0.2 REQUIRED" "version: 0.1.0"
refuses "1 REQUIRED" "version: 0.1.0"
FLASHCUTE_CUTLASS_DIR=$cutlass find_package "0.1 REQUIRED COMPONENTS headers" || fail "the environment's CUTLASS: $(cat "$scratch/log")"
echo "consumers: all passed in $SECONDS s"
