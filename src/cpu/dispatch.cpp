#include "cpu/dispatch.hpp"

#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>

#include "cpu/backward_isa.hpp"
#include "cpu/backward_scratch.hpp"
#include "cpu/cores.hpp"
#include "cpu/forward_isa.hpp"
#include "cpu/forward_scratch.hpp"
#include "cpu/thread_pool.hpp"
#include "flashcute/error.hpp"
#include "flashcute/policy/query_tile.hpp"
#include "system/environment.hpp"

namespace flashcute::cpu {
namespace {

/// Below this many multiply-adds of one product, waking the other threads takes longer than they save.
constexpr double min_parallel_work = 1 << 18;

/// Working memory that a thread keeps from call to call.
class ScratchBuffer {
 public:
  ScratchBuffer() = default;
  ScratchBuffer(ScratchBuffer const&) = delete;
  ScratchBuffer& operator=(ScratchBuffer const&) = delete;
  ~ScratchBuffer() { std::free(memory_); }

  void* at_least(size_t bytes) {
    if (bytes > bytes_) {
      std::free(memory_);
      bytes_ = 0;
      memory_ = std::aligned_alloc(scratch_alignment, ceil_div<size_t>(bytes, scratch_alignment) * scratch_alignment);
      if (memory_ == nullptr) throw std::bad_alloc{};
      bytes_ = bytes;
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

thread_local ScratchBuffer scratch_buffer;

[[noreturn]] void throw_no_isa(Isa isa) {
  throw UnsupportedError(std::string("flashcute was built without the CPU instruction set ") + name_of(isa));
}

ForwardTileFunction forward_tile(Isa isa, DType dtype) {
  switch (isa) {
    case Isa::baseline: return baseline::forward_tile(dtype);
#if defined(__x86_64__)
    case Isa::avx2: return avx2::forward_tile(dtype);
    case Isa::avx512: return avx512::forward_tile(dtype);
#else
    default: break;
#endif
  }
  throw_no_isa(isa);
}

BackwardTileFunction backward_tile(Isa isa, DType dtype, BackwardPass pass) {
  switch (isa) {
    case Isa::baseline: return baseline::backward_tile(dtype, pass);
#if defined(__x86_64__)
    case Isa::avx2: return avx2::backward_tile(dtype, pass);
    case Isa::avx512: return avx512::backward_tile(dtype, pass);
#else
    default: break;
#endif
  }
  throw_no_isa(isa);
}

template <class Mask>
void keys_of_queries(int32_t query0, int32_t count, AnySequence const& sequence, RowRange* to) {
  for (int32_t i = 0; i < count; ++i) to[i] = Mask::keys_of(query0 + i, sequence);
}

// The ranges of masks without a map, as those of one that shows everything.
BandRange band(BandRange const& r) { return r; }
BandRange band(KvRange const& r) { return {r.begin, r.begin, r.full_end, r.end}; }
BandRange band(QueryBandRange const& r) { return {r.begin, r.full_begin, r.full_end, r.end}; }
BandRange band(QueryRange const& r) { return {r.begin, min_of(r.full_begin, r.end), r.end, r.end}; }
template <class Range>
MapPages pages(Range const& r, CellMap const& map, int32_t block) {
  return {band(r), map, 0, 0, block};
}
MapPages pages(MapBlocks const& r, CellMap const&, int32_t) { return r.pages(); }
MapPages pages(MapQueryBlocks const& r, CellMap const&, int32_t) { return r.pages(); }

template <class Mask>
MapBlocks kv_range(Queries const& tile, ForwardParams const& p, int32_t block_n) {
  return MapBlocks(pages(Mask::kv_range(tile, p, block_n), tile.sequence(p).by_query(), block_n));
}
template <class Mask>
MapQueryBlocks query_range(Keys const& tile, ForwardParams const& p, int32_t block_m) {
  return MapQueryBlocks(pages(Mask::query_range(tile, p, block_m), tile.sequence(p).by_key(), block_m));
}

MaskFunctions mask_functions(Features const& features) {
  // The structured binding names every feature, so that a new one is a compile error until it is handled here. Every
  // forward tile can count its blocks; the backward counts none.
  auto const& [mask, count_blocks] = features;
  return with_constant(mask, []<MaskKind kind>() -> MaskFunctions {
    using Mask = flashcute::Mask<kind>;
    return {kv_range<Mask>, query_range<Mask>, keys_of_queries<Mask>};
  });
}

size_t accumulator_bytes(DType dtype) { return dtype == DType::float64 ? sizeof(double) : sizeof(float); }

Isa current_isa() { return choose_isa(cpu_isa()); }

}  // namespace

char const* name_of(Isa isa) {
  switch (isa) {
    case Isa::baseline: return "baseline";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
  }
  return "?";
}

bool is_available(Isa isa) {
  switch (isa) {
    case Isa::baseline: return true;
#if defined(__x86_64__)
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::avx512:
      return is_available(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    default: return false;
#endif
  }
  return false;
}

Isa choose_isa(std::string const& requested) {
  Isa best = Isa::baseline;
  for (Isa const isa : all_isas) {
    if (!is_available(isa)) continue;
    if (requested == name_of(isa)) return isa;
    best = isa;
  }
  if (requested == "auto") return best;
  throw ArgumentError("environment variable FLASHCUTE_CPU_ISA",
                      std::string("what this CPU and this build have, at best ") + name_of(best), requested);
}

int useful_threads(ForwardParams const& p, int threads) {
  double const enough = min_parallel_work / (static_cast<double>(p.heads) * (p.head_dim + p.head_dim_v) / 2);
  bool const packed = AnySequence::is_packed(p);
  double pairs = 0;
  for (int i = 0; i < (packed ? p.sequences.count : p.batch) && pairs < enough; ++i) {
    auto const entry = packed ? AnySequence::Entry::of_packed(p, i + 1) : AnySequence::Entry::of(p, i);
    pairs += static_cast<double>(entry.queries) * entry.keys;
  }
  return pairs < enough ? 1 : threads;
}

char const* isa() { return name_of(current_isa()); }

int num_threads() {
  std::optional<int> const wanted = cpu_threads();
  return wanted ? *wanted : available_cpus();
}

void forward_with(Isa isa, int threads, ForwardConfig const& config, Features const& features,
                  ForwardParams const& params) {
  ForwardTileFunction const tile = forward_tile(isa, config.dtype);
  MaskFunctions const mask = mask_functions(features);
  size_t const bytes = static_cast<size_t>(ForwardScratch::of(config).elements) * accumulator_bytes(config.dtype);
  parallel_for(count_query_tiles(params, config.block_m), useful_threads(params, threads),
               [&](int64_t index) { tile(config, mask, params, index, scratch_buffer.at_least(bytes)); });
}

void backward_with(Isa isa, int threads, BackwardConfig const& config, Features const& features,
                   BackwardParams const& params) {
  MaskFunctions const mask = mask_functions(features);
  BackwardParams p = params;
  size_t const queries = static_cast<size_t>(p.forward.batch) * p.forward.heads * p.forward.seqlen_q;
  auto const delta = std::make_unique_for_overwrite<char[]>(queries * accumulator_bytes(config.dtype));
  p.delta = delta.get();
  auto const run = [&](BackwardPass pass, int64_t tiles) {
    BackwardTileFunction const tile = backward_tile(isa, config.dtype, pass);
    size_t const bytes =
        static_cast<size_t>(BackwardScratch::of(config, pass).elements) * accumulator_bytes(config.dtype);
    parallel_for(tiles, useful_threads(p.forward, threads),
                 [&](int64_t index) { tile(config, mask, p, index, scratch_buffer.at_least(bytes)); });
  };
  run(BackwardPass::queries, count_query_tiles(p.forward, config.block_m));  // writes the delta that keys read
  run(BackwardPass::keys, count_key_tiles(p.forward, config.block_n));
  if (p.dsink != nullptr) run(BackwardPass::sink, p.forward.heads);
}

void forward(ForwardConfig const& config, Features const& features, ForwardParams const& params) {
  forward_with(current_isa(), num_threads(), config, features, params);
}

void backward(BackwardConfig const& config, Features const& features, BackwardParams const& params) {
  backward_with(current_isa(), num_threads(), config, features, params);
}

}  // namespace flashcute::cpu
