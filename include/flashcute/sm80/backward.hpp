// The backward pass on tensor cores (cp.async, ldmatrix, mma.sync). Nothing of the size of the scores is stored: P is
// recomputed from the LSE.
//
//     P = exp(scale Q K^T - LSE)     dS = P * (dO V^T - delta)     delta = rowsum(dO * O) - dLSE
//     dQ = scale dS K                dK = scale dS^T Q             dV = P^T dO
//
// A thread block owns a tile of rows: of keys, for dK and dV, or of queries, for dQ. Its rows of X (K, or Q) and Y (V,
// or dO) stay in shared memory; its loop loads blocks of the other side, B_X (Q, or K) and B_Y (dO, or V), one after
// the other:
//
//     S = X B_X^T,   dP = Y B_Y^T,   dX += dS B_X,   dY += P B_Y (of keys only)
//
// P and dS go from product to product in registers, or through shared memory where several warps share the columns of
// S. There are two algorithms. The passes `queries` and `keys` take seven products; one thread block sums every element
// of a gradient in one order. The pass `gradients` takes five: tiles of keys also add dS X, with dS from shared memory,
// to the dQ of the queries in each block. Source: Dao, "FlashAttention-2", arXiv 2307.08691, algorithm 2; `queries`
// exchanges its loops.
#pragma once

#include "flashcute/core/constants.hpp"
#include "flashcute/device/apply.hpp"
#include "flashcute/device/delta.hpp"
#include "flashcute/sm80/dq_sums.hpp"

namespace flashcute {

/// Tiles of scores that go through shared memory.
template <class Element, int Count, int Size>
struct ScoreTiles {
  alignas(128) Element tile[Count][Size];
};

template <class Element, int Size>
struct ScoreTiles<Element, 0, Size> {};

template <BackwardKernelId Id>
struct TileGradients {
  static_assert(has_only<&Features::mask>(Id.features), FLASHCUTE_UNKNOWN_FEATURE);
  static constexpr BackwardPass pass = Id.pass;
  static constexpr TileConfig C = tile_of(Id.config, pass);
  static constexpr bool keys_stay = flashcute::keys_stay(pass);
  static constexpr bool adds_dq = pass == BackwardPass::gradients;
  static constexpr bool stores_p = flashcute::stores_p(Id.config, pass);
  static constexpr bool stores_ds = flashcute::stores_ds(Id.config, pass);
  static constexpr int column_warps = Id.config.column_warps;
  /// Whether dS is computed from P in float32, not from the 16 bits that the product takes. Not where those stay in
  /// registers until that product: P would be there twice.
  static constexpr bool keeps_float32 = !keys_stay || stores_p;
  /// Whether the next block's copies are started between the products, not before them: computing their addresses then
  /// spills no registers, unless P and dS are in registers too.
  static constexpr bool loads_late = column_warps > 1;
  using L = TileLayout<C>;
  using P = TileProducts<C, column_warps>;
  using Mask = flashcute::Mask<Id.features.mask>;
  using Sums = QueryGradientSums<Id.config>;
  using Element = typename L::Element;
  using Rows = flashcute::Rows<Element>;
  using Sequence = typename Mask::Sequence;
  using Passing = typename Mask::Passing;
  using Tile = std_::conditional_t<keys_stay, KeyTile<Sequence>, QueryTile<Sequence>>;
  using SmemX = typename L::SmemQ;
  using SmemY = typename L::SmemO;
  using SmemBlockX = typename L::SmemK;
  using SmemBlockY = typename L::SmemV;
  using SmemScores = typename L::template Smem<typename L::BlockM, typename L::BlockN>;

  /// The LSE and delta of each query.
  template <int Queries>
  struct Statistics {
    alignas(16) float lse[Queries];
    alignas(16) float delta[Queries];
  };

  struct SharedStorage : ScoreTiles<Element, stores_p + stores_ds, C.block_m * C.block_n> {
    alignas(128) Element x[C.block_m * C.head_dim];
    alignas(128) Element y[C.block_m * C.head_dim_v];
    alignas(128) Element block_x[C.stages][C.block_n * C.head_dim];
    alignas(128) Element block_y[C.stages][C.block_n * C.head_dim_v];
    Statistics<keys_stay ? C.block_n : C.block_m> queries[keys_stay ? C.stages : 1];
  };
  static_assert(sizeof(SharedStorage) == smem_bytes(Id));
  // (Compute capabilities below 9.0 are checked as 9.0: one image runs on GPUs with different limits of shared memory,
  // which the host checks for the actual one.)
#define FLASHCUTE_RULE(id, sentence) \
  static_assert(check(Id.config, max_of(compiled_arch, 90)) != BackwardConfigError::id, sentence);
  FLASHCUTE_BACKWARD_CONFIG_RULES(FLASHCUTE_RULE)
#undef FLASHCUTE_RULE

  FLASHCUTE_DEVICE static void run(BackwardParams const& p, SharedStorage& smem) {
    if constexpr (keys_stay) {
      run_keys(p, smem);
    } else {
      run_queries(p, smem);
    }
  }

 private:
  /// delta and dQ.
  FLASHCUTE_DEVICE static void run_queries(BackwardParams const& p, SharedStorage& smem) {
    ForwardParams const& f = p.forward;
    auto const tile = Tile::at(f, block_index(), C.block_m);
    if (!Sequence::fills_tensors && tile.rows == 0) return;  // a slot that no sequence needs
    int const existing = tile.existing(f);
    load<SmemX>(queries(f.q, f.q_stride, tile, tile.head), tile.row0, existing, f.head_dim, smem.x);
    load<SmemY>(queries(p.dout, p.dout_stride, tile, tile.head), tile.row0, existing, f.head_dim_v, smem.y);
    prepare_statistics(p, tile, smem);

    auto const range = Mask::kv_range(tile, f, C.block_n);
    TileGradients gradients{p, smem, tile};
    gradients.add_all(Passing::of(range, tile.kv_head));
    gradients.stage_results();
    auto const looked_at = range.keys(!P::wants_finite, C.block_n, tile.sequence(f));
    gradients.add_dropped(tile.kv_head, 1, looked_at, tile.rows);
    int const first = tile.entry.first_query + tile.row0;
    store<SmemX>(smem.x, p.dq, p.dq_stride, tile.entry.batch, tile.head, first, tile.rows, f.head_dim);
  }

  /// dK and dV, summed over the query heads of the group.
  FLASHCUTE_DEVICE static void run_keys(BackwardParams const& p, SharedStorage& smem) {
    ForwardParams const& f = p.forward;
    auto const tile = Tile::at(f, block_index(), C.block_m);
    if (!Sequence::fills_tensors && tile.rows == 0) return;  // a slot that no sequence needs
    int const existing = tile.existing(f);
    load<SmemX>(keys(f.k, f.k_stride, tile, tile.kv_head), tile.row0, existing, f.head_dim, smem.x);
    load<SmemY>(keys(f.v, f.v_stride, tile, tile.kv_head), tile.row0, existing, f.head_dim_v, smem.y);

    auto const range = Mask::query_range(tile, f, C.block_n);
    int const group = f.heads / f.kv_heads, first_head = tile.kv_head * group;
    TileGradients gradients{p, smem, tile};
    int const complete = tile.sequence(f).rows() / C.block_n;
    gradients.add_all(Passing::of(range, complete, first_head, group));
    gradients.stage_results();
    auto const looked_at = range.rows(!P::wants_finite, C.block_n, tile.sequence(f));
    gradients.add_dropped(first_head, group, looked_at, tile.rows);
    int const first = tile.entry.first_key + tile.row0;
    store<SmemX>(smem.x, p.dk, p.dk_stride, tile.entry.batch, tile.kv_head, first, tile.rows, f.head_dim);
    store<SmemY>(smem.y, p.dv, p.dv_stride, tile.entry.batch, tile.kv_head, first, tile.rows, f.head_dim_v);
  }

  FLASHCUTE_DEVICE TileGradients(BackwardParams const& p, SharedStorage& smem, Tile const& tile)
      : p_(p), smem_(smem), tile_(tile) {}

  FLASHCUTE_DEVICE Sequence sequence() const { return tile_.sequence(p_.forward); }
  /// As a query head sees it; where queries stay, as that of the tile does.
  FLASHCUTE_DEVICE Sequence sequence(int head) const {
    if constexpr (keys_stay) {
      return tile_.sequence(p_.forward, head);
    } else {
      return tile_.sequence(p_.forward);
    }
  }

  // ---- the main loop ---------------------------------------------------------------------------------

  FLASHCUTE_DEVICE void add_all(Passing blocks) {
    if (blocks.left > 0) load_block(blocks);
    for (bool first = true; blocks.left > 0; blocks = blocks.after(), first = false) {
      bool const finite = arrive_and_sync(stage_of(blocks), first);
      if constexpr (C.stages > 1 && !loads_late) load_next(blocks);
      if (blocks.partial()) {
        add_block(blocks, finite, std_::true_type{});
      } else {
        add_block(blocks, finite, std_::false_type{});
      }
    }
  }

  /// Waits until a block has arrived (before the first one X and Y too) and all warps have finished with the block
  /// before. If the products need to know, returns whether all of it is finite.
  FLASHCUTE_DEVICE bool arrive_and_sync(int stage, bool first) {
    copies_wait();
    if constexpr (P::wants_finite) {
      if (first) tile_finite_ = TileCopy<C, SmemX>::is_finite(smem_.x) && TileCopy<C, SmemY>::is_finite(smem_.y);
      bool const finite = TileCopy<C, SmemBlockX>::is_finite(smem_.block_x[stage]) &&
                          TileCopy<C, SmemBlockY>::is_finite(smem_.block_y[stage]);
      return !block_any(!(finite && tile_finite_));
    }
    block_sync();
    return true;
  }

  FLASHCUTE_DEVICE void load_next(Passing const& blocks) {
    if (blocks.left > 1) load_block(blocks.after());
  }

  /// Starts loading the rows of a block that exist; the others become zeros, which add nothing. Called for the blocks
  /// in order.
  FLASHCUTE_DEVICE void load_block(Passing const& at) {
    ForwardParams const& f = p_.forward;
    int64_t const x_stride = keys_stay ? f.q_stride.row : f.k_stride.row;
    int64_t const y_stride = keys_stay ? p_.dout_stride.row : f.v_stride.row;
    int const row0 = at.block * C.block_n, rows = (keys_stay ? sequence().rows() : sequence().keys()) - row0;
    if (at.starts_anew()) {
      Rows const x = keys_stay ? queries(f.q, f.q_stride, tile_, at.head) : keys(f.k, f.k_stride, tile_, at.head);
      Rows const y =
          keys_stay ? queries(p_.dout, p_.dout_stride, tile_, at.head) : keys(f.v, f.v_stride, tile_, at.head);
      next_x_ = TileCopy<C, SmemBlockX>::first(x.first + row0 * x_stride, x_stride);
      next_y_ = TileCopy<C, SmemBlockY>::first(y.first + row0 * y_stride, y_stride);
    }
    int const stage = stage_of(at);
    auto const copy = [&](auto partial) {
      TileCopy<C, SmemBlockX>::load(next_x_, x_stride, rows, f.head_dim, smem_.block_x[stage], partial);
      TileCopy<C, SmemBlockY>::load(next_y_, y_stride, rows, f.head_dim_v, smem_.block_y[stage], partial);
    };
    if (rows < C.block_n) {
      copy(std_::true_type{});
    } else {
      copy(std_::false_type{});
    }
    if constexpr (keys_stay) load_statistics(at.head, row0, rows, smem_.queries[stage]);
    next_x_ += C.block_n * x_stride;
    next_y_ += C.block_n * y_stride;
  }

  FLASHCUTE_DEVICE static int stage_of(Passing const& at) { return at.stage(C.stages); }

  /// dX and dY of a block, and its dQ.
  template <class Partial>
  FLASHCUTE_DEVICE void add_block(Passing const& at, bool arrived_finite, Partial) {
    int const stage = stage_of(at), block_row0 = at.block * C.block_n;
    auto s = L::template accumulator<typename L::BlockM, typename L::BlockN, column_warps>();  // (MMA, MMA_M, MMA_N)
    multiply_rows<SmemX, SmemBlockX>(s, smem_.x, smem_.block_x[stage], arrived_finite);
    to_probabilities<Partial::value>(s, block_row0, at.head, stage);
    if constexpr (keeps_float32) hold_at_one<float>(s);
    auto probabilities = convert<typename L::Operand>(s);
    if constexpr (!keeps_float32) hold_at_one<Element>(probabilities);
    if constexpr (stores_p) stage_fragment<C, SmemScores, column_warps>(probabilities, p_tile());

    auto ds = L::template accumulator<typename L::BlockM, typename L::BlockN, column_warps>();  // (MMA, MMA_M, MMA_N)
    multiply_rows<SmemY, SmemBlockY>(ds, smem_.y, smem_.block_y[stage], arrived_finite);
    if constexpr (C.stages > 1 && loads_late) load_next(at);
    if constexpr (keeps_float32) {
      to_score_gradients<Partial::value>(ds, s, block_row0, at.head, stage);
    } else {
      to_score_gradients<Partial::value>(ds, probabilities, block_row0, at.head, stage);
    }
    auto const score_gradients = convert<typename L::Operand>(ds);
    if constexpr (stores_ds) stage_fragment<C, SmemScores, column_warps>(score_gradients, ds_tile());

    // (In a block that is partial only because rows of queries are missing, all rows see the same keys. Where keys are
    // hidden on both sides, the blocks at the end may be partial for either reason.)
    bool const differ = Partial::value && Mask::rows_differ && (!keys_stay || Mask::two_edges || at.before_full());
    bool const finite = (P::wants_finite ? arrived_finite : !differ) || drop_nonfinite(stage);
    if constexpr (column_warps > 1) block_sync();  // P and dS are in shared memory
    if constexpr (keys_stay) {
      P::gemm(dy_, left_operand(probabilities, p_tile()), right_operand<SmemBlockY>(smem_.block_y[stage]));
    }
    P::gemm(dx_, left_operand(score_gradients, ds_tile()), right_operand<SmemBlockX>(smem_.block_x[stage]));
    // dS is in shared memory, and all warps have finished reading the block.
    if constexpr ((adds_dq && column_warps == 1) || C.stages == 1) block_sync();
    if constexpr (C.stages == 1) load_next(at);
    if constexpr (adds_dq) add_dq(at, finite);
  }

  FLASHCUTE_DEVICE Element* p_tile() const {
    if constexpr (stores_p) return smem_.tile[0];
    return nullptr;
  }
  FLASHCUTE_DEVICE Element* ds_tile() const {
    if constexpr (stores_ds) return smem_.tile[stores_p];
    return nullptr;
  }

  /// acc += A B^T of the rows of two tiles.
  template <class SmemA, class SmemB, class Accumulator>
  FLASHCUTE_DEVICE static void multiply_rows(Accumulator& acc, Element const* a, Element const* b, bool finite) {
    if constexpr (P::wants_finite) {
      if (!finite) return P::template gemm_of_rows<SmemA, SmemB>(acc, a, b);
    }
    P::gemm(acc, P::template rows_as_a<SmemA>(a), P::template rows_as_b<SmemB>(b));
  }

  /// P or dS as the A operand: from this warp's registers, or from shared memory, where all warps stored their parts.
  template <class Fragment>
  FLASHCUTE_DEVICE static auto left_operand(Fragment const& own, Element const* stored) {
    if constexpr (column_warps == 1) {
      return P::operand_a(own);
    } else {
      return P::template rows_as_a<SmemScores>(stored);
    }
  }

  /// The rows of a block as the B operand of the same product.
  template <class Smem>
  FLASHCUTE_DEVICE static auto right_operand(Element const* block) {
    return P::template columns_as_b<Smem, column_warps == 1 ? KOrder::registers : KOrder::memory>(block);
  }

  /// Turns S into P, in place.
  template <bool Partial, class Scores>
  FLASHCUTE_DEVICE void to_probabilities(Scores& scores, int block_row0, int head, int stage) const {
    using namespace cute;
    auto s = by_row_and_column(scores);  // (row, column)
    auto const c = score_coordinates();  // -> (row, column)
    auto const& queries = smem_.queries[keys_stay ? stage : 0];
    with_visible_elements<Partial>(c, block_row0, head, [&](auto const& visible) {
      CUTE_UNROLL
      for (int j = 0; j < size<1>(s); ++j) {
        CUTE_UNROLL
        for (int i = 0; i < size<0>(s); ++i) {
          int const query = keys_stay ? get<1>(c(0, j)) : get<0>(c(i, 0));
          float const x = s(i, j) * p_.forward.scale_log2 - shared_load<float>(&queries.lse[query]) * log2_e<float>;
          float const probability = exp2_approx(x);
          s(i, j) = visible(i, j) ? probability : 0.f;
        }
      }
    });
  }

  /// Turns dP into dS, in place. Hidden elements become 0 by selection: they may be NaN.
  template <bool Partial, class Scores, class Probabilities>
  FLASHCUTE_DEVICE void to_score_gradients(Scores& scores, Probabilities const& probabilities, int block_row0, int head,
                                           int stage) const {
    using namespace cute;
    auto ds = by_row_and_column(scores);              // (row, column)
    auto const p = by_row_and_column(probabilities);  // (row, column)
    auto const c = score_coordinates();               // -> (row, column)
    auto const& queries = smem_.queries[keys_stay ? stage : 0];
    with_visible_elements<Partial>(c, block_row0, head, [&](auto const& visible) {
      CUTE_UNROLL
      for (int j = 0; j < size<1>(ds); ++j) {
        CUTE_UNROLL
        for (int i = 0; i < size<0>(ds); ++i) {
          int const query = keys_stay ? get<1>(c(0, j)) : get<0>(c(i, 0));
          float const x = static_cast<float>(p(i, j)) * (ds(i, j) - shared_load<float>(&queries.delta[query]));
          ds(i, j) = visible(i, j) ? x : 0.f;
        }
      }
    });
  }

  /// (row, column) of every score that this thread holds, by row and column.
  FLASHCUTE_DEVICE static auto score_coordinates() {
    return by_row_and_column(
        L::template coordinates<typename L::BlockM, typename L::BlockN, column_warps>(thread_index()));
  }

  /// Which of the thread's elements of a block belong to a query and a key that it sees.
  template <class Coordinates>
  FLASHCUTE_DEVICE auto visible_elements(Coordinates const& c, int block_row0, int head) const {
    constexpr int rows = decltype(cute::size<0>(c))::value;
    int const row = tile_.row0 + cute::get<0>(c(0, 0)), column = block_row0 + cute::get<1>(c(0, 0));
    return VisibleElements<L, Mask, keys_stay, column_warps, rows>{row, column, sequence(head)};
  }

  /// For a block's elements: f(visible), where visible(i, j) says it of one. What has to be loaded for that is loaded
  /// once; all else is computed for each element, because nvcc 13.0 generates other code where it is kept.
  template <bool Partial, class Coordinates, class F>
  FLASHCUTE_DEVICE void with_visible_elements(Coordinates const& c, int block_row0, int head, F const& f) const {
    if constexpr (!Partial) {
      f([](int, int) { return true; });
    } else if constexpr (decltype(visible_elements(c, block_row0, head))::is_loaded) {
      auto const loaded = visible_elements(c, block_row0, head);
      f([&](int i, int j) { return loaded.at(i, j); });
    } else {
      f([&](int i, int j) { return visible_elements(c, block_row0, head).at(i, j); });
    }
  }

  /// Adds dS X to the sums for dQ of the queries of the block.
  FLASHCUTE_DEVICE void add_dq(Passing const& at, bool finite) const {
    auto const sums = Sums::template of<Sequence>(p_, tile_.entry, at.head, at.block);
    if (finite) {
      sums.add_product(Sums::Products::template columns_as_a<SmemScores>(ds_tile()),
                       Sums::Products::template columns_as_b<SmemX>(smem_.x));
    } else {
      add_visible_dq(sums, at);
    }
  }

  // ---- NaN and infinity, which a product would multiply by 0 for rows that do not see them -----------

  /// Replaces them by 0 in a block, for dX and dY; add_dropped adds them where they are seen. Returns, for dQ, whether
  /// the block, and all of X, was finite.
  FLASHCUTE_DEVICE bool drop_nonfinite(int stage) {
    FiniteCheck<Element> check;
    auto const look_at = [&](Element* place) { check.template look_at<16>(place); };
    for_each_word_of_block(stage, look_at);
    if constexpr (adds_dq) for_each_shared_words<L::threads>(smem_.x, C.block_m * C.head_dim, look_at);
    if (!block_any(!check.all_finite())) return true;  // also: all warps have finished S and dP
    dropped_ = true;
    for_each_word_of_block(stage, [](Element* place) { zero_nonfinite(place); });
    block_sync();  // the whole block is finite
    return false;
  }

  template <class F>
  FLASHCUTE_DEVICE void for_each_word_of_block(int stage, F const& f) const {
    for_each_shared_words<L::threads>(smem_.block_x[stage], C.block_n * C.head_dim, f);
    if constexpr (keys_stay) for_each_shared_words<L::threads>(smem_.block_y[stage], C.block_n * C.head_dim_v, f);
  }

  /// dS X element by element. Slow, but rare.
  FLASHCUTE_DEVICE void add_visible_dq(Sums const& sums, Passing const& at) const {
    using namespace cute;
    int const block_row0 = at.block * C.block_n;
    auto const c = Sums::coordinates();                                                    // -> (query, column)
    auto const ds = make_tensor(make_smem_ptr(ds_tile()), typename SmemScores::Layout{});  // (key, query)
    auto const x = make_tensor(make_smem_ptr(smem_.x), typename SmemX::Layout{});          // (key, column)
    CUTE_NO_UNROLL
    for (int i = 0; i < size(c); ++i) {
      int const query = get<0>(c(i)), column = get<1>(c(i));
      float sum = 0;
      CUTE_NO_UNROLL
      for (int key = 0; key < C.block_m; ++key) {
        if (!Mask::visible(block_row0 + query, tile_.row0 + key, sequence(at.head))) continue;
        sum += static_cast<float>(shared_load<Element>(&ds(key, query))) *
               static_cast<float>(shared_load<Element>(&x(key, column)));
      }
      sums.add(i, sum);
    }
  }

  // ---- statistics of the queries: LSE and delta ---------------------------------------------------------

  /// Computes delta of the tile's rows and writes it to shared and to global memory; copies their LSE to shared memory.
  FLASHCUTE_DEVICE static void prepare_statistics(BackwardParams const& p, Tile const& tile, SharedStorage& smem) {
    auto const first = tile.lse_offset(p.forward);
    auto& queries = smem.queries[0];
    int const existing = tile.existing(p.forward);
    for (int i = thread_index(); i < C.block_m; i += L::threads) {
      bool const exists = i < existing;
      shared_store(&queries.lse[i],
                   exists ? global_load<float>(static_cast<float const*>(p.forward.lse) + first + i) : 0.f);
      if (!exists) shared_store(&queries.delta[i], 0.f);
    }
    Delta<Element, C.block_m, C.head_dim_v, C.copy_bytes, L::threads>::compute(p, tile, [&](int row, float delta) {
      if (!Sequence::fills_tensors && row >= existing) delta = 0;  // for the pass `sink`
      global_store(static_cast<float*>(p.delta) + first + row, delta);
      if (Sequence::fills_tensors || row < existing) shared_store(&queries.delta[row], delta);
    });
  }

  /// Starts loading LSE and delta of a block's rows; 0 where there is no row.
  FLASHCUTE_DEVICE void load_statistics(int head, int row0, int rows, Statistics<C.block_n>& to) const {
    ForwardParams const& f = p_.forward;
    int64_t const first = lse_offset(f, tile_.entry.batch, head) + tile_.entry.first_query + row0;
    CUTE_UNROLL
    for (int pass = 0; pass < ceil_div(C.block_n, L::threads); ++pass) {
      int const i = pass * L::threads + thread_index();
      if (i >= C.block_n) break;
      copy_async<uint32_t>(static_cast<float const*>(f.lse) + first + i, &to.lse[i], i < rows);
      copy_async<uint32_t>(static_cast<float const*>(p_.delta) + first + i, &to.delta[i], i < rows);
    }
  }

  // ---- results ---------------------------------------------------------------------------------------

  /// Writes dX and dY to shared memory, over X and Y.
  FLASHCUTE_DEVICE void stage_results() {
    auto const scale = static_cast<float>(p_.forward.scale);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(dx_); ++i) dx_(i) *= scale;
    copies_wait();
    block_sync();  // all warps have finished reading X and Y, and all copies have arrived
    stage_tile<C, SmemX, column_warps>(dx_, smem_.x);
    if constexpr (keys_stay) stage_tile<C, SmemY, column_warps>(dy_, smem_.y);
    block_sync();  // the tiles are in shared memory
    if constexpr (!Sequence::fills_tensors) clear_absent_rows();
  }

  /// Gradients of rows that do not exist are 0.
  FLASHCUTE_DEVICE void clear_absent_rows() {
    int const existing = tile_.existing(p_.forward);
    if (existing == tile_.rows) return;
    clear_rows<C, SmemX>(smem_.x, existing, tile_.rows, p_.forward.head_dim);
    if constexpr (keys_stay) clear_rows<C, SmemY>(smem_.y, existing, tile_.rows, p_.forward.head_dim_v);
    block_sync();  // they are clear
  }

  /// Adds to each of the first `rows` rows of these tiles the non-finite values that it sees among the rows `others` of
  /// some heads.
  FLASHCUTE_DEVICE void add_dropped(int first_head, int heads, RowRange const& others, int rows) const {
    if (!(P::wants_finite || Mask::rows_differ) || !dropped_) return;
    ForwardParams const& f = p_.forward;
    int head = first_head;
    auto const sees = [&](int row, int other) {
      return keys_stay ? Mask::visible(other, tile_.row0 + row, sequence(head))
                       : Mask::visible(tile_.row0 + row, other, sequence(head));
    };
    for (; head < first_head + heads; ++head) {
      Rows const x = keys_stay ? queries(f.q, f.q_stride, tile_, head) : keys(f.k, f.k_stride, tile_, head);
      flashcute::add_dropped<C, SmemX>(x, others, rows, f.head_dim, smem_.x, sees);
      if constexpr (keys_stay) {
        Rows const y = queries(p_.dout, p_.dout_stride, tile_, head);
        flashcute::add_dropped<C, SmemY>(y, others, rows, f.head_dim_v, smem_.y, sees);
      }
    }
    block_sync();  // all elements are corrected
  }

  // ---- from and to the tensors -----------------------------------------------------------------------

  /// The rows of one head that belong to a tile's sequence.
  FLASHCUTE_DEVICE static Rows queries(void const* base, Strides const& stride, Tile const& tile, int head) {
    return Rows::of(base, stride, tile.entry.batch, head, tile.entry.first_query);
  }
  FLASHCUTE_DEVICE static Rows keys(void const* base, Strides const& stride, Tile const& tile, int head) {
    return Rows::of(base, stride, tile.entry.batch, head, tile.entry.first_key);
  }

  template <class Smem>
  FLASHCUTE_DEVICE static void load(Rows const& from, int row0, int rows, int columns, Element* tile) {
    using Copy = TileCopy<C, Smem>;
    Copy::load(Copy::first(from.first + row0 * from.stride, from.stride), from.stride, rows, columns, tile,
               std_::true_type{});
  }

  template <class Smem>
  FLASHCUTE_DEVICE static void store(Element* tile, void* base, Strides const& stride, int batch, int head, int row0,
                                     int rows, int columns) {
    using Copy = TileCopy<C, Smem>;
    auto* const to = Copy::first(static_cast<Element*>(base) + row_offset(stride, batch, head, row0), stride.row);
    Copy::store(tile, to, stride.row, rows, columns);
  }

  using AccumulatorX = decltype(L::template accumulator<typename L::BlockM, typename L::HeadDim, column_warps>());
  using AccumulatorY = decltype(L::template accumulator<typename L::BlockM, typename L::HeadDimV, column_warps>());

  BackwardParams const& p_;
  SharedStorage& smem_;
  Tile const tile_;
  Element const* next_x_ = nullptr;  // this thread's first element of the block to load next
  Element const* next_y_ = nullptr;
  AccumulatorX dx_ =
      L::template accumulator<typename L::BlockM, typename L::HeadDim, column_warps>();  // (MMA, MMA_M, MMA_D)
  AccumulatorY dy_ =
      L::template accumulator<typename L::BlockM, typename L::HeadDimV, column_warps>();  // only if keys stay
  bool dropped_ = false;     // whether anything was replaced by 0; the same in all threads of the block
  bool tile_finite_ = true;  // whether what this thread copied of X and Y is finite
};

}  // namespace flashcute
