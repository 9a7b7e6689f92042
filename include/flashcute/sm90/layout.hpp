// From a configuration to CuTe types, as flashcute/sm80/layout.hpp: the layout of shared memory, and how warpgroups
// multiply tiles.
#pragma once

#include "flashcute/policy/mask.hpp"
#include "flashcute/sm90/fragment.hpp"
#include "flashcute/sm90/ring.hpp"
#include "flashcute/sm90/tile_order.hpp"
#include "flashcute/sm90/wgmma_160.hpp"

namespace flashcute::sm90 {

/// The next tile of a warpgroup. The loading warp writes it to shared memory.
template <class Mask>
struct Work {
  QueryTile<typename Mask::Sequence> rows;  // the warpgroup's part of the tile; it may be empty
  typename Mask::Announced range;           // of keys that its rows see
  typename Mask::Announced loaded;          // of keys that any of the tile's rows sees
  bool exists;                              // false: there are no more tiles
  bool attends;                             // the warpgroup has rows in it, and some row of the tile sees a key
};

/// A block of V for the inspecting warps.
struct Inspection {
  int place;  // its stage in the ring; below 0: there are no more
  int tile;   // the slot in `dropped` of its tile
};

/// What the scouting warp tells of a tile.
template <class Mask>
struct Found {
  QueryTile<typename Mask::Sequence> tile;
  typename Mask::Announced seen;  // the keys that some of its rows see
  bool exists;                    // false: there are no more tiles
};

/// Under a map: of a page of a tile's blocks. `seen` is what lies between the first and the last block.
template <class Mask>
  requires(!Mask::Range::contiguous)
struct Found<Mask> {
  QueryTile<typename Mask::Sequence> tile;
  typename Mask::Announced seen;
  bool exists;
  int32_t page;
  MapPages::Page blocks;
  bool first, last;  // of the tile's pages in which some block is visited
};

/// Registers per thread of the loading warpgroup and of the consumer warpgroups: together at most the 65536 of a
/// multiprocessor.
struct WarpgroupRegisters {
  int32_t loader, consumer;
};
constexpr WarpgroupRegisters registers_of(ForwardConfig const& c) {
  if (consumer_warpgroups(c) == 3) return {32, 160};
  return c.head_dim_v > 128 ? WarpgroupRegisters{24, 240} : WarpgroupRegisters{40, 232};
}

/// The mask matters to shared memory alone.
template <ForwardConfig C, class Mask = flashcute::Mask<MaskKind::full>>
struct ForwardLayout : WarpgroupFragment {
  using Element = typename TensorCore<C.dtype>::Element;
  using BlockN = cute::Int<C.block_n>;
  using HeadDim = cute::Int<C.head_dim>;
  using HeadDimV = cute::Int<C.head_dim_v>;
  using WarpgroupM = cute::Int<warpgroup_rows>;

  static constexpr int warpgroups = consumer_warpgroups(C);
  static constexpr int tile_rows = flashcute::tile_rows(C);
  static constexpr int keys_per_load = flashcute::keys_per_load(C);

  // ---- shared memory ----
  // Tiles are cut into pages (sm90/tensor_map.hpp). In a cluster each thread block loads a part of a page's rows.
  static constexpr int q_elements = warpgroup_rows * C.head_dim;  // of one warpgroup
  static constexpr int k_elements = C.block_n * C.head_dim;
  static constexpr int v_elements = C.block_n * C.head_dim_v;

  /// Columns of a page of a tile that has `Columns`.
  template <int Columns>
  static constexpr int page = page_bytes(Columns * sizeof(Element)) / sizeof(Element);

  // The operands of WGMMA, 16 of the columns that are summed over in each step. CuTe would derive the same layouts from
  // its atoms (Layout_K_SW128_Atom and the like), but that takes longer than to compile the rest of the kernel.
  // `Shape` and `Stride` describe one step, then the steps, then the stages of the ring.
  template <int Page, class Shape, class Stride>
  using Operand = SwizzledOperand<Page * sizeof(Element), Shape, Stride>;
  static constexpr int page_qk = page<C.head_dim>, page_v = page<C.head_dim_v>;
  using PageQK = cute::Int<page_qk>;
  using PageV = cute::Int<page_v>;
  using StepsOfPages = cute::Shape<cute::Int<page_qk / 16>, cute::Int<C.head_dim / page_qk>>;
  /// A warpgroup's rows of Q: (MMA, 1, MMA_D)
  using OperandQ = Operand<page_qk, cute::Shape<cute::Shape<WarpgroupM, cute::_16>, cute::_1, StepsOfPages>,
                           cute::Stride<cute::Stride<PageQK, cute::_1>, cute::_0,
                                        cute::Stride<cute::_16, cute::Int<warpgroup_rows * page_qk>>>>;
  /// The ring of K: (MMA, 1, MMA_D, STAGE)
  using OperandK =
      Operand<page_qk, cute::Shape<cute::Shape<BlockN, cute::_16>, cute::_1, StepsOfPages, cute::Int<C.stages>>,
              cute::Stride<cute::Stride<PageQK, cute::_1>, cute::_0,
                           cute::Stride<cute::_16, cute::Int<C.block_n * page_qk>>, cute::Int<k_elements>>>;
  /// The ring of V, whose rows are summed over: (MMA, 1, MMA_N, STAGE)
  using OperandV = Operand<page_v,
                           cute::Shape<cute::Shape<cute::Shape<PageV, cute::Int<C.head_dim_v / page_v>>, cute::_16>,
                                       cute::_1, cute::Int<C.block_n / 16>, cute::Int<C.stages>>,
                           cute::Stride<cute::Stride<cute::Stride<cute::_1, cute::Int<C.block_n * page_v>>, PageV>,
                                        cute::_0, cute::Int<16 * page_v>, cute::Int<v_elements>>>;

  // Named barriers: 0 is __syncthreads; then one per warpgroup for taking turns, and one per warpgroup for its own
  // warps.
  static constexpr int first_turn_barrier = 1;
  static constexpr int first_own_barrier = first_turn_barrier + warpgroups;

  /// Slots for announced tiles. When that of a tile is written, before the wait for Q's buffer, a warpgroup may be two
  /// tiles behind it without having stored the one before that: with late_store a slow warp may still store the output
  /// of a tile while the next one's last S is done.
  static constexpr int tiles = 4;

  /// What the loading warp tells of the block of K in each stage: nothing where blocks follow each other.
  struct NoKeyBlocks {};
  struct EachKeyBlock {
    AnnouncedBlock of_stage[C.stages];
  };
  using KeyBlocks = std_::conditional_t<Mask::Range::contiguous, NoKeyBlocks, EachKeyBlock>;

  /// Whether a warp looks ahead for what tiles see, since that may have to be read from memory; and what it tells.
  static constexpr bool scouts = !Mask::Sequence::fills_tensors;
  static constexpr int found_places = 2;
  struct NotScouted {};
  struct Scouted {
    Found<Mask> found[found_places];
    Barrier full[found_places], empty[found_places];
  };
  using WhatIsFound = std_::conditional_t<scouts, Scouted, NotScouted>;

  /// Warps of the loading warpgroup that neither load nor scout.
  static constexpr int inspecting_warps = scouts ? 2 : 3;

  template <int Alignment, class OwnTiles>
  struct Storage {
    alignas(Alignment) Element q[warpgroups][q_elements];
    alignas(Alignment) Element k[C.stages][k_elements];
    alignas(Alignment) Element v[C.stages][v_elements];
    Work<Mask> work[tiles][warpgroups];
    bool dropped[tiles];  // whether non-finite values were replaced by 0 in a partial block of V
    Inspection inspections[C.stages];
    Barrier v_landed[C.stages];  // V has arrived, its inspection may begin
    Barrier q_full[warpgroups], q_empty[warpgroups];
    Barrier k_full[C.stages], k_empty[C.stages];
    Barrier v_full[C.stages], v_empty[C.stages];
    [[no_unique_address]] KeyBlocks key_blocks;
    [[no_unique_address]] WhatIsFound scouted;
    [[no_unique_address]] OwnTiles own_tiles;
  };
  /// What the others leave. (Without the alignment, to which the size would be rounded.)
  struct NoTiles {};
  static constexpr int own_tiles_bytes = smem_bytes(C) - sizeof(Storage<alignof(Barrier), NoTiles>);
  using SharedStorage = Storage<1024, OwnTiles<typename Mask::Sequence, own_tiles_bytes>>;
  static_assert(sizeof(SharedStorage) <= smem_bytes(C));

  // ---- tensor cores: each warpgroup multiplies its own 64 rows ----
  using MmaS = cute::MMA_Traits<
      decltype(cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<WarpgroupM, BlockN, cute::_16>>())>;
  static auto output_atom() {
    using namespace cute;
    if constexpr (HeadDimV::value == 160) {
      return Wgmma64x160x16<Element>{};
    } else {
      return GMMA::rs_op_selector<Element, Element, float, Shape<WarpgroupM, HeadDimV, _16>, GMMA::Major::K,
                                  GMMA::Major::MN>();
    }
  }
  using MmaO = cute::MMA_Traits<decltype(output_atom())>;
};

}  // namespace flashcute::sm90
