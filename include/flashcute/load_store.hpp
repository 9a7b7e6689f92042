// Moves tiles between global and shared memory and owns all synchronisation of the main loop: the
// kernel asks for Q, K(n), V(n) in order, and what it gets is ready to multiply.
#pragma once

#include "flashcute/cuda_core.hpp"
#include "flashcute/mask.hpp"
#include "flashcute/nonfinite.hpp"
#include "flashcute/tf32x3.hpp"

namespace flashcute {

/// A thread's places in a tile: the first depends on the thread, the others lie at distances that do not. As with
/// `Pieces`, the swizzle differs by an XOR.
template <class Smem>
class Places {
  using Element = typename Smem::Element;
  static constexpr int chunk = Smem::shape.chunk;
  static constexpr size_t size = sizeof(Element);  // unsigned arithmetic: with int, nvcc spills more

 public:
  FLASHCUTE_DEVICE Places(Element* tile, int row, int column)
      : tile_(reinterpret_cast<char*>(tile)),
        first_(size * ((column / chunk * Smem::rows + row) * chunk + (column % chunk ^ Smem::unit * Smem::mask(row)))) {
  }

  /// `down` is a multiple of 8, and in `across` no bit is set that the first column has.
  FLASHCUTE_DEVICE Element* at(int down, int across) const {
    int const further = size * (across / chunk * Smem::rows + down) * chunk;
    return reinterpret_cast<Element*>(tile_ + (first_ ^ size * (across % chunk)) + further);
  }

 private:
  char* tile_;
  int first_;
};

/// Copies tiles of one shape, `Smem` being a TileLayout::Smem: this thread's part of each.
template <TileConfig C, class Smem>
class TileCopy {
  using Element = typename TileLayout<C>::Element;
  using Word = cute::uint_bit_t<8 * C.copy_bytes>;
  static constexpr CopyShape shape = Smem::shape;

 public:
  /// This thread's first element of a tile in global memory.
  template <class Pointer>
  FLASHCUTE_DEVICE static Pointer first(Pointer tile, int64_t row_stride) {
    return tile + row() * row_stride + column();
  }

  /// Starts copying a tile to shared memory. Columns from `columns` on, and in a partial tile the rows from
  /// `rows` on, become zeros: nothing beyond the tensor is ever multiplied.
  template <class Partial>
  FLASHCUTE_DEVICE static void load(Element const* from, int64_t row_stride, int rows, int columns, Element* tile,
                                    Partial) {
    auto const places = part(tile, thread_index());  // (COPY, COPY_rows, COPY_columns)
    CUTE_UNROLL
    for (int i = 0; i < row_passes; ++i, from += shape.rows_per_pass * row_stride) {
      bool const row_exists = !Partial::value || i * shape.rows_per_pass + row() < rows;
      auto const exists = [&](int j) { return row_exists && column() + j * columns_per_pass < columns; };
      if constexpr (C.async_copy) {
        CUTE_UNROLL
        for (int j = 0; j < column_passes; ++j) {
          copy_async<Word>(from + j * columns_per_pass, &places(0, i, j), exists(j));
        }
      } else {
        Word words[column_passes];  // so that the loads of a row overlap
        CUTE_UNROLL
        for (int j = 0; j < column_passes; ++j) {
          words[j] = exists(j) ? global_load<Word>(from + j * columns_per_pass) : Word{};
        }
        CUTE_UNROLL
        for (int j = 0; j < column_passes; ++j) shared_store(&places(0, i, j), words[j]);
      }
    }
  }

  /// Whether the part of a tile that this thread copied to shared memory is finite.
  FLASHCUTE_DEVICE static bool is_finite(Element* tile) {
    auto const places = part(tile, thread_index());  // (COPY, COPY_rows, COPY_columns)
    FiniteCheck<Element> check;
    CUTE_UNROLL
    for (int i = 0; i < row_passes; ++i) {
      CUTE_UNROLL
      for (int j = 0; j < column_passes; ++j) check.template look_at<max_of(4, C.copy_bytes)>(&places(0, i, j));
    }
    return check.all_finite();
  }

  /// Copies the elements of a tile that exist to global memory.
  FLASHCUTE_DEVICE static void store(Element* tile, Element* to, int64_t row_stride, int rows, int columns) {
    auto const places = part(tile, thread_index());  // (COPY, COPY_rows, COPY_columns)
    CUTE_UNROLL
    for (int i = 0; i < row_passes; ++i, to += shape.rows_per_pass * row_stride) {
      CUTE_UNROLL
      for (int j = 0; j < column_passes; ++j) {
        if (i * shape.rows_per_pass + row() < rows && column() + j * columns_per_pass < columns) {
          global_store(to + j * columns_per_pass, shared_load<Word>(&places(0, i, j)));
        }
      }
    }
  }

  /// A thread's places in a tile: (COPY, COPY_rows, COPY_columns). They are those of partition_D of CuTe's tiled copy,
  /// which takes much longer to compile (tests/cpp/test_layout.cpp compares).
  FLASHCUTE_DEVICE static auto part(Element* tile, int thread) {
    using namespace cute;
    using Swizzle = typename Smem::Swizzle;
    constexpr int chunk = shape.chunk;
    int const row = thread / shape.threads_per_row, column = thread % shape.threads_per_row * shape.vector;
    if constexpr (shape.rows_per_pass % 8 == 0 && columns_per_pass == chunk) {
      // All passes are swizzled as the first is. Its place is computed in CuTe's steps: with other ones nvcc 13.0
      // spills up to 200 bytes more in the backward.
      using Passes = Layout<Shape<_1, Int<row_passes>, Int<column_passes>>,
                            Stride<_0, Int<shape.rows_per_pass * chunk>, Int<Smem::rows * chunk>>>;
      int const in_8_rows = column + row % 8 * chunk;
      return make_tensor(make_smem_ptr(tile) + (Swizzle::apply(in_8_rows) + row / 8 * (8 * chunk)), Passes{});
    } else {
      using Passes = Layout<
          Shape<_1, Int<row_passes>, Shape<Int<chunk / columns_per_pass>, Int<Smem::TileColumns::value / chunk>>>,
          Stride<_0, Int<shape.rows_per_pass * chunk>, Stride<Int<columns_per_pass>, Int<Smem::rows * chunk>>>>;
      return make_tensor(make_smem_ptr(tile),
                         ComposedLayout<Swizzle, int, Passes>{Swizzle{}, row * chunk + column, Passes{}});
    }
  }

 private:
  static constexpr int columns_per_pass = shape.threads_per_row * shape.vector;
  static constexpr int row_passes = Smem::rows / shape.rows_per_pass;
  static constexpr int column_passes = Smem::TileColumns::value / columns_per_pass;

  FLASHCUTE_DEVICE static int row() { return thread_index() / shape.threads_per_row; }
  FLASHCUTE_DEVICE static int column() { return thread_index() % shape.threads_per_row * shape.vector; }
};

template <ForwardConfig F>
class ForwardLoader {
  static constexpr TileConfig C = tile_of(F);
  using L = TileLayout<C>;
  using P = Products<C>;
  using Element = typename L::Element;
  using CopyQ = TileCopy<C, typename L::SmemQ>;
  using CopyK = TileCopy<C, typename L::SmemK>;
  using CopyV = TileCopy<C, typename L::SmemV>;

 public:
  /// Starts loading Q and, if blocks are to be loaded eagerly, what the last block of `range` has a place for.
  FLASHCUTE_DEVICE ForwardLoader(ForwardParams const& p, QueryTile const& tile, KvRange const& range,
                                 typename L::SharedStorage& smem)
      : p_(p), tile_(tile), smem_(smem), range_(range) {
    auto const q = CopyQ::first(static_cast<Element const*>(p.q) + tile.q_offset(p), p.q_stride.row);
    CopyQ::load(q, p.q_stride.row, tile.rows, p.head_dim, smem_.q, std_::true_type{});

    // Without blocks, and after the first, these point before the tensor, as a partial block's last rows point behind
    // it: addresses that are computed and never read.
    int64_t const last_row = range.first() * static_cast<int64_t>(C.block_n);
    k_ = CopyK::first(static_cast<Element const*>(p.k) + tile.k_offset(p) + last_row * p.k_stride.row, p.k_stride.row);
    v_ = CopyV::first(static_cast<Element const*>(p.v) + tile.v_offset(p) + last_row * p.v_stride.row, p.v_stride.row);
    if (F.eager_load_blocks && !range.empty()) {
      load_key(range.first(), std_::true_type{});
      if (C.stages > 1) load_value(range.first(), std_::true_type{});
    }
  }

  /// Q as the left operand of S = Q K^T. Unless it is to stay in registers, each product reads it from shared
  /// memory, after `key` has waited for it.
  FLASHCUTE_DEVICE auto query() {
    if constexpr (P::wants_finite) {
      return P::query({smem_.q, arrive_and_sync([&] { return CopyQ::is_finite(smem_.q); })});
    } else if constexpr (F.q_in_registers) {
      arrive_and_sync([] { return true; });  // Q has arrived
      return P::held_query(smem_.q);
    } else {
      return P::query(smem_.q);
    }
  }

  /// K(n) as the right operand of S = Q K^T.
  template <class Partial>
  FLASHCUTE_DEVICE auto key(int n, Partial partial) {
    // Lazily: K's place is free since all warps have passed `value`.
    if constexpr (!F.eager_load_blocks) load_key(n, partial);
    // K(n) (and Q; with two stages also V(n)) have arrived, and all warps have finished reading V(n + 1) (with two
    // stages all of block n + 1): its place may be refilled.
    bool const finite = arrive_and_sync(
        [&] { return CopyK::is_finite(key_place(n)) && (C.stages == 1 || CopyV::is_finite(value_place(n))); });
    if constexpr (C.stages > 1) {
      value_finite_ = finite;
      if (range_.left(n) > 1) {
        load_key(n + KvRange::step, partial);
        load_value(n + KvRange::step, partial);
      }
    } else if constexpr (F.eager_load_blocks) {
      load_value(n, partial);
    }
    return P::key(ArrivedTile<Element>{key_place(n), finite});
  }

  /// V(n) as the right operand of O += P V.
  template <class Partial>
  FLASHCUTE_DEVICE auto value(int n, Partial partial) {
    if constexpr (C.stages == 1) {
      // Lazily: V's place is free since all warps have passed `key`.
      if constexpr (!F.eager_load_blocks) load_value(n, partial);
      // V(n) has arrived, and all warps have finished reading K(n): its place may be refilled.
      value_finite_ = arrive_and_sync([&] { return CopyV::is_finite(value_place(n)); });
      if (F.eager_load_blocks && range_.left(n) > 1) load_key(n + KvRange::step, partial);
    }
    return P::value(ArrivedTile<Element>{value_place(n), value_finite_});
  }

  /// Replaces NaN and infinity in V(n) by 0. All threads of the block call it.
  FLASHCUTE_DEVICE void drop_nonfinite_values(int n) {
    constexpr int count = C.block_n * C.head_dim_v;
    if (P::wants_finite ? value_finite_ : block_all_finite<L::threads>(value_place(n), count)) return;
    dropped_ = true;
    zero_nonfinite<L::threads>(value_place(n), count);
    block_sync();  // the whole block is finite
  }

  /// Whether it found any so far; the same in all threads of the block.
  FLASHCUTE_DEVICE bool dropped_values() const { return dropped_; }

 private:
  /// This thread's copies have arrived; then all threads meet. If the products want to know, tells whether
  /// `is_finite`, of what this thread copied, holds for all of them.
  template <class IsFinite>
  FLASHCUTE_DEVICE static bool arrive_and_sync(IsFinite const& is_finite) {
    copies_wait();
    if constexpr (P::wants_finite) return !block_any(!is_finite());
    block_sync();
    return true;
  }

  FLASHCUTE_DEVICE Element* key_place(int n) const { return smem_.k[n % C.stages]; }
  FLASHCUTE_DEVICE Element* value_place(int n) const { return smem_.v[n % C.stages]; }

  // Blocks are loaded in the order of the range.
  template <class Partial>
  FLASHCUTE_DEVICE void load_key(int n, Partial partial) {
    CopyK::load(k_, p_.k_stride.row, tile_.sequence(p_).keys() - n * C.block_n, p_.head_dim, key_place(n), partial);
    k_ -= C.block_n * p_.k_stride.row;
  }

  template <class Partial>
  FLASHCUTE_DEVICE void load_value(int n, Partial partial) {
    CopyV::load(v_, p_.v_stride.row, tile_.sequence(p_).keys() - n * C.block_n, p_.head_dim_v, value_place(n), partial);
    v_ -= C.block_n * p_.v_stride.row;
  }

  ForwardParams const& p_;
  QueryTile const tile_;
  typename L::SharedStorage& smem_;
  Element const* k_;  // this thread's first element of the K block to load next
  Element const* v_;
  KvRange const range_;
  bool dropped_ = false;
  bool value_finite_ = true;  // V(n), once it has arrived
};

/// Stores a fragment of elements (MMA = (2, 2), MMA_M, MMA_N), whose columns WarpsN warps share, to a tile in shared
/// memory: each thread two neighbouring columns at a time.
template <TileConfig C, class Smem, int WarpsN = 1, class Fragment>
FLASHCUTE_DEVICE void stage_fragment(Fragment const& fragment, typename Smem::Element* tile) {
  using namespace cute;
  using L = TileLayout<C>;
  auto const first = L::template first_coordinate<WarpsN>(thread_index());
  Places<Smem> const places{tile, get<0>(first), get<1>(first)};
  auto const pairs = recast<uint_bit_t<16 * sizeof(typename Smem::Element)> const>(fragment);  // ((1, 2), MMA_M, MMA_N)
  CUTE_UNROLL
  for (int n = 0; n < size<2>(pairs); ++n) {
    CUTE_UNROLL
    for (int m = 0; m < size<1>(pairs); ++m) {
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        int const down = L::template row_distance<WarpsN>(2 * m + i);
        shared_store(places.at(down, L::template column_distance<WarpsN>(2 * n)), pairs(i, m, n));
      }
    }
  }
}

/// Rounds a fragment of sums and stores it likewise.
template <TileConfig C, class Smem, int WarpsN = 1, class Fragment>
FLASHCUTE_DEVICE void stage_tile(Fragment const& sums, typename Smem::Element* tile) {
  stage_fragment<C, Smem, WarpsN>(convert<typename Smem::Element>(sums), tile);
}

/// Rows of one head of a tensor.
template <class Element>
struct Rows {
  Element const* first;
  int64_t stride;

  FLASHCUTE_DEVICE static Rows of(void const* base, Strides const& stride, int batch, int head) {
    return {static_cast<Element const*>(base) + row_offset(stride, batch, head, 0), stride.row};
  }

  FLASHCUTE_DEVICE Element at(int row, int column) const { return global_load<Element>(first + row * stride + column); }
};

/// Adds to each element of a staged tile what its row sees, of the rows `others` of a tensor, that is not finite and
/// was therefore dropped from its product. Slow, and rare.
template <TileConfig C, class Smem, class Sees>
FLASHCUTE_DEVICE void add_dropped(Rows<typename Smem::Element> const& from, RowRange const& others, int rows,
                                  int columns, typename Smem::Element* tile, Sees const& sees) {
  using Element = typename Smem::Element;
  auto staged = cute::make_tensor(cute::make_smem_ptr(tile), typename Smem::Layout{});
  for (int i = thread_index(); i < rows * columns; i += TileLayout<C>::threads) {
    int const row = i / columns, column = i % columns;
    float sum = 0;
    for (int other = others.begin; other < others.end; ++other) {
      if (!sees(row, other)) continue;
      auto const x = static_cast<float>(from.at(other, column));
      if (!is_finite(x)) sum += x;
    }
    if (sum == 0) continue;
    auto const x = static_cast<float>(shared_load<Element>(&staged(row, column)));
    shared_store(&staged(row, column), static_cast<Element>(x + sum));
  }
}

/// Puts the output into shared memory, in Q's place.
template <TileConfig C, class Fragment>
FLASHCUTE_DEVICE void stage_output(Fragment const& o, typename TileLayout<C>::SharedStorage& smem) {
  // All warps have finished reading Q, and no copy into shared memory is under way.
  copies_wait();
  block_sync();
  stage_tile<C, typename TileLayout<C>::SmemO>(o, smem.q);
  block_sync();  // the whole tile is in shared memory
}

/// Writes it from there, copy_bytes a thread.
template <TileConfig C>
FLASHCUTE_DEVICE void store_output(ForwardParams const& p, QueryTile const& tile,
                                   typename TileLayout<C>::SharedStorage& smem) {
  using L = TileLayout<C>;
  using Copy = TileCopy<C, typename L::SmemO>;
  auto* const out = Copy::first(static_cast<typename L::Element*>(p.out) + tile.out_offset(p), p.out_stride.row);
  Copy::store(smem.q, out, p.out_stride.row, tile.rows, p.head_dim_v);
}

}  // namespace flashcute
