// A kernel of your own around flashcute's main loop: it also tells how many clock cycles each tile of query rows took,
// which shows what the causal mask saves.
//
//     cmake -S . -B build -DCMAKE_PREFIX_PATH=<where flashcute is installed> -DFLASHCUTE_CUTLASS_DIR=<CUTLASS 4.2>
//     cmake --build build && build/own_kernel
//
// Without a GPU it says so and does nothing; with the argument `gpu` that is an error.
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string_view>
#include <vector>

#include "flashcute/sm80/forward.hpp"

namespace {

// How it is computed: any option of ForwardConfig; a combination that cannot be compiled is refused in a sentence.
constexpr flashcute::ForwardConfig config{.dtype = flashcute::DType::float16, .head_dim = 64, .block_m = 64};
// What is computed.
constexpr flashcute::ForwardKernelId kernel = flashcute::kernel_of(config, {.mask = flashcute::MaskKind::causal});
using Pass = flashcute::ForwardPass<kernel>;

__global__ void __launch_bounds__(flashcute::num_threads(config))
    timed_attention(__grid_constant__ flashcute::ForwardParams const params, long long* cycles) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  long long const start = clock64();
  Pass::run(params, *reinterpret_cast<typename Pass::L::SharedStorage*>(shared_memory));
  __syncthreads();
  if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - start;
}

// q, k, v and out are (1, seqlen, heads, head_dim).
constexpr int seqlen = 1000, heads = 4, head_dim = config.head_dim;
constexpr std::size_t elements = std::size_t{seqlen} * heads * head_dim;

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

/// Memory that the CPU and the GPU both see, for the life of the program.
template <class T>
T* managed(std::size_t count) {
  void* memory = nullptr;
  check(cudaMallocManaged(&memory, count * sizeof(T)));
  return static_cast<T*>(memory);
}

std::size_t offset(int row, int head) { return (static_cast<std::size_t>(row) * heads + head) * head_dim; }

/// Row i of head h by plain loops.
std::vector<double> plain_row(__half const* q, __half const* k, __half const* v, int i, int h) {
  std::vector<double> row(head_dim);
  double sum = 0;
  for (int j = 0; j <= i; ++j) {
    double score = 0;
    for (int d = 0; d < head_dim; ++d)
      score += double{__half2float(q[offset(i, h) + d])} * __half2float(k[offset(j, h) + d]);
    double const p = std::exp(score / std::sqrt(double{head_dim}));
    sum += p;
    for (int d = 0; d < head_dim; ++d) row[d] += p * __half2float(v[offset(j, h) + d]);
  }
  for (double& x : row) x /= sum;
  return row;
}

double largest_error(__half const* q, __half const* k, __half const* v, __half const* out) {
  double error = 0;
  for (int h = 0; h < heads; ++h) {
    for (int i = 0; i < seqlen; ++i) {
      std::vector<double> const expected = plain_row(q, k, v, i, h);
      for (int d = 0; d < head_dim; ++d) {
        double const difference = std::abs(__half2float(out[offset(i, h) + d]) - expected[d]);
        if (!(difference <= error)) error = difference;  // NaN, too
      }
    }
  }
  return error;
}

flashcute::ForwardParams params_for(__half const* q, __half const* k, __half const* v, __half* out) {
  flashcute::ForwardParams p{};
  p.q = q, p.k = k, p.v = v, p.out = out;
  p.q_stride = p.k_stride = p.v_stride =
      p.out_stride = {.batch = static_cast<std::int64_t>(elements), .row = heads * head_dim, .head = head_dim};
  p.scale = 1 / std::sqrt(double{head_dim});
  p.scale_log2 = static_cast<float>(p.scale * flashcute::log2_e<double>);
  p.batch = 1, p.heads = p.kv_heads = heads;
  p.seqlen_q = p.seqlen_k = seqlen;
  p.head_dim = p.head_dim_v = head_dim;
  p.causal_offset = 0;  // query i sees key j if j <= i
  return p;
}

int run() {
  __half *const q = managed<__half>(elements), *const k = managed<__half>(elements),
                *const v = managed<__half>(elements), *const out = managed<__half>(elements);
  std::mt19937 engine(0);
  std::normal_distribution<float> normal;
  for (__half* const tensor : {q, k, v})
    std::generate(tensor, tensor + elements, [&] { return __half(normal(engine)); });
  std::fill(out, out + elements, __half(NAN));

  flashcute::ForwardParams const params = params_for(q, k, v, out);
  auto const blocks = static_cast<unsigned>(flashcute::count_query_tiles(params, config.block_m));
  auto const bytes = static_cast<int>(flashcute::smem_bytes(config));
  auto* const cycles = managed<long long>(blocks);
  check(cudaFuncSetAttribute(timed_attention, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  timed_attention<<<blocks, flashcute::num_threads(config), bytes>>>(params, cycles);
  check(cudaGetLastError());
  check(cudaDeviceSynchronize());

  for (unsigned block = 0; block < blocks / heads; ++block) {  // of head 0
    auto const tile = flashcute::QueryTile<flashcute::UniformSequence>::at(params, block, config.block_m);
    std::printf("query rows %3d to %3d: %6lld cycles\n", tile.row0, tile.row0 + tile.rows - 1, cycles[block]);
  }
  double const error = largest_error(q, k, v, out);
  // Values are below 5; a probability and an output are each rounded to float16, by 2^-11 of them at most.
  bool const right = error < 2 * 5 / 2048.;
  std::printf("largest error %.2g%s\n", error, right ? "" : ": WRONG");
  return right ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  int gpus = 0;
  if (cudaError_t const error = cudaGetDeviceCount(&gpus); error != cudaSuccess || gpus == 0) {
    std::printf("no GPU (%s): the kernel was compiled and is not run\n", cudaGetErrorString(error));
    return argc > 1 && argv[1] == std::string_view("gpu") ? 1 : 0;
  }
  return run();
}
