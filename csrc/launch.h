// SPDX-License-Identifier: Apache-2.0
// What the binding asks of the kernels: the launch functions, whose arguments are checked and whose outputs are allocated.
#pragma once

#include <cstdint>

namespace vfp {

// Which of vLLM's quantisers codes and scales are of; ops/quant.py. `power` is custom_op or reciprocal with UE8M0 scales,
// where the two are the same.
enum class Rounding { custom_op, reciprocal, power, flashinfer };

// Which of vLLM's SiLU·mul; ops/silu_mul_quant.py.
enum class Act { custom_op, eager, native };

struct Scales {
  void* data;
  int64_t row_stride, group_stride;  // in numbers of the tensor, which is int32 if packed
  int64_t rows;                      // with the padding of TMA-aligned scales, which is zeroed
  bool packed;
};

struct GroupQuant {
  const void* x;
  int64_t x_stride;  // from row to row
  int64_t rows, width;
  int group_size;
  bool fp16;  // or bf16
  Rounding rounding;
  uint8_t* codes;
  Scales scales;
};

struct Where {
  int device;
  void* stream;
  bool pdl;  // programmatic dependent launch
};

// What a block has of the rows, as kernels/tiles.py; for tuning.
struct Tile {
  int rows, groups, warps;
};

// Each returns a cudaError_t. Zero rows launch nothing. act may be null. tile null: chosen by shape.
int silu_mul_group_fp8_quant(const GroupQuant& quant, Act act_rounding, void* act, const Where& where, const Tile* tile);
int group_fp8_quant(const GroupQuant& quant, const Where& where, const Tile* tile);

// Load every kernel onto the current device, so that none is loaded in a request. A cudaError_t.
int load_silu_mul_group_fp8_quant();
int load_group_fp8_quant();

}  // namespace vfp
