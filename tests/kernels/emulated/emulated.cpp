// SPDX-License-Identifier: Apache-2.0
// csrc's kernels as functions of C for test_cuda_kernels.py, all of one process, one at a time.
#include "group_quant.cu"
#define tile_of tile_of_silu_mul
#include "silu_mul_quant.cu"

namespace {

struct Arguments {
  int64_t x_stride, rows, width, group_size, fp16, rounding, scale_row_stride, scale_group_stride, scale_rows, packed;
  int64_t tile_rows, tile_groups, tile_warps;
};

vfp::GroupQuant of(const void* x, const Arguments& a, void* codes, void* scales) {
  return {x, a.x_stride, a.rows, a.width, static_cast<int>(a.group_size), a.fp16 != 0,
          static_cast<vfp::Rounding>(a.rounding), static_cast<uint8_t*>(codes),
          {scales, a.scale_row_stride, a.scale_group_stride, a.scale_rows, a.packed != 0}};
}

}  // namespace

extern "C" int emulated_group(const void* x, const Arguments* a, void* codes, void* scales) {
  const vfp::Tile tile{static_cast<int>(a->tile_rows), static_cast<int>(a->tile_groups), static_cast<int>(a->tile_warps)};
  return vfp::group_fp8_quant(of(x, *a, codes, scales), {}, tile.warps ? &tile : nullptr);
}

extern "C" int emulated_silu_mul(const void* x, const Arguments* a, void* codes, void* scales, int act_rounding, void* act) {
  const vfp::Tile tile{static_cast<int>(a->tile_rows), static_cast<int>(a->tile_groups), static_cast<int>(a->tile_warps)};
  return vfp::silu_mul_group_fp8_quant(of(x, *a, codes, scales), static_cast<vfp::Act>(act_rounding), act, {},
                                       tile.warps ? &tile : nullptr);
}
