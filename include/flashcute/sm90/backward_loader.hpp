// The warps that serve Hopper's gradients: one loads by TMA, one for each computing warpgroup adds its half of dQ to
// the sums, and one looks for NaN and infinity in partial blocks.
#pragma once

#include "flashcute/device/nonfinite.hpp"
#include "flashcute/sm90/dq_order.hpp"

namespace flashcute::sm90 {

/// The blocks of queries that pass a tile of keys.
template <BackwardKernelId Id>
struct PassingQueries {
  static constexpr BackwardConfig C = Id.config;
  using Mask = flashcute::Mask<Id.features.mask>;
  using Tile = KeyTile<typename Mask::Sequence>;

  FLASHCUTE_DEVICE static PassingBlocks of(BackwardParams const& p, Tile const& tile) {
    ForwardParams const& f = p.forward;
    int const group = f.heads / f.kv_heads;
    auto const range = Mask::query_range(tile, f, C.block_m);
    return PassingBlocks::of(range, tile.sequence(f).rows() / C.block_m, tile.kv_head * group, group);
  }

  /// Whether elements of the block have to be tested: also where keys are missing.
  FLASHCUTE_DEVICE static bool partial(PassingBlocks const& at, Tile const& tile) {
    return at.partial() || tile.rows < C.block_n;
  }
  /// Whether some of its rows see other keys of the tile than others do, so that its values are inspected.
  FLASHCUTE_DEVICE static bool inspected(PassingBlocks const& at) { return Mask::rows_differ && at.before_full(); }
};

/// Run by one lane of the loading warp.
template <BackwardKernelId Id>
class GradientLoader {
  static constexpr BackwardConfig C = Id.config;
  using Blocks = PassingQueries<Id>;
  using Tile = typename Blocks::Tile;
  using L = BackwardLayout<C>;
  using Storage = typename L::SharedStorage;
  using Workspace = GradientWorkspace<C>;

 public:
  FLASHCUTE_DEVICE static void run(Sm90BackwardParams const& p, Storage& smem, Tile const& tile) {
    GradientLoader loader{p, smem, tile};
    loader.load_keys(p.k, smem.k, smem.k_full);
    for (PassingBlocks at = Blocks::of(p.backward, tile); at.left > 0; at = at.after()) loader.load(at);
  }

 private:
  FLASHCUTE_DEVICE GradientLoader(Sm90BackwardParams const& p, Storage& smem, Tile const& tile)
      : p_(p), smem_(smem), tile_(tile) {
    prefetch(p.k);
    prefetch(p.q);
    prefetch(p.v);
    prefetch(p.dout);
  }

  FLASHCUTE_DEVICE void load_keys(TensorMap const& map, typename L::Element* to, Barrier& full) {
    barrier_arrive_expecting(full, L::k_elements * sizeof(typename L::Element));
    for (int column = 0; column < C.head_dim; column += L::page) {
      copy_box(map, column, tile_.row0, tile_.kv_head, tile_.entry.batch, to + C.block_n * column, full,
               L2Hint::evict_first);
    }
  }

  FLASHCUTE_DEVICE void load(PassingBlocks const& at) {
    int64_t const number = Workspace::number(p_.backward.forward, tile_.entry.batch, at.head, at.block);
    barrier_wait(smem_.q_empty[q_.place], q_.parity ^ 1);
    smem_.blocks[q_.place] = {at.block * C.block_m, at.head, Blocks::partial(at, tile_), at.left == 1};
    Barrier& q_full = Blocks::inspected(at) ? smem_.q_landed[q_landed_.place] : smem_.q_full[q_.place];
    load_queries(p_.q, at, smem_.q[q_.place], q_full);
    if (first_) {  // K and the first Q are enough to begin
      load_keys(p_.v, smem_.v, smem_.v_full);
      PassesInTurn<C>::await_before();  // which wrote LSE and delta
    }
    first_ = false;
    load_numbers(Workspace::lse(p_.backward, number), smem_.lse[q_.place], q_full);
    barrier_wait(smem_.dout_empty[dout_.place], dout_.parity ^ 1);
    Barrier& dout_full = Blocks::inspected(at) ? smem_.dout_landed[dout_landed_.place] : smem_.dout_full[dout_.place];
    load_queries(p_.dout, at, smem_.dout[dout_.place], dout_full);
    load_numbers(Workspace::delta(p_.backward, number), smem_.delta[dout_.place], dout_full);
    q_.advance();
    dout_.advance();
    if (Blocks::inspected(at)) {
      q_landed_.advance();
      dout_landed_.advance();
    }
  }

  /// A block of Q or dO. The barrier expects a number for each of its rows too.
  FLASHCUTE_DEVICE void load_queries(TensorMap const& map, PassingBlocks const& at, typename L::Element* to,
                                     Barrier& full) {
    barrier_arrive_expecting(full, L::q_elements * sizeof(typename L::Element) + bytes_of_numbers);
    for (int column = 0; column < C.head_dim; column += L::page) {
      copy_box(map, column, at.block * C.block_m, at.head, tile_.entry.batch, to + C.block_m * column, full,
               L2Hint::evict_last);
    }
  }

  static constexpr int bytes_of_numbers = C.block_m * sizeof(float);

  FLASHCUTE_DEVICE void load_numbers(float const* numbers, float* to, Barrier& full) {
    copy_bulk(numbers, to, bytes_of_numbers, full);
  }

  Sm90BackwardParams const& p_;
  Storage& smem_;
  Tile const& tile_;
  bool first_ = true;
  RingPosition<C.stages> q_, q_landed_;
  RingPosition<C.dout_stages> dout_, dout_landed_;
};

/// Run by a warp for each computing warpgroup: adds its half of each block's dQ to the sums.
template <BackwardKernelId Id>
class DqAdder {
  static constexpr BackwardConfig C = Id.config;
  using Blocks = PassingQueries<Id>;
  using Mask = typename Blocks::Mask;
  using Tile = typename Blocks::Tile;
  using L = BackwardLayout<C>;
  using Element = typename L::Element;
  using Storage = typename L::SharedStorage;
  using Workspace = GradientWorkspace<C>;

 public:
  FLASHCUTE_DEVICE static void run(BackwardParams const& p, Storage& smem, Tile const& tile, int warpgroup) {
    PassesInTurn<C>::await_before();  // which prepared the sums
    uint32_t parity = 0;
    int place = 0;  // of dS
    DqOrder<Id> order(p, tile, warpgroup);
    for (PassingBlocks at = Blocks::of(p, tile); at.left > 0; at = at.after(), parity ^= 1) {
      order.look_at(at);
      barrier_wait(smem.dq_full[warpgroup], parity);
      float* const sums = Workspace::sums(p, Workspace::number(p.forward, tile.entry.batch, at.head, at.block)) +
                          warpgroup * L::dq_floats;
      bool whole = true;
      if (Blocks::inspected(at)) {
        barrier_wait(smem.k_inspected, 0);
        whole = smem.keys_finite;
      }
      if (!whole) add_visible(p, smem, tile, at, place, warpgroup, sums, order);
      reconverge();
      if (elected_lane()) {
        barrier_arrive(smem.ds_empty[place]);
        if (whole) {
          order.await_turn();
          order.add(sums, smem.dq[warpgroup], L::dq_floats * sizeof(float));
          await_bulk_reads();
        }
        barrier_arrive(smem.dq_empty[warpgroup]);
        order.pass_on(whole);
      }
      if (++place == L::ds_places) place = 0;
    }
    order.finish();
  }

 private:
  /// dS K element by element, without what a query does not see: slow, but rare. A lane takes the elements that its
  /// number stands for in each warp of the warpgroup.
  FLASHCUTE_DEVICE static void add_visible(BackwardParams const& p, Storage& smem, Tile const& tile,
                                           PassingBlocks const& at, int place, int warpgroup, float* sums,
                                           DqOrder<Id> const& order) {
    order.await_turn();
    auto const sequence = tile.sequence(p.forward, at.head);
#pragma unroll 1
    for (int i = thread_index() % 32; i < L::dq_floats; i += 32) {
      int const thread = i / 4 % warpgroup_size, word = i / (4 * warpgroup_size);
      int query = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
      int column = word * 8 + 2 * (thread % 4) + i % 2;
      if (L::dq_by_rows) {
        query += warpgroup * warpgroup_rows;
      } else {
        column += warpgroup * L::dq_columns;
      }
      float sum = 0;
#pragma unroll 1
      for (int key = 0; key < C.block_n; ++key) {
        if (!Mask::visible(at.block * C.block_m + query, tile.row0 + key, sequence)) continue;
        sum += element(smem.ds[place], C.block_m, query, key) * element(smem.k, C.block_n, key, column);
      }
      order.add(sums + i, sum);
    }
  }

  /// Of a tile of `rows` rows in swizzled pages.
  FLASHCUTE_DEVICE static float element(Element const* tile, int rows, int row, int column) {
    int const piece = column % L::page / 8 ^ row % 8;
    return static_cast<float>(
        shared_load<Element>(tile + (column / L::page * rows + row) * L::page + piece * 8 + column % 8));
  }
};

/// Run by one warp, where queries see different keys: it looks for NaN and infinity in K, and in blocks of Q and dO of
/// which not every row sees all keys. There it replaces them by 0: a row that does not see a key would multiply it by
/// 0, and 0 * NaN is NaN. (What the row sees still becomes NaN: its LSE is not finite, of which `prepare` makes NaN, or
/// its delta is not.)
template <BackwardKernelId Id>
class GradientInspector {
  static constexpr BackwardConfig C = Id.config;
  using Blocks = PassingQueries<Id>;
  using Tile = typename Blocks::Tile;
  using L = BackwardLayout<C>;
  using Element = typename L::Element;
  using Storage = typename L::SharedStorage;

 public:
  FLASHCUTE_DEVICE static void run(BackwardParams const& p, Storage& smem, Tile const& tile) {
    GradientInspector inspector{smem};
    bool any = false;  // inspected blocks
    for (PassingBlocks at = Blocks::of(p, tile); at.left > 0; at = at.after()) {
      if (!Blocks::inspected(at)) {
        inspector.pass_over();
        continue;
      }
      inspector.inspect_block();
      if (!any) inspector.inspect_keys();
      any = true;
    }
  }

 private:
  FLASHCUTE_DEVICE explicit GradientInspector(Storage& smem) : smem_(smem) {}

  FLASHCUTE_DEVICE void pass_over() {
    q_.advance();
    dout_.advance();
  }

  FLASHCUTE_DEVICE void inspect_block() {
    inspect(smem_.q[q_.place], smem_.q_landed[q_landed_.place], q_landed_.parity, smem_.q_full[q_.place]);
    inspect(smem_.dout[dout_.place], smem_.dout_landed[dout_landed_.place], dout_landed_.parity,
            smem_.dout_full[dout_.place]);
    pass_over();
    q_landed_.advance();
    dout_landed_.advance();
  }

  FLASHCUTE_DEVICE void inspect(Element* block, Barrier& landed, uint32_t parity, Barrier& full) {
    barrier_wait(landed, parity);
    if (!finite(block, L::q_elements)) {
      smem_.dropped = true;
      for_each_part(block, L::q_elements, [](Element* words) { zero_nonfinite(words); });
      publish_to_products();
    }
    reconverge();  // one lane arrives for the warp: all its lanes have read and written the block
    if (thread_index() % 32 == 0) barrier_arrive(full);
  }

  FLASHCUTE_DEVICE void inspect_keys() {
    barrier_wait(smem_.k_full, 0);
    if (!finite(smem_.k, L::k_elements)) smem_.keys_finite = false;
    reconverge();
    if (thread_index() % 32 == 0) barrier_arrive(smem_.k_inspected);
  }

  FLASHCUTE_DEVICE static bool finite(Element* elements, int count) {
    FiniteCheck<Element> check;
    for_each_part(elements, count, [&](Element* words) { check.template look_at<16>(words); });
    return !warp_any(!check.all_finite());
  }

  /// Calls f(place) for each 16 bytes that are this lane's part.
  template <class F>
  FLASHCUTE_DEVICE static void for_each_part(Element* elements, int count, F const& f) {
    constexpr int vector = 16 / sizeof(Element);
#pragma unroll 4
    for (int i = vector * (thread_index() % 32); i < count; i += vector * 32) f(elements + i);
  }

  Storage& smem_;
  RingPosition<C.stages> q_, q_landed_;
  RingPosition<C.dout_stages> dout_, dout_landed_;
};

}  // namespace flashcute::sm90
