// SPDX-License-Identifier: Apache-2.0
// The group FP8 quantiser by itself: the bytes of kernels/group_quant.py.
#include "quant.cuh"

namespace vfp {
namespace {

template <class NumberType>
struct Given {
  using Number = NumberType;

  template <int kWide>
  using Loaded = Numbers<kWide>;

  template <int kWide>
  __device__ __forceinline__ Numbers<kWide> load_from(const uint16_t* x, int, bool here) const {
    return load<kWide>(x, here);
  }

  template <int kWide>
  __device__ __forceinline__ Numbers<kWide> rounded(const Numbers<kWide>& x) const {
    return x;
  }

  template <int kWide>
  __device__ __forceinline__ void keep(int64_t, const Numbers<kWide>&) const {}
};

// The tiles of kernels/group_quant.py.
Tile tile_of(int64_t rows, int64_t width, int group_size) {
  const int per_128 = 128 / group_size;
  const int64_t elements = rows * width;
  if (rows == 1) return {1, 8 * per_128, 4};
  if (rows <= 16) return {1, 16 * per_128, 8};
  if (elements < 80'000) return {2, 2 * per_128, 4};
  if (elements < 440'000) return {2, 4 * per_128, 8};
  if (elements < 1 << 23) return {8, per_128, 2};
  return {8, 4 * per_128, 8};
}

}  // namespace

int group_fp8_quant(const GroupQuant& quant, const Where& where, const Tile* tile) {
  const Tile chosen = tile ? *tile : tile_of(quant.rows, quant.width, quant.group_size);
  if (quant.fp16) return launch_group(Given<Fp16>{}, quant, chosen, where);
  return launch_group(Given<Bf16>{}, quant, chosen, where);
}

int load_group_fp8_quant() {
  const int error = load_group<Given<Bf16>>();
  return error ? error : load_group<Given<Fp16>>();
}

}  // namespace vfp
