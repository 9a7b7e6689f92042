// Moves tiles between global and shared memory and owns all synchronisation of the main loop: the
// kernel asks for Q, K(n), V(n) in order, and what it gets is ready to multiply.
#pragma once

#include "flashcute/gemm.hpp"
#include "flashcute/mask.hpp"
#include "flashcute/nonfinite.hpp"

namespace flashcute {

template <ForwardConfig C>
class ForwardLoader {
  using L = ForwardLayout<C>;
  using Element = typename L::Element;

 public:
  /// Starts loading Q and the last K block of `range`.
  FLASHCUTE_DEVICE ForwardLoader(ForwardParams const& p, QueryTile const& tile, KvRange const& range,
                                 typename L::SharedStorage& smem)
      : p_(p), smem_(smem), begin_(range.begin) {
    auto const q = thread_pointer(p.q, tile.q_offset(p), p.q_stride.row);
    load(q, p.q_stride.row, tile.rows, typename L::SmemQ{}, smem_.q, std_::true_type{});

    int64_t const last_row = (range.end - 1) * static_cast<int64_t>(C.block_n);
    k_ = thread_pointer(p.k, tile.k_offset(p) + last_row * p.k_stride.row, p.k_stride.row);
    v_ = thread_pointer(p.v, tile.v_offset(p) + last_row * p.v_stride.row, p.v_stride.row);
    if (!range.empty()) load_block(k_, p_.k_stride.row, range.end - 1, smem_.k, std_::true_type{});
  }

  /// Q as the A operand of S = Q K^T. Unless it is to stay in registers, its fragments are fetched by each
  /// product, after `key` has waited for it.
  FLASHCUTE_DEVICE auto query() {
    typename L::TiledMma mma;
    auto const sQ = tensor(smem_.q, typename L::SmemQ{});                             // (M, D)
    auto const tSrQ = mma.get_thread_slice(thread_index()).partition_fragment_A(sQ);  // (MMA, MMA_M, MMA_D)
    auto q = shared_operand(tSrQ, cute::make_tiled_copy_A(typename L::LdmatrixAtom{}, mma), sQ, thread_index());
    if constexpr (C.q_in_registers) {
      arrive_and_sync();  // Q has arrived
      CUTE_UNROLL
      for (int k = 0; k < cute::size<2>(tSrQ); ++k) q.fetch(k);
      return RegisterOperand{q.fragment};
    } else {
      return q;
    }
  }

  /// K(n) as the B operand of S = Q K^T. Starts loading V(n).
  template <class Partial>
  FLASHCUTE_DEVICE auto key(int n, Partial partial) {
    // K(n) (and Q) have arrived, and all warps have finished reading V(n + 1): its buffer may be refilled.
    arrive_and_sync();
    load_block(v_, p_.v_stride.row, n, smem_.v, partial);
    auto const sK = tensor(smem_.k, typename L::SmemKV{});  // (N, D)
    return operand_b<typename L::LdmatrixAtom>(sK, sK);
  }

  /// V(n) as the B operand of O += P V. Starts loading K(n - 1).
  template <class Partial>
  FLASHCUTE_DEVICE auto value(int n, Partial partial) {
    // V(n) has arrived, and all warps have finished reading K(n): its buffer may be refilled.
    arrive_and_sync();
    if (n > begin_) load_block(k_, p_.k_stride.row, n - 1, smem_.k, partial);
    auto const sVt = tensor(smem_.v, typename L::SmemVt{});  // (D, N)
    auto const shape = tensor(smem_.v, cute::get_nonswizzle_portion(typename L::SmemVt{}));
    return operand_b<typename L::LdmatrixTransposedAtom>(sVt, shape);
  }

  /// Whether the V block that `value` gave holds no NaN and no infinity. All threads of the block call it.
  FLASHCUTE_DEVICE bool value_is_finite() const {
    return block_all_finite<L::threads>(smem_.v, C.block_n * C.head_dim);
  }

  /// Element (key, column) of that V block.
  FLASHCUTE_DEVICE uint32_t value_bits(int key, int column) const {
    return shared_load<uint16_t>(&tensor(smem_.v, typename L::SmemKV{})(key, column));
  }

  /// Replaces NaN and infinity in that V block by 0.
  FLASHCUTE_DEVICE void drop_nonfinite_values() {
    block_sync();  // no thread reads the values any more
    zero_nonfinite<L::threads>(smem_.v, C.block_n * C.head_dim);
    block_sync();  // the whole block is finite
  }

 private:
  // The copy: 8 threads cover the 64 columns of a chunk, 16 bytes each, so a pass covers rows_per_pass rows.
  static constexpr int rows_per_pass = 4 * C.num_warps;
  static constexpr int chunks = C.head_dim / 64;

  FLASHCUTE_DEVICE static int thread_row() { return thread_index() / 8; }
  FLASHCUTE_DEVICE static int thread_column() { return thread_index() % 8 * 8; }

  FLASHCUTE_DEVICE static Element const* thread_pointer(void const* base, int64_t offset, int64_t row_stride) {
    return static_cast<Element const*>(base) + offset + thread_row() * row_stride + thread_column();
  }

  template <class Layout>
  FLASHCUTE_DEVICE static auto tensor(Element* p, Layout const& layout) {
    return cute::make_tensor(cute::make_smem_ptr(p), layout);
  }

  template <class Atom, class Tile, class Shape>
  FLASHCUTE_DEVICE static auto operand_b(Tile const& tile, Shape const& shape) {
    typename L::TiledMma mma;
    auto const fragment = mma.get_thread_slice(thread_index()).partition_fragment_B(shape);  // (MMA, MMA_N, MMA_K)
    return shared_operand(fragment, cute::make_tiled_copy_B(Atom{}, mma), tile, thread_index());
  }

  FLASHCUTE_DEVICE static void arrive_and_sync() {
    copies_wait();
    block_sync();
  }

  /// Starts copying K/V block n, to which `from` points, and moves `from` to block n - 1.
  template <class Partial>
  FLASHCUTE_DEVICE void load_block(Element const*& from, int64_t row_stride, int n, Element* to, Partial partial) {
    load(from, row_stride, p_.seqlen_k - n * C.block_n, typename L::SmemKV{}, to, partial);
    from -= C.block_n * row_stride;
  }

  /// Starts copying a tile. Columns from head_dim on, and in a partial tile the rows from `rows` on, become
  /// zeros: nothing beyond the tensor is ever multiplied.
  template <class SmemLayout, class Partial>
  FLASHCUTE_DEVICE void load(Element const* from, int64_t row_stride, int rows, SmemLayout layout, Element* to,
                             Partial) const {
    using namespace cute;
    auto tXsX = typename L::GlobalLoad{}.get_thread_slice(thread_index()).partition_D(tensor(to, layout));
    // ^ (COPY, COPY_rows, COPY_D)
    CUTE_UNROLL
    for (int i = 0; i < size<1>(tXsX); ++i) {
      bool const row_exists = !Partial::value || i * rows_per_pass + thread_row() < rows;
      auto const tXgX = make_tensor(make_gmem_ptr(from), Layout<Shape<_8, Int<chunks>>, Stride<_1, _64>>{});
      CUTE_UNROLL
      for (int j = 0; j < chunks; ++j) {
        bool const exists = row_exists && thread_column() + j * 64 < p_.head_dim;
        copy(typename L::LoadAtom{}.with(exists), tXgX(_, j), tXsX(_, i, j));
      }
      from += rows_per_pass * row_stride;
    }
  }

  ForwardParams const& p_;
  typename L::SharedStorage& smem_;
  Element const* k_;  // this thread's first element of the K block to load next
  Element const* v_;
  int32_t begin_;
};

/// Writes the output tile through shared memory (in Q's place), 16 bytes a thread.
template <ForwardConfig C, class Fragment>
FLASHCUTE_DEVICE void store_output(Fragment const& o, ForwardParams const& p, QueryTile const& tile,
                                   typename ForwardLayout<C>::SharedStorage& smem) {
  using namespace cute;
  using L = ForwardLayout<C>;
  using Element = typename L::Element;
  // All warps have finished reading Q, and no copy into shared memory is under way.
  copies_wait();
  block_sync();

  auto const rO = convert<Element>(o);                                      // (MMA, MMA_M, MMA_D)
  auto const sO = make_tensor(make_smem_ptr(smem.q), typename L::SmemQ{});  // (M, D)
  auto const to_shared = make_tiled_copy_C(typename L::FragmentStoreAtom{}, typename L::TiledMma{});
  auto const shared_slice = to_shared.get_thread_slice(thread_index());
  auto tOsO = shared_slice.partition_D(sO);
  copy(to_shared, shared_slice.retile_S(rO), tOsO);
  block_sync();  // the whole tile is in shared memory

  auto const base = static_cast<Element*>(p.out) + tile.out_offset(p);
  auto const shape = product_each(sO.shape());
  auto const gO = make_tensor(make_gmem_ptr(base), shape, make_stride(p.out_stride.row, _1{}));  // (M, D)
  auto const slice = typename L::GlobalStore{}.get_thread_slice(thread_index());
  auto const from = slice.partition_S(sO);                        // (COPY, COPY_M, COPY_D)
  auto to = slice.partition_D(gO);                                // (COPY, COPY_M, COPY_D)
  auto const c = slice.partition_S(make_identity_tensor(shape));  // -> (row, column)
  CUTE_UNROLL
  for (int i = 0; i < size<1>(to); ++i) {
    CUTE_UNROLL
    for (int j = 0; j < size<2>(to); ++j) {
      if (get<0>(c(0, i, j)) < tile.rows && get<1>(c(0, i, j)) < p.head_dim) {
        copy(typename L::StoreAtom{}, from(_, i, j), to(_, i, j));
      }
    }
  }
}

}  // namespace flashcute
