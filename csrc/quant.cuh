// SPDX-License-Identifier: Apache-2.0
// Group FP8 quantisers for the end of a kernel, and the kernel around them: load, compute, store.
//
// A thread has kWide neighbouring numbers of a group, kLoads times; the threads of a group are neighbours in a warp. What is
// computed before the quantiser is a Source: it loads a thread's numbers and rounds them to 16 bits, two in a register.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "launch.h"
#include "numerics.cuh"

namespace vfp {

constexpr float kEps = 1e-10f;       // floor of a group's maximum in vLLM's op
constexpr float kMinPower = 1e-10f;  // and of its scale, before that is rounded up to a power of two
constexpr int kMaxThreads = 256;

template <int kWide>
__device__ __forceinline__ void store(uint16_t* to, const Numbers<kWide>& n) {
  if constexpr (kWide == 8) {
    *reinterpret_cast<uint4*>(to) = make_uint4(n.pairs[0], n.pairs[1], n.pairs[2], n.pairs[3]);
  } else {
    *reinterpret_cast<uint2*>(to) = make_uint2(n.pairs[0], n.pairs[1]);
  }
}

// ---- maximum, scale, codes -------------------------------------------------------------------------------------------

// The largest magnitude of a group, in all of its 2**log2_threads threads; ignores NaN, and is NaN or 0 of nothing else.
template <class Number, int kWide>
__device__ __forceinline__ float group_maximum(const Numbers<kWide>& y, int log2_threads) {
  uint32_t top = y.pairs[0] & 0x7fff7fffu;
#pragma unroll
  for (int i = 1; i < kWide / 2; ++i) top = Number::larger(top, y.pairs[i] & 0x7fff7fffu);
  if (kWide == 4 && log2_threads == 5) {
    // A whole warp: bits of magnitudes have the order of the magnitudes, and a warp finds the largest in one instruction.
    float2 both = Number::widen(top);
    float mine = fmaxf(fmaxf(both.x, both.y), 0.0f);
    return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(mine)));
  }
  // 16 threads, or, of 64 numbers by eights, 8.
  if (kWide == 4 || log2_threads == 4) top = Number::larger(top, __shfl_xor_sync(0xffffffffu, top, 8));
#pragma unroll
  for (int i = 4; i > 0; i /= 2) top = Number::larger(top, __shfl_xor_sync(0xffffffffu, top, i));
  float2 both = Number::widen(top);
  return fmaxf(both.x, both.y);
}

// A group's scale, and what its numbers become before they are codes.
template <Rounding kRounding>
struct Quantiser;

template <>
struct Quantiser<Rounding::custom_op> {
  float scale;
  TwoPartReciprocal inverse;
  __device__ __forceinline__ explicit Quantiser(float top)
      : scale(divide_by_maximum(fmaxf(top, kEps))), inverse(scale) {}
  __device__ __forceinline__ float times(float y) const { return fmaxf(inverse.times(y), -kMax); }  // NaN becomes -448
};

template <>
struct Quantiser<Rounding::reciprocal> {
  float scale, inverse;
  __device__ __forceinline__ explicit Quantiser(float top)
      : scale(divide_by_maximum(fmaxf(top, kEps))), inverse(rounded_reciprocal(scale)) {}
  __device__ __forceinline__ float times(float y) const { return fmaxf(__fmul_rn(y, inverse), -kMax); }
};

template <>
struct Quantiser<Rounding::power> {
  float scale, inverse;
  __device__ __forceinline__ explicit Quantiser(float top)
      : scale(round_up_to_power_of_two(fmaxf(divide_by_maximum(fmaxf(top, kEps)), kMinPower))),
        inverse(reciprocal(scale)) {}  // exact
  __device__ __forceinline__ float times(float y) const { return fmaxf(__fmul_rn(y, inverse), -kMax); }
};

template <>
struct Quantiser<Rounding::flashinfer> {
  float factor, scale;
  __device__ __forceinline__ explicit Quantiser(float top)
      : factor(flashinfer_factor(fmaxf(top, 0.0f))), scale(reciprocal(factor)) {}
  __device__ __forceinline__ float times(float y) const { return flushing_product(y, factor); }  // NaN stays NaN
};

template <class Number, int kWide, class Q>
__device__ __forceinline__ void store_codes(uint8_t* to, const Numbers<kWide>& y, const Q& quantiser) {
  uint32_t codes[kWide / 4];
#pragma unroll
  for (int i = 0; i < kWide / 4; ++i) {
    float2 first = Number::widen(y.pairs[2 * i]), second = Number::widen(y.pairs[2 * i + 1]);
    uint32_t low = e4m3_pair(quantiser.times(first.x), quantiser.times(first.y));
    uint32_t high = e4m3_pair(quantiser.times(second.x), quantiser.times(second.y));
    codes[i] = low | high << 16;
  }
  if constexpr (kWide == 8) {
    *reinterpret_cast<uint2*>(to) = make_uint2(codes[0], codes[1]);
  } else {
    *reinterpret_cast<uint32_t*>(to) = codes[0];
  }
}

// ---- the kernel ------------------------------------------------------------------------------------------------------

// What the kernel takes of a GroupQuant and of the tile, so that threads divide nothing. Rows and groups of the tile, and
// threads of a group, are powers of two.
struct Job {
  const uint16_t* x;
  int64_t x_stride;
  uint8_t* codes;
  void* scales;
  int64_t scale_row_stride, scale_group_stride;
  int rows, padded_rows, width, groups;
  int log2_group_size, log2_threads, log2_tile_groups, tile_rows;
  bool packed;
  bool rows_first;  // neighbouring blocks have neighbouring rows, not groups
};

// Of packed scales, which are powers of two, the exponent's byte in an int32 of four groups.
template <bool kPower>
__device__ __forceinline__ void store_scale(const Job& job, int row, int group, float scale) {
  if (kPower && job.packed) {
    const int64_t word = row * job.scale_row_stride + (group >> 2) * job.scale_group_stride;
    static_cast<uint8_t*>(job.scales)[4 * word + (group & 3)] = __float_as_uint(scale) >> 23;
  } else {
    static_cast<float*>(job.scales)[row * job.scale_row_stride + group * job.scale_group_stride] = scale;
  }
}

// One block to a multiprocessor at least, which is to say: registers for all of a thread's loads at once, where the assembler
// would otherwise, for more warps, put some of them after the first waits.
template <class Source, Rounding kRounding, int kWide, int kLoads>
__global__ void __launch_bounds__(kMaxThreads, 1) group_kernel(const Source source, const Job job) {
  using Number = typename Source::Number;
  constexpr bool kPower = kRounding == Rounding::power;
  const int tile_groups = 1 << job.log2_tile_groups;
  const int first_row = (job.rows_first ? blockIdx.x : blockIdx.y) * job.tile_rows;
  const int first_group = (job.rows_first ? blockIdx.y : blockIdx.x) << job.log2_tile_groups;
  const int lane = threadIdx.x & ((1 << job.log2_threads) - 1);
  const int first_slot = threadIdx.x >> job.log2_threads;  // of the tile's groups of all its rows
  const int slots = blockDim.x >> job.log2_threads;        // that the block has in one load

  const uint16_t* from[kLoads];
  int row[kLoads], group[kLoads], column[kLoads];
  bool here[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int slot = first_slot + i * slots;
    row[i] = first_row + (slot >> job.log2_tile_groups);
    group[i] = first_group + (slot & (tile_groups - 1));
    column[i] = (group[i] << job.log2_group_size) + lane * kWide;
    here[i] = row[i] < job.rows && group[i] < job.groups;
    from[i] = job.x + row[i] * job.x_stride + column[i];
  }
  wait_for_producer(from[kLoads - 1]);

  typename Source::template Loaded<kWide> loaded[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    loaded[i] = source.template load_from<kWide>(from[i], job.width, here[i]);
  }

#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const Numbers<kWide> y = source.rounded(loaded[i]);
    const Quantiser<kRounding> quantiser(group_maximum<Number>(y, job.log2_threads));
    if (here[i]) {
      const int64_t at = static_cast<int64_t>(row[i]) * job.width + column[i];
      store_codes<Number>(job.codes + at, y, quantiser);
      source.keep(at, y);
      if (lane == 0) store_scale<kPower>(job, row[i], group[i], quantiser.scale);
    }
  }

  // Three rows at most, by the block of the last ones.
  if (job.padded_rows > job.rows && first_row + job.tile_rows >= job.rows) {
    for (int g = threadIdx.x; g < tile_groups && first_group + g < job.groups; g += blockDim.x) {
#pragma unroll 1
      for (int pad = job.rows; pad < job.padded_rows; ++pad) store_scale<kPower>(job, pad, first_group + g, 0.0f);
    }
  }
}

// ---- its launch ------------------------------------------------------------------------------------------------------

inline int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int log2_of(int64_t power) {
  int log2 = 0;
  while ((int64_t{1} << log2) < power) ++log2;
  return log2;
}

// More rows instead of groups that there are not.
inline Tile fitting(Tile tile, int64_t groups) {
  int fit = tile.groups;
  while (fit > 1 && fit / 2 >= groups) fit /= 2;
  return {tile.rows * tile.groups / fit, fit, tile.warps};
}

template <class Source, Rounding kRounding, int kWide, int kLoads>
int launch_kernel(const Source& source, const GroupQuant& quant, const Tile& tile, const Where& where) {
  const int64_t groups = quant.width / quant.group_size;
  const int64_t row_tiles = cdiv(quant.rows, tile.rows), group_tiles = cdiv(groups, tile.groups);
  const bool rows_first = row_tiles > 65535;
  Job job = {};
  job.x = static_cast<const uint16_t*>(quant.x);
  job.x_stride = quant.x_stride;
  job.codes = quant.codes;
  job.scales = quant.scales.data;
  job.scale_row_stride = quant.scales.row_stride;
  job.scale_group_stride = quant.scales.group_stride;
  job.rows = static_cast<int>(quant.rows);
  job.padded_rows = static_cast<int>(quant.scales.rows);
  job.width = static_cast<int>(quant.width);
  job.groups = static_cast<int>(groups);
  job.log2_group_size = log2_of(quant.group_size);
  job.log2_threads = log2_of(quant.group_size / kWide);
  job.log2_tile_groups = log2_of(tile.groups);
  job.tile_rows = tile.rows;
  job.packed = quant.scales.packed;
  job.rows_first = rows_first;
  cudaLaunchConfig_t config = {};
  config.gridDim = rows_first ? dim3(row_tiles, group_tiles) : dim3(group_tiles, row_tiles);
  config.blockDim = dim3(32 * tile.warps);
  config.stream = static_cast<cudaStream_t>(where.stream);
  cudaLaunchAttribute attribute = {};
  if (where.pdl) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, group_kernel<Source, kRounding, kWide, kLoads>, source, job);
}

// By how many numbers of the tile a thread has: 4, 8, 16 or 32.
template <class Source, Rounding kRounding>
int launch_tile(const Source& source, const GroupQuant& quant, Tile tile, const Where& where) {
  tile = fitting(tile, quant.width / quant.group_size);
  switch (tile.rows * tile.groups * quant.group_size / (32 * tile.warps)) {
    case 4:
      return launch_kernel<Source, kRounding, 4, 1>(source, quant, tile, where);
    case 8:
      return launch_kernel<Source, kRounding, 8, 1>(source, quant, tile, where);
    case 16:
      return launch_kernel<Source, kRounding, 8, 2>(source, quant, tile, where);
    case 32:
      return launch_kernel<Source, kRounding, 8, 4>(source, quant, tile, where);
  }
  return cudaErrorInvalidConfiguration;
}

template <class Source, Rounding kRounding>
int load_kernels() {
  cudaFuncAttributes attributes;
  int error = cudaFuncGetAttributes(&attributes, group_kernel<Source, kRounding, 4, 1>);
  if (!error) error = cudaFuncGetAttributes(&attributes, group_kernel<Source, kRounding, 8, 1>);
  if (!error) error = cudaFuncGetAttributes(&attributes, group_kernel<Source, kRounding, 8, 2>);
  if (!error) error = cudaFuncGetAttributes(&attributes, group_kernel<Source, kRounding, 8, 4>);
  return error;
}

// `call.template operator()<rounding>()` with the rounding as a constant. FlashInfer's is for bf16 alone.
template <bool kBf16, class Call>
int with_rounding(Rounding rounding, const Call& call) {
  switch (rounding) {
    case Rounding::custom_op:
      return call(std::integral_constant<Rounding, Rounding::custom_op>{});
    case Rounding::reciprocal:
      return call(std::integral_constant<Rounding, Rounding::reciprocal>{});
    case Rounding::power:
      return call(std::integral_constant<Rounding, Rounding::power>{});
    case Rounding::flashinfer:
      if constexpr (kBf16) return call(std::integral_constant<Rounding, Rounding::flashinfer>{});
  }
  return cudaErrorInvalidValue;
}

template <class Source>
int launch_group(const Source& source, const GroupQuant& quant, const Tile& tile, const Where& where) {
  if (quant.rows == 0) return cudaSuccess;
  constexpr bool kBf16 = std::is_same_v<typename Source::Number, Bf16>;
  return with_rounding<kBf16>(quant.rounding, [&](auto rounding) {
    return launch_tile<Source, rounding.value>(source, quant, tile, where);
  });
}

template <class Source>
int load_group() {
  constexpr bool kBf16 = std::is_same_v<typename Source::Number, Bf16>;
  int error = cudaSuccess;
  for (Rounding rounding : {Rounding::custom_op, Rounding::reciprocal, Rounding::power, Rounding::flashinfer}) {
    if (error || (rounding == Rounding::flashinfer && !kBf16)) continue;
    error = with_rounding<kBf16>(rounding, [](auto r) { return load_kernels<Source, r.value>(); });
  }
  return error;
}

}  // namespace vfp
