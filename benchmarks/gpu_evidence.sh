#!/usr/bin/env bash
# On a machine with a GPU: everything that a change of the kernels has to show. Each step leaves its log (in
# logs.tar) or its result lines (*.jsonl, for benchmarks/results/) in a folder. A step is skipped over, not
# waited for, once its limit is up.
#
# usage: benchmarks/gpu_evidence.sh OUTPUT_FOLDER COMMIT [STEP...]
# steps: build cpp python memcheck synccheck initcheck racecheck o1 forward forward_cudnn forward_hopper
#        forward_hopper_short forward_float32 naive options options_hopper tiles backward backward_gqa
#        sm90_backward backward_float32 overhead first_use io profile presets
# (default: all); package: in place of build, without the C++ tests and for compute capability 9.0 alone
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: gpu_evidence.sh OUTPUT_FOLDER COMMIT [STEP...]}")
commit=${2:?the commit that is measured}
shift 2
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(build cpp python memcheck synccheck initcheck racecheck o1 forward forward_cudnn
  forward_hopper forward_hopper_short forward_float32 naive options options_hopper tiles backward backward_gqa
  sm90_backward backward_float32 overhead first_use io profile presets)
export PYTHONPATH=$PWD/build/system/stage${PYTHONPATH:+:$PYTHONPATH}
logs=$(mktemp -d)
mkdir -p "$out"
touch "$logs/failures"

run() { # name, limit in seconds, command...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  timeout "$limit" "$@" > "$logs/$name.log" 2>&1
  local status=$?
  [ $status = 0 ] || echo "$name (exit $status)" >> "$logs/failures"
  printf '%-10s %4d s  %s\n' "$name" $((SECONDS - start)) "$(grep -v '^$' "$logs/$name.log" | tail -1 | cut -c1-140)"
}

bench() { # name, limit in seconds, options...
  run "$1" "$2" python3 -m flashcute bench --device cuda --commit "$commit" --out "$out/gpu_$1.jsonl" "${@:3}"
}

# Times a head dimension with changed configurations, which are compiled first, all at once.
variants() { # name, head dim, --config arguments...
  local name=$1 head_dim=$2
  shift 2
  run "${name}_compile" 300 python3 -m flashcute compile --head-dim "$head_dim" "$@"
  bench "$name" 200 --seqlens 4096 --head-dims "$head_dim" --impls flashcute,sdpa_flash "$@"
}

# Tiles that the default might be: block_m x block_n x num_warps x blocks_per_sm.
declare -A tiles=(
  [64]="128x128x4x2 128x112x4x2 128x96x4x2 128x80x4x2 64x64x4x3 64x64x4x4 64x128x4x3 128x64x8x2 64x64x2x4"
  [128]="128x64x4x2 128x48x4x2 128x32x4x2 64x64x4x2 64x96x4x3 64x128x4x2 64x32x4x3 128x64x8x1 128x128x8x1"
  [256]="64x48x4x2 64x32x4x2 32x64x2x3 128x64x8x1 128x32x8x1 128x96x8x1"
)

for step in "${steps[@]}"; do
  case $step in
    build)
      run build 300 make install SYSTEM=1
      run build_tests 300 cmake --build build/system ;;
    package)
      run package_configure 60 cmake -S . -B build/system -G Ninja -DCMAKE_BUILD_TYPE=Release -DFLASHCUTE_BUILD_TESTS=OFF \
        -DFLASHCUTE_BUILD_PYTHON=ON -DFLASHCUTE_FETCH=OFF -DFLASHCUTE_ARCHS=90 \
        -DPython_EXECUTABLE="$(command -v python3)" \
        ${FLASHCUTE_CUTLASS_DIR:+-DFLASHCUTE_CUTLASS_DIR=$(realpath "$FLASHCUTE_CUTLASS_DIR")}
      run package_build 300 cmake --build build/system
      run package_install 30 cmake --install build/system --component python --prefix build/system/stage ;;
    cpp) run cpp 200 ctest --test-dir build/system --output-on-failure --no-tests=error --parallel 8 ;;
    python) # All folders at once: most of the time kernels are compiled.
      for folder in tests/python/*/; do
        FLASHCUTE_JIT_JOBS=4 run "python_$(basename "$folder")" 560 python3 -m pytest -q -m gpu "$folder" &
      done
      wait ;;
    memcheck | synccheck | initcheck | racecheck)
      run "$step" 150 compute-sanitizer --tool "$step" --error-exitcode 1 build/system/tests/cpp/test_gpu ;;
    o1) # The suite on kernels that the assembler has hardly optimised, in a build folder of its own.
      run o1_build 300 cmake -S . -B build/o1 -G Ninja -DFLASHCUTE_BUILD_TESTS=ON -DFLASHCUTE_FETCH=OFF \
        -DFLASHCUTE_ARCHS=90 -DFLASHCUTE_PTXAS_LEVEL=1 -DPython_EXECUTABLE="$(command -v python3)" \
        ${FLASHCUTE_CUTLASS_DIR:+-DFLASHCUTE_CUTLASS_DIR=$(realpath "$FLASHCUTE_CUTLASS_DIR")}
      run o1_build 300 cmake --build build/o1 --target test_gpu
      run o1 200 build/o1/tests/cpp/test_gpu ;;
    # The mma.sync kernels, also where Hopper's are the default.
    forward) bench forward 300 --grid peers --rounds 8 --head-dims 64,128,256 --config kernel=sm80 --impls sdpa_flash ;;
    forward_cudnn) # Apart: cuDNN's WGMMA kernels heat the chip so that all others run at lower clocks.
      bench forward_cudnn 300 --grid peers --head-dims 64,128,256 --impls flashcute,sdpa_flash,sdpa_cudnn ;;
    forward_hopper) # Needs the package fa3-fwd.
      bench forward_hopper 300 --grid peers --head-dims 64,128,256 --impls flashcute,fa3,sdpa_cudnn --rounds 15 ;;
    forward_hopper_short) # The same: few tokens, or several query heads to a key head.
      bench forward_hopper_short 120 --grid benchmarks/shapes/short_and_grouped.jsonl --impls flashcute,fa3,sdpa_cudnn \
        --rounds 15 ;;
    forward_float32) bench forward_float32 200 --grid peers --dtype float32 --head-dims 64,128,256 --seqlens 1024,4096 \
      --impls flashcute,sdpa_efficient,sdpa_math ;;
    backward) bench backward 300 --backward --grid peers --head-dims 64,128,256 --rounds 8 --config kernel=sm80 \
      --impls flashcute,sdpa_flash,flashcute_deterministic ;;
    backward_gqa) bench backward_gqa 300 --backward --grid peers --head-dims 64,128,256 --kv-ratio 8 --config kernel=sm80 \
      --impls flashcute,sdpa_flash,flashcute_deterministic ;;
    sm90_backward) bench sm90_backward 300 --backward --grid peers --head-dims 64,128 --rounds 5 \
      --impls flashcute,sdpa_cudnn,sdpa_flash --config kernel=sm80 --config late_dq=0 ;;
    backward_float32) bench backward_float32 300 --backward --grid peers --dtype float32 --head-dims 64,128,256 \
      --seqlens 1024,4096,16384 --impls flashcute,sdpa_efficient,flashcute_deterministic ;;
    naive) bench naive 60 --batch 4 --heads 16 --head-dims 64 --seqlens 2048,4096,8192 --impls flashcute,naive ;;
    options)
      for d in 64 128; do
        # shellcheck disable=SC2046 # one argument a word
        variants "options_$d" $d $(python3 tools/option_table.py --bench-arguments --head-dims $d)
      done ;;
    options_hopper)
      for d in 64 128 256; do
        # shellcheck disable=SC2046 # one argument a word
        variants "options_hopper_$d" $d $(python3 tools/option_table.py --kernel sm90 --bench-arguments --head-dims $d)
      done ;;
    tiles)
      for d in 64 128 256; do
        arguments=()
        for tile in ${tiles[$d]}; do
          IFS=x read -r m n w b <<< "$tile"
          for q in 0 1; do
            arguments+=(--config "kernel=sm80,block_m=$m,block_n=$n,num_warps=$w,blocks_per_sm=$b,q_in_registers=$q")
          done
        done
        variants "tiles_$d" $d "${arguments[@]}"
      done ;;
    overhead) bench overhead 60 --overhead ;;
    first_use) bench first_use 120 --first-use ;;
    io) # Needs ncu, as the next one does.
      for d in 64 128 256; do
        for mask in '' --causal; do
          run "io_$d$mask" 120 python3 -m flashcute io --ncu --head-dim $d --seqlen 1024,4096,16384 ${mask:+"$mask"} \
            --commit "$commit" --out "$out/gpu_io.jsonl"
        done
      done ;;
    profile)
      for arguments in '--head-dim '{64,128,256}{,' --backward'} '--head-dim 128 --causal'; do
        # shellcheck disable=SC2086 # one argument a word
        run "profile_${arguments//[^0-9a-z]/}" 120 python3 -m flashcute profile $arguments --commit "$commit" \
          --json "$out/gpu_profile.jsonl"
      done ;;
    presets)
      for pass in '' --backward; do
        bench presets 300 --preset gpt-oss-20b,deepseek-v3 ${pass:+"$pass"}
      done ;;
    *) echo "unknown step $step" >&2; exit 2 ;;
  esac
done

tar cf "$out/logs.tar" -C "$logs" .
if [ -s "$logs/failures" ]; then
  while read -r failure; do
    echo "==== FAILED: $failure"
    tail -40 "$logs/${failure%% *}.log"
  done < "$logs/failures"
  exit 1
fi
echo "all passed: ${steps[*]}"
