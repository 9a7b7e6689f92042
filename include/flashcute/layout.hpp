// From a configuration to CuTe types: where tiles live in shared memory, how threads copy them, how
// warps multiply them. Types only; nothing here runs.
#pragma once

#include "flashcute/instructions.hpp"

namespace flashcute {

/// The arch that a device translation unit is compiled for, for the rules that depend on it.
#if defined(__CUDA_ARCH__)
inline constexpr Arch compiled_arch = __CUDA_ARCH__ / 10;
#else
inline constexpr Arch compiled_arch = 80;
#endif

template <ForwardConfig C>
struct ForwardLayout {
#define FLASHCUTE_RULE(id, sentence) static_assert(check(C, compiled_arch) != ForwardConfigError::id, sentence);
  FLASHCUTE_FORWARD_CONFIG_RULES(FLASHCUTE_RULE)
#undef FLASHCUTE_RULE

  using Element = typename TensorCore<C.dtype>::Element;
  using BlockM = cute::Int<C.block_m>;
  using BlockN = cute::Int<C.block_n>;
  using HeadDim = cute::Int<C.head_dim>;
  using NumWarps = cute::Int<C.num_warps>;

  // ---- shared memory ----
  // Rows of 64 elements are 128 bytes, all 32 banks: without the swizzle, eight rows read by one
  // ldmatrix phase would start in the same bank. The swizzle XORs the 16-byte column with the row.
  using SmemAtom =
      decltype(cute::composition(cute::Swizzle<C.swizzled ? 3 : 0, 3, 3>{},
                                 cute::Layout<cute::Shape<cute::_8, cute::_64>, cute::Stride<cute::_64, cute::_1>>{}));
  using SmemQ = decltype(cute::tile_to_shape(SmemAtom{}, cute::Shape<BlockM, HeadDim>{}));   // (M, D)
  using SmemKV = decltype(cute::tile_to_shape(SmemAtom{}, cute::Shape<BlockN, HeadDim>{}));  // (N, D)
  using SmemVt = decltype(cute::composition(
      SmemKV{}, cute::make_layout(cute::Shape<HeadDim, BlockN>{}, cute::GenRowMajor{})));  // (D, N)

  struct SharedStorage {
    alignas(128) Element q[cute::cosize_v<SmemQ>];  // the output tile reuses it
    alignas(128) Element k[cute::cosize_v<SmemKV>];
    alignas(128) Element v[cute::cosize_v<SmemKV>];
  };
  static_assert(sizeof(SharedStorage) == smem_bytes(C));

  // ---- global <-> shared: 16 bytes a thread, 8 threads a row of 64 columns ----
  using CopyThreads = cute::Layout<cute::Shape<cute::Int<C.num_warps * 4>, cute::_8>, cute::Stride<cute::_8, cute::_1>>;
  using CopyValues = cute::Layout<cute::Shape<cute::_1, cute::_8>>;
  using LoadAtom = cute::Copy_Atom<CpAsync, Element>;
  using StoreAtom = cute::Copy_Atom<VectorCopy, Element>;
  using GlobalLoad = decltype(cute::make_tiled_copy(LoadAtom{}, CopyThreads{}, CopyValues{}));
  using GlobalStore = decltype(cute::make_tiled_copy(StoreAtom{}, CopyThreads{}, CopyValues{}));

  // ---- tensor cores: warps along M only, so that a row of scores lives in one quad of lanes ----
  using TiledMma = cute::TiledMMA<cute::MMA_Atom<typename TensorCore<C.dtype>::Mma>,
                                  cute::Layout<cute::Shape<NumWarps, cute::_1, cute::_1>>,
                                  cute::Tile<cute::Int<16 * C.num_warps>, cute::_16, cute::_16>>;
  using LdmatrixAtom = cute::Copy_Atom<Ldmatrix, Element>;
  using LdmatrixTransposedAtom = cute::Copy_Atom<LdmatrixTransposed, Element>;
  using FragmentStoreAtom = cute::Copy_Atom<FragmentStore, Element>;

  static constexpr int threads = num_threads(C);
  static constexpr int rows_per_thread = 2 * C.block_m / (16 * C.num_warps);
};

}  // namespace flashcute
