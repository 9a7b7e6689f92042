// Loads Q, K and V into shared memory and owns all synchronisation of the forward's main loop: the kernel asks for Q,
// K(n), V(n) in order, and what it gets is ready to multiply.
#pragma once

#include "flashcute/policy/mask.hpp"
#include "flashcute/sm80/copy.hpp"
#include "flashcute/sm80/cuda_core.hpp"
#include "flashcute/sm80/tf32x3.hpp"

namespace flashcute {

template <ForwardConfig F, class Mask>
class ForwardLoader {
  using Range = typename Mask::Range;
  using Tile = QueryTile<typename Mask::Sequence>;
  static constexpr TileConfig C = tile_of(F);
  using L = TileLayout<C>;
  using P = Products<C>;
  using Element = typename L::Element;
  using CopyQ = TileCopy<C, typename L::SmemQ>;
  using CopyK = TileCopy<C, typename L::SmemK>;
  using CopyV = TileCopy<C, typename L::SmemV>;

 public:
  /// Starts loading Q and, with eager_load_blocks, the last block of `range`: K, and with two stages also V.
  FLASHCUTE_DEVICE ForwardLoader(ForwardParams const& p, Tile const& tile, Range const& range,
                                 typename L::SharedStorage& smem)
      : p_(p), tile_(tile), smem_(smem), range_(range) {
    auto const q = CopyQ::first(static_cast<Element const*>(p.q) + tile.q_offset(p), p.q_stride.row);
    CopyQ::load(q, p.q_stride.row, tile.existing(p), p.head_dim, smem_.q, std_::true_type{});

    // If the range is empty, and after its first block, these may point outside the tensor, as the last rows of a
    // partial block do: such addresses are computed but never read.
    int64_t const last_row = Range::contiguous ? range.first() * static_cast<int64_t>(C.block_n) : 0;
    k_ = CopyK::first(static_cast<Element const*>(p.k) + tile.k_offset(p) + last_row * p.k_stride.row, p.k_stride.row);
    v_ = CopyV::first(static_cast<Element const*>(p.v) + tile.v_offset(p) + last_row * p.v_stride.row, p.v_stride.row);
    if (F.eager_load_blocks && !range.empty()) {
      load_key(range.first(), std_::true_type{}, 1);
      if (C.stages > 1) load_value(range.first(), std_::true_type{}, 1);
    }
  }

  /// Q as the left operand of S = Q K^T. Without q_in_registers each product reads it from shared memory, after `key`
  /// has waited for it.
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
    if constexpr (!Range::contiguous) ++visit_;
    // Lazily: K's buffer is free since all warps have passed `value`.
    if constexpr (!F.eager_load_blocks) load_key(n, partial);
    // K(n) (and Q; with two stages also V(n)) have arrived, and all warps have finished reading V(n + 1) (with two
    // stages all of block n + 1): its buffer may be refilled.
    bool const finite = arrive_and_sync(
        [&] { return CopyK::is_finite(key_place(n)) && (C.stages == 1 || CopyV::is_finite(value_place(n))); });
    if constexpr (C.stages > 1) {
      value_finite_ = finite;
      if (range_.left(n) > 1) {
        load_key(Range::contiguous ? n + Range::step : range_.next(n), partial, 1);
        load_value(Range::contiguous ? n + Range::step : range_.next(n), partial, 1);
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
      // Lazily: V's buffer is free since all warps have passed `key`.
      if constexpr (!F.eager_load_blocks) load_value(n, partial);
      // V(n) has arrived, and all warps have finished reading K(n): its buffer may be refilled.
      value_finite_ = arrive_and_sync([&] { return CopyV::is_finite(value_place(n)); });
      if (F.eager_load_blocks && range_.left(n) > 1)
        load_key(Range::contiguous ? n + Range::step : range_.next(n), partial, 1);
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

  /// Whether any value was replaced so far; the same in all threads of the block.
  FLASHCUTE_DEVICE bool dropped_values() const { return dropped_; }

 private:
  /// Waits for this thread's copies, then for all threads of the block. If the products need to know, returns whether
  /// `is_finite`, of what each thread copied, holds in all threads.
  template <class IsFinite>
  FLASHCUTE_DEVICE static bool arrive_and_sync(IsFinite const& is_finite) {
    copies_wait();
    if constexpr (P::wants_finite) return !block_any(!is_finite());
    block_sync();
    return true;
  }

  // Of block n, which is the current one or, with `ahead` 1, the next. Neighbours have different places; blocks that do
  // not follow each other are counted.
  FLASHCUTE_DEVICE int place(int n, int ahead) const { return (Range::contiguous ? n : visit_ + ahead) % C.stages; }
  FLASHCUTE_DEVICE Element* key_place(int n, int ahead = 0) const { return smem_.k[place(n, ahead)]; }
  FLASHCUTE_DEVICE Element* value_place(int n, int ahead = 0) const { return smem_.v[place(n, ahead)]; }

  // Called for the blocks in the order of the range.
  template <class Partial>
  FLASHCUTE_DEVICE void load_key(int n, Partial partial, int ahead = 0) {
    CopyK::load(at_block(k_, n, p_.k_stride), p_.k_stride.row, tile_.sequence(p_).keys() - n * C.block_n, p_.head_dim,
                key_place(n, ahead), partial);
    if constexpr (Range::contiguous) k_ -= C.block_n * p_.k_stride.row;
  }

  template <class Partial>
  FLASHCUTE_DEVICE void load_value(int n, Partial partial, int ahead = 0) {
    CopyV::load(at_block(v_, n, p_.v_stride), p_.v_stride.row, tile_.sequence(p_).keys() - n * C.block_n, p_.head_dim_v,
                value_place(n, ahead), partial);
    if constexpr (Range::contiguous) v_ -= C.block_n * p_.v_stride.row;
  }

  /// Where the copies of block n begin: there already, or counted from the first block if they do not follow each
  /// other.
  FLASHCUTE_DEVICE static Element const* at_block(Element const* place, int n, Strides const& stride) {
    return Range::contiguous ? place : place + n * (C.block_n * stride.row);
  }

  ForwardParams const& p_;
  Tile const tile_;
  typename L::SharedStorage& smem_;
  Element const* k_;  // this thread's first element of the K block to load next, or of block 0
  Element const* v_;
  std_::conditional_t<Range::contiguous, Range const, Range const&> range_;  // a map keeps what it has read
  int visit_ = -1;  // how many blocks came before; only of blocks that do not follow each other
  bool dropped_ = false;
  bool value_finite_ = true;  // whether V(n), once it has arrived, is finite
};

}  // namespace flashcute
