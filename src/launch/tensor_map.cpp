#include "launch/tensor_map.hpp"

#include <algorithm>

#include "launch/driver.hpp"

namespace flashcute {
namespace {

using namespace cuda;

// The driver API's values.
constexpr int map_float16 = 6, map_bfloat16 = 9;
constexpr int interleave_none = 0, swizzle_64_bytes = 2, swizzle_128_bytes = 3, promote_to_256_bytes = 3,
              fill_with_zeros = 0;

struct Tensor {
  char const* name;
  void const* data;
  Strides strides;
  int64_t batch, rows, heads, columns;
  int32_t tile_columns, box_rows;
};

TensorMap encode(DType dtype, Tensor const& t) {
  auto const bytes = static_cast<std::uint64_t>(size_of(dtype));
  auto const box_bytes = static_cast<std::uint64_t>(page_bytes(t.tile_columns * size_of(dtype)));  // of a row
  // cuTensorMapEncodeTiled rejects a size of 0, which is never read, and some strides of a dimension of size 1, which
  // may have any.
  auto const size = [](int64_t n) { return static_cast<std::uint64_t>(std::max<int64_t>(n, 1)); };
  auto const stride = [&](int64_t n, int64_t elements) {
    return n > 1 ? static_cast<std::uint64_t>(elements) * bytes : box_bytes;
  };
  std::uint64_t const sizes[] = {size(t.columns), size(t.rows), size(t.heads), size(t.batch)};
  std::uint64_t const strides[] = {stride(t.rows, t.strides.row), stride(t.heads, t.strides.head),
                                   stride(t.batch, t.strides.batch)};
  unsigned const box[] = {static_cast<unsigned>(box_bytes / bytes), static_cast<unsigned>(t.box_rows), 1, 1};
  unsigned const dense[] = {1, 1, 1, 1};
  TensorMap map;
  Result const result = driver().cuTensorMapEncodeTiled(
      &map, dtype == DType::float16 ? map_float16 : map_bfloat16, 4, const_cast<void*>(t.data), sizes, strides, box,
      dense, interleave_none, box_bytes == 128 ? swizzle_128_bytes : swizzle_64_bytes, promote_to_256_bytes,
      fill_with_zeros);
  // Runs in every call, so the text is only built for an error.
  if (result != success) check_result(result, std::string("cuTensorMapEncodeTiled(") + t.name + ")");
  return map;
}

}  // namespace

void set_tensor_maps(ForwardConfig const& config, Sm90ForwardParams& params) {
  ForwardParams const& p = params.forward;
  DType const dtype = config.dtype;
  params.q =
      encode(dtype, {"q", p.q, p.q_stride, p.batch, p.seqlen_q, p.heads, p.head_dim, config.head_dim, warpgroup_rows});
  params.k = encode(dtype, {"k", p.k, p.k_stride, p.batch, p.seqlen_k, p.kv_heads, p.head_dim, config.head_dim,
                            keys_per_load(config)});
  params.v = encode(dtype, {"v", p.v, p.v_stride, p.batch, p.seqlen_k, p.kv_heads, p.head_dim_v, config.head_dim_v,
                            keys_per_load(config)});
}

void set_tensor_maps(BackwardConfig const& config, Sm90BackwardParams& params) {
  BackwardParams const& b = params.backward;
  ForwardParams const& p = b.forward;
  int32_t const rows = splits_dq(config) ? warpgroup_rows : config.block_m;
  auto const queries = [&](char const* name, void const* data, Strides const& strides, int64_t columns) {
    return encode(config.dtype, {name, data, strides, p.batch, p.seqlen_q, p.heads, columns, config.head_dim, rows});
  };
  auto const keys = [&](char const* name, void const* data, Strides const& strides, int64_t columns) {
    return encode(config.dtype,
                  {name, data, strides, p.batch, p.seqlen_k, p.kv_heads, columns, config.head_dim, config.block_n});
  };
  params.q = queries("q", p.q, p.q_stride, p.head_dim);
  params.k = keys("k", p.k, p.k_stride, p.head_dim);
  params.v = keys("v", p.v, p.v_stride, p.head_dim_v);
  params.dout = queries("dout", b.dout, b.dout_stride, p.head_dim_v);
}

}  // namespace flashcute
