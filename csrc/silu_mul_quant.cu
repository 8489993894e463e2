// SPDX-License-Identifier: Apache-2.0
// SiLU·mul + group FP8: the bytes of kernels/silu_mul_quant.py.
#include "quant.cuh"

namespace vfp {
namespace {

template <class NumberType, Act kAct>
struct SiluMul {
  using Number = NumberType;
  uint16_t* act;  // where y is kept, or null

  template <int kWide>
  struct Loaded {
    Numbers<kWide> gate, up;
  };

  template <int kWide>
  __device__ __forceinline__ Loaded<kWide> load_from(const uint16_t* gate, int width, bool here) const {
    return {load<kWide>(gate, here), load<kWide>(gate + width, here)};
  }

  template <int kWide>
  __device__ __forceinline__ Numbers<kWide> rounded(const Loaded<kWide>& x) const {
    Numbers<kWide> y;
#pragma unroll
    for (int i = 0; i < kWide / 2; ++i) {
      const float2 gate = Number::widen(x.gate.pairs[i]);
      float2 up = Number::widen(x.up.pairs[i]);
      constexpr bool kExact = kAct != Act::native && Number::kExactSilu;
      float2 silu = make_float2(vfp::silu<kExact>(gate.x), vfp::silu<kExact>(gate.y));
      if constexpr (kAct != Act::native) silu = Number::widen(Number::round(silu.x, silu.y));
      if constexpr (kAct == Act::custom_op) up = make_float2(__fadd_rn(up.x, 0.0f), __fadd_rn(up.y, 0.0f));
      y.pairs[i] = Number::round(__fmul_rn(silu.x, up.x), __fmul_rn(silu.y, up.y));
    }
    return y;
  }

  template <int kWide>
  __device__ __forceinline__ void keep(int64_t at, const Numbers<kWide>& y) const {
    if (act != nullptr) store(act + at, y);
  }
};

// The tiles of kernels/silu_mul_quant.py, tuned for it on an H200.
Tile tile_of(int64_t rows, int64_t width, int group_size) {
  const int per_128 = 128 / group_size;
  const int64_t elements = rows * width;
  if (rows == 1) return {1, per_128, 1};
  if (rows <= 16 || elements < 80'000) return {2, (elements > 150'000 ? 4 : 2) * per_128, 4};
  if (elements < 440'000) return {2, 4 * per_128, 8};
  if (elements < 1 << 22) return {8, per_128, 4};
  if (elements < 1 << 23) return {1, 4 * per_128, 1};
  if (elements >= 1 << 26) return {2, 4 * per_128, 1};
  if (width % (8 * 128) == 0) return {1, 8 * per_128, 2};
  return {2, 4 * per_128, 2};
}

template <class Number>
int launch(const GroupQuant& quant, Act act_rounding, void* act, const Tile& tile, const Where& where) {
  uint16_t* kept = static_cast<uint16_t*>(act);
  switch (act_rounding) {
    case Act::custom_op:
      return launch_group(SiluMul<Number, Act::custom_op>{kept}, quant, tile, where);
    case Act::eager:
      return launch_group(SiluMul<Number, Act::eager>{kept}, quant, tile, where);
    case Act::native:
      return launch_group(SiluMul<Number, Act::native>{kept}, quant, tile, where);
  }
  return cudaErrorInvalidValue;
}

template <class Number>
int load_all() {
  int error = load_group<SiluMul<Number, Act::custom_op>>();
  if (!error) error = load_group<SiluMul<Number, Act::eager>>();
  return error ? error : load_group<SiluMul<Number, Act::native>>();
}

}  // namespace

int silu_mul_group_fp8_quant(const GroupQuant& quant, Act act_rounding, void* act, const Where& where, const Tile* tile) {
  const Tile chosen = tile ? *tile : tile_of(quant.rows, quant.width, quant.group_size);
  if (quant.fp16) return launch<Fp16>(quant, act_rounding, act, chosen, where);
  return launch<Bf16>(quant, act_rounding, act, chosen, where);
}

int load_silu_mul_group_fp8_quant() {
  const int error = load_all<Bf16>();
  return error ? error : load_all<Fp16>();
}

}  // namespace vfp
