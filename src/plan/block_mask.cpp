#include "plan/block_mask.hpp"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/make_block_map.hpp"
#include "flashcute/core/block_map_kernel.hpp"
#include "launch/launch.hpp"
#include "plan/checks.hpp"

namespace flashcute {
namespace {

std::string sizes_text(int64_t seqlen_q, int64_t seqlen_k) {
  return "seqlen_q " + std::to_string(seqlen_q) + ", seqlen_k " + std::to_string(seqlen_k);
}

BlockMapSizes checked_sizes(char const* argument, BlockMask const& mask) {
  constexpr int64_t limit = std::numeric_limits<int32_t>::max() - 1024;
  for (int64_t const size : {mask.batch, mask.heads, mask.seqlen_q, mask.seqlen_k}) {
    if (size < 0 || size > limit) {
      throw ArgumentError(argument, "sizes from 0 to " + std::to_string(limit), std::to_string(size));
    }
  }
  int64_t const maps = mask.batch * mask.heads;
  if (maps > limit)
    throw ArgumentError(argument, "batch * heads at most " + std::to_string(limit), std::to_string(maps));
  return {maps, static_cast<int32_t>(mask.seqlen_q), static_cast<int32_t>(mask.seqlen_k)};
}

/// How many partial cells the words have room for.
int64_t checked_capacity(char const* argument, BlockMask const& mask, Device device) {
  TensorView const& words = *mask.words;
  int64_t const least = BlockMapLayout::of(checked_sizes(argument, mask), 0).size;
  int64_t const size = words.rank == 1 ? words.shape[0] : 0;
  if (words.rank != 1 || size < least) {
    throw ArgumentError(argument, "words of one dimension, at least " + std::to_string(least),
                        "shape " + shape_text(words));
  }
  require_shape(argument, words, ElementType::int32, device, {size}, "(words,)", true);
  if (words.data == nullptr || reinterpret_cast<std::uintptr_t>(words.data) % 8 != 0) {
    throw ArgumentError(argument, "words at a multiple of 8 bytes", words.data == nullptr ? "none" : "another address");
  }
  return (size - least) / (2 * words_of_cell);
}

BlockMapParams params_of(char const* argument, BlockMask const& mask, Device device) {
  int64_t const capacity = checked_capacity(argument, mask, device);
  return BlockMapParams::of(static_cast<uint32_t const*>(mask.words->data), checked_sizes(argument, mask), capacity,
                            mask.batch == 1 ? 0 : static_cast<int32_t>(mask.heads), mask.heads == 1 ? 0 : 1);
}

BlockMapParams checked_source(char const* argument, BlockMask const& source, BlockMask const& mask) {
  if (source.words == nullptr) return {};
  if (source.seqlen_q != mask.seqlen_q || source.seqlen_k != mask.seqlen_k) {
    throw ArgumentError(argument, "a mask for " + sizes_text(mask.seqlen_q, mask.seqlen_k),
                        "one for " + sizes_text(source.seqlen_q, source.seqlen_k));
  }
  for (auto const& [what, own, all] :
       {std::tuple{"batch", source.batch, mask.batch}, std::tuple{"heads", source.heads, mask.heads}}) {
    if (own == 1 || own == all) continue;
    throw ArgumentError(argument, std::string(what) + " 1 or " + std::to_string(all), std::to_string(own));
  }
  return params_of(argument, source, mask.words->device);
}

/// A rule's documents, and the distance of its batch entries.
std::pair<int32_t const*, int64_t> checked_documents(char const* argument, TensorView const& t, int64_t batch,
                                                     int64_t length, Device device) {
  int64_t const entries = t.rank == 2 && t.shape[0] == 1 ? 1 : batch;
  require_shape(argument, t, ElementType::int32, device, {entries, length}, "(batch, seqlen)", false);
  if (length > 1 && t.strides[1] != 1) {
    throw ArgumentError(argument, "last stride 1", std::to_string(t.strides[1]));
  }
  if (t.data == nullptr && length > 0) throw ArgumentError(argument, "a tensor with memory", "one without");
  return {static_cast<int32_t const*>(t.data), entries == 1 ? 0 : t.strides[0]};
}

/// Dimensions of size 1 stand for all.
void set_dense(TensorView const& dense, BlockMask const& mask, BlockMapRules& rules) {
  std::vector<int64_t> shape{mask.batch, mask.heads, mask.seqlen_q, mask.seqlen_k};
  for (std::size_t i = 0; i < 4 && dense.rank == 4; ++i) shape[i] = dense.shape[i] == 1 ? 1 : shape[i];
  require_shape("attn_mask", dense, ElementType::boolean, mask.words->device, shape,
                "(batch, heads, seqlen_q, seqlen_k)", false);
  for (std::size_t i = 0; i < 4; ++i) rules.dense_stride[i] = shape[i] == 1 ? 0 : dense.strides[i];
  bool const empty = std::find(shape.begin(), shape.end(), 0) != shape.end();
  if (dense.data == nullptr && !empty) throw ArgumentError("attn_mask", "a tensor with memory", "one without");
  rules.dense = static_cast<uint8_t const*>(dense.data);
}

}  // namespace

BlockMapParams checked_block_mask(CallOptions const& options, Device device, ForwardParams const& p) {
  BlockMask const& mask = options.block_mask;
  if (is_packed(options)) {
    throw ArgumentError("block_mask", "none beside cu_seqlens_q: packed sequences have no (seqlen_q, seqlen_k) grid",
                        "a mask");
  }
  if (mask.seqlen_q != p.seqlen_q || mask.seqlen_k != p.seqlen_k) {
    throw ArgumentError("block_mask", "one built for " + sizes_text(p.seqlen_q, p.seqlen_k),
                        "one built for " + sizes_text(mask.seqlen_q, mask.seqlen_k), "Build it for these sizes");
  }
  for (auto const& [what, own, all] :
       {std::tuple{"batch size", mask.batch, p.batch}, std::tuple{"number of heads", mask.heads, p.heads}}) {
    if (own == 1 || own == all) continue;
    throw ArgumentError("block_mask", std::string(what) + " 1 or q's " + std::to_string(all), std::to_string(own));
  }
  return params_of("block_mask", mask, device);
}

int64_t block_mask_size(BlockMask const& mask, std::optional<int64_t> partial_cells) {
  BlockMapSizes const sizes = checked_sizes("block_mask", mask);
  int64_t const cells = sizes.maps * count_cells(sizes.seqlen_q) * count_cells(sizes.seqlen_k);
  int64_t const room = partial_cells.value_or(cells);
  if (room < 0) throw ArgumentError("partial_cells", "a number >= 0", std::to_string(room));
  return BlockMapLayout::of(sizes, std::min(room, cells)).size;
}

void build_block_mask(BlockMask const& mask, BlockMaskRules const& rules, void* stream) {
  if (mask.words == nullptr) throw ArgumentError("block_mask", "words to write to", "none");
  require_writable("block_mask", *mask.words);
  Device const device = mask.words->device;
  BlockMapRules r{};
  r.sizes = checked_sizes("block_mask", mask);
  r.heads = static_cast<int32_t>(mask.heads);
  r.capacity = checked_capacity("block_mask", mask, device);
  r.words = static_cast<uint32_t*>(mask.words->data);
  if (TensorView const* const dense = rules.dense; dense != nullptr) {
    set_dense(*dense, mask, r);
  }
  if ((rules.documents_q != nullptr) != (rules.documents_k != nullptr)) {
    throw ArgumentError("documents", "those of queries and of keys", "only one of them");
  }
  if (rules.documents_q != nullptr) {
    std::tie(r.documents_q, r.documents_stride_q) =
        checked_documents("documents_q", *rules.documents_q, mask.batch, mask.seqlen_q, device);
    std::tie(r.documents_k, r.documents_stride_k) =
        checked_documents("documents_k", *rules.documents_k, mask.batch, mask.seqlen_k, device);
  }
  r.first = checked_source("first", rules.first, mask);
  r.second = checked_source("second", rules.second, mask);
  r.operation = static_cast<MapOperation>(rules.operation);
  if (device.type == DeviceType::cpu) {
    cpu::make_block_map(r);
  } else {
    require_capability(arch_of(device), "block_mask: ");
    require_grid(MapBlockOrder::of(r.sizes).count, "block_mask: batch * heads * squares of 32 x 32 cells");
    launch(r, device.index, stream);
  }
}

}  // namespace flashcute
