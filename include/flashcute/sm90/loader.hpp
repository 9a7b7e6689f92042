// The loading warp: copies tiles from global to shared memory by TMA and tells the inspecting warps and the consumer
// warpgroups, through mbarriers, what has arrived.
#pragma once

#include "flashcute/sm90/pipeline.hpp"

namespace flashcute::sm90 {

/// Run by one lane of the loading warp. Loops over warpgroups that wait are not unrolled: beside wide heads the lane
/// has 24 registers, and nvcc 13.0 would spill what it computes for one warpgroup while it waits for another.
template <ForwardConfig C, class Mask>
class Loader {
  using Range = typename Mask::Range;
  using Tile = QueryTile<typename Mask::Sequence>;
  using L = ForwardLayout<C, Mask>;
  using Storage = typename L::SharedStorage;
  static constexpr bool inspected = Mask::rows_differ;

 public:
  FLASHCUTE_DEVICE Loader(Sm90ForwardParams const& p, Storage& smem)
      : p_(p), smem_(smem), rank_(C.cluster > 1 ? rank_in_cluster() : 0) {
    prefetch(p.q);
    prefetch(p.k);
    prefetch(p.v);
  }

  /// Loads a tile's Q, K and V in the order in which they are needed: V(n) comes after the K that follows K(n), which
  /// may be the next tile's first.
  FLASHCUTE_DEVICE void load(Tile const& tile, Range const& range) {
    prefetch_queries(tile);
    for (int n = range.first(); range.left(n) > 0; n += Range::step) load_block(tile, range, n);
  }

  /// Brings Q to the level 2 cache, long before its buffer is free.
  FLASHCUTE_DEVICE void prefetch_queries(Tile const& tile) const {
    for (int w = 0; w < L::warpgroups; ++w) {
      int const row = tile.entry.first_query + rows_of(tile, w).row0;
      for_each_page<C.head_dim>([&](int column) { prefetch_box(p_.q, column, row, tile.head, tile.entry.batch); });
    }
  }

  /// Block `n` of a tile, and the V before it; with the first block of a tile also its Q.
  FLASHCUTE_DEVICE void load_block(Tile const& tile, Range const& range, int n) {
    load_key(tile, n, [](int) {});
    load_value_left();
    if (n == range.first()) announce(tile, range);
    // Spelled out: with `is_partial` alone nvcc 13.0 makes other code of masks with one edge.
    left_ = {tile, n, n >= range.full_end || (Mask::two_edges && range.is_partial(n))};
  }

  /// The blocks of a page that a tile visits under a map, from the last to the first, each as load_block.
  FLASHCUTE_DEVICE void load_page(Found<Mask> const& page) {
    Tile const tile = page.tile;
    int const first_block = page.page * MapPages::blocks_of_page;
    bool is_first = page.first;
    bool const is_last = page.last;
    if (is_first) prefetch_queries(tile);
    for (MapPages::Page rest = page.blocks; rest.visited != 0;) {
      MapBlock const block = rest.take_last();
      int const number = first_block + block.number;
      load_key(tile, number, [&](int stage) {
        smem_.key_blocks.of_stage[stage] = {number, rest.full_at_end(), block.partial, is_last && rest.visited == 0};
      });
      load_value_left();
      if (is_first) announce(tile, page.seen);
      is_first = false;
      left_ = {tile, number, block.partial};
    }
  }

  /// Announces a tile that sees no key, after all that was loaded before.
  FLASHCUTE_DEVICE void pass_over(Tile const& tile) {
    load_value_left();
    left_.n = -1;
#pragma unroll 1
    for (int w = 0; w < L::warpgroups; ++w) {
      work(w) = {.rows = rows_of(tile, w), .range = {}, .loaded = {}, .exists = true, .attends = false};
      await_place_for_query(w);
      barrier_arrive(smem_.q_full[w]);
    }
    ++tile_;
  }

  /// Loads the last V and announces that there are no more tiles.
  FLASHCUTE_DEVICE void finish() {
    load_value_left();
#pragma unroll 1
    for (int w = 0; w < L::warpgroups; ++w) {
      await_place_for_query(w);
      work(w).exists = work(w).attends = false;
      barrier_arrive(smem_.q_full[w]);
    }
    if constexpr (inspected) {
      await_place_for_value();  // then an inspection slot is free too
      smem_.inspections[inspection_.place].place = -1;
      barrier_arrive(smem_.v_landed[inspection_.place]);
    }
  }

 private:
  /// Announces the tile to the warpgroups and loads its Q.
  template <class Seen>
  FLASHCUTE_DEVICE void announce(Tile const& tile, Seen const& seen) {
    smem_.dropped[tile_ % L::tiles] = false;
    // The parts of all first: the announcement to a warpgroup waits for those before it.
#pragma unroll 1
    for (int w = 0; w < L::warpgroups; ++w) work(w) = part(tile, seen, w);
#pragma unroll 1
    for (int w = 0; w < L::warpgroups; ++w) {
      int const row = tile.entry.first_query + rows_of(tile, w).row0;
      auto* const q = smem_.q[w];
      Barrier& full = smem_.q_full[w];
      await_place_for_query(w);
      expect_tile<warpgroup_rows, C.head_dim>(full);
      for_each_page<C.head_dim>([&](int column) {
        copy_box(p_.q, column, row, tile.head, tile.entry.batch, q + warpgroup_rows * column, full,
                 L2Hint::evict_first);
      });
    }
    ++tile_;
  }

  FLASHCUTE_DEVICE Work<Mask>& work(int warpgroup) { return smem_.work[tile_ % L::tiles][warpgroup]; }

  FLASHCUTE_DEVICE void await_place_for_query(int warpgroup) { barrier_wait(smem_.q_empty[warpgroup], tile_ % 2 ^ 1); }

  /// A warpgroup's rows of a tile. Under a mask some parts of a tile are less work, so the parts rotate among the
  /// warpgroups.
  FLASHCUTE_DEVICE Tile rows_of(Tile const& tile, int warpgroup) const {
    auto const turn = static_cast<uint32_t>(rank_ * L::warpgroups + warpgroup) + tile_;
    return tile.part_from_end(static_cast<int>(turn % (L::warpgroups * C.cluster)), warpgroup_rows);
  }

  /// A warpgroup's rows, and all keys that the tile sees.
  template <class Seen>
  FLASHCUTE_DEVICE Work<Mask> all_of(Tile const& tile, Seen const& seen, int warpgroup) const {
    Tile const rows = rows_of(tile, warpgroup);
    return {.rows = rows, .range = seen, .loaded = seen, .exists = true, .attends = rows.rows > 0};
  }

  template <class Seen>
  FLASHCUTE_DEVICE Work<Mask> part(Tile const& tile, Seen const& seen, int warpgroup) const {
    if constexpr (!Range::contiguous) {  // all warpgroups take all blocks
      return all_of(tile, seen, warpgroup);
    } else {
      return part_of_range(tile, seen, warpgroup);
    }
  }

  FLASHCUTE_DEVICE Work<Mask> part_of_range(Tile const& tile, Range const& range, int warpgroup) const {
    Work<Mask> part = all_of(tile, range, warpgroup);
    if (inspected && part.rows.rows > 0) {
      part.range = Mask::kv_range(part.rows, p_.forward, C.block_n);
      if constexpr (Mask::two_edges) {
        // A warpgroup passes over blocks after its own, and over some before those of the next tile, while its last V
        // still occupies a stage. The K after n such blocks comes after the V of n - 1 of them. With turns one more:
        // its turn for that K comes after that of the warpgroup before, which first waits for the V of the block
        // before.
        constexpr int most = C.pingpong ? C.stages - 1 : C.stages, after = most / 2, before = most - after;
        if (part.range.empty()) part.range = range;  // at least one block, so that all warpgroups run the same loop
        part.range.end = max_of(part.range.end, range.end - before);
        part.range.begin = min_of(min_of(part.range.begin, range.begin + after), part.range.end - 1);
      } else {
        // At least one block, so that all warpgroups run the same loop. And a warpgroup skips at most stages - 1
        // blocks, the stages that are free while the last V of the tile before still occupies one.
        part.range.end = max_of(max_of(part.range.end, range.begin + 1), range.end - (C.stages - 1));
      }
    }
    return part;
  }

  FLASHCUTE_DEVICE void load_value_left() {
    if (left_.n >= 0) load_value(left_.tile, left_.n, left_.partial);
  }

  /// `tell(stage)`: what the warpgroups have to know before K arrives.
  template <class Tell>
  FLASHCUTE_DEVICE void load_key(Tile const& tile, int n, Tell const& tell) {
    barrier_wait(smem_.k_empty[k_.place], k_.parity ^ 1);
    tell(k_.place);
    load_block<C.head_dim>(p_.k, n, tile, smem_.k[k_.place], smem_.k_full[k_.place]);
    k_.advance();
  }

  FLASHCUTE_DEVICE void load_value(Tile const& tile, int n, bool partial) {
    await_place_for_value();
    Barrier* landed = &smem_.v_full[v_.place];
    if constexpr (inspected) {
      if (partial) {
        smem_.inspections[inspection_.place] = {v_.place, static_cast<int>((tile_ - 1) % L::tiles)};
        landed = &smem_.v_landed[inspection_.place];
        inspection_.advance();
      } else {
        // In place of the inspecting warps. (load_block arrives once more.)
        barrier_arrive(*landed, L::inspecting_warps - 1);
      }
    }
    load_block<C.head_dim_v>(p_.v, n, tile, smem_.v[v_.place], *landed);
    v_.advance();
  }

  FLASHCUTE_DEVICE void await_place_for_value() { barrier_wait(smem_.v_empty[v_.place], v_.parity ^ 1); }

  /// Loads block `n` of K or V. In a cluster each thread block loads its share of the keys for all.
  template <int Columns>
  FLASHCUTE_DEVICE void load_block(TensorMap const& map, int n, Tile const& tile, typename L::Element* place,
                                   Barrier& full) {
    expect_tile<C.block_n, Columns>(full);
    int const first = rank_ * L::keys_per_load;
    for_each_page<Columns>([&](int column) {
      auto* const to = place + C.block_n * column + first * L::template page<Columns>;
      int const key = tile.entry.first_key + n * C.block_n + first;
      if constexpr (C.cluster > 1) {
        copy_box_to_all(map, column, key, tile.kv_head, tile.entry.batch, to, full, L2Hint::evict_last, C.cluster);
      } else {
        copy_box(map, column, key, tile.kv_head, tile.entry.batch, to, full, L2Hint::evict_last);
      }
    });
  }

  template <int Rows, int Columns>
  FLASHCUTE_DEVICE static void expect_tile(Barrier& full) {
    barrier_arrive_expecting(full, Rows * Columns * static_cast<int>(sizeof(typename L::Element)));
  }

  template <int Columns, class F>
  FLASHCUTE_DEVICE static void for_each_page(F const& f) {
    CUTE_UNROLL
    for (int column = 0; column < Columns; column += L::template page<Columns>) f(column);
  }

  Sm90ForwardParams const& p_;
  Storage& smem_;
  int const rank_;  // of the thread block in its cluster
  RingPosition<C.stages> k_, v_;
  RingPosition<C.stages> inspection_;  // as many slots as V has stages: when a stage is free, so is a slot
  uint32_t tile_ = 0;
  struct {
    Tile tile;
    int n;
    bool partial;
  } left_ = {{}, -1, false};  // the V to load next
};

}  // namespace flashcute::sm90
