// SPDX-License-Identifier: Apache-2.0
// Roundings of vLLM's ops, rebuilt from cheaper instructions: those of kernels/numerics.py, one by one. Why each has the
// bits of what it replaces is said there, and tested there over all inputs.
//
// Products and sums are spelled __fmul_rn and __fadd_rn, which the compiler fuses with nothing.
#pragma once

#include "ptx.cuh"

namespace vfp {

constexpr float kMax = 448.0f;  // the largest e4m3fn code

__device__ __forceinline__ float finite_or_zero(float x) { return x == INFINITY ? 0.0f : x; }

// IEEE 1 / x for positive x, normal and up to 2**126, or infinite.
__device__ __forceinline__ float rounded_reciprocal(float x) {
  float near = reciprocal(x);
  return __fmaf_rn(__fmaf_rn(-finite_or_zero(x), near, 1.0f), near, near);
}

// gate / (1 + exp(-gate)). Exact: with the bits of IEEE division after rounding to fp16.
template <bool kExact>
__device__ __forceinline__ float silu(float gate) {
  float quarter = __fmaf_rn(exp_of_negative(gate), 0.25f, 0.25f);  // of the denominator, which would flush to zero
  if (kExact) {
    quarter = fminf(quarter, 1e38f);  // 0 * inf would be NaN
    float inverse = reciprocal(quarter);
    float quotient = __fmul_rn(__fmul_rn(gate, 0.25f), inverse);
    float residual = __fmaf_rn(quotient, quarter, __fmul_rn(gate, -0.25f));
    float corrected = __fmaf_rn(residual, -inverse, quotient);
    return gate == INFINITY ? gate : corrected;
  }
  return __fmul_rn(__fmul_rn(gate, 0.25f), reciprocal(quarter));
}

// IEEE x / 448 for x >= 0.
__device__ __forceinline__ float divide_by_maximum(float x) {
  constexpr float kInverse = static_cast<float>(1.0 / 448.0);
  float quotient = __fmul_rn(x, kInverse);
  float residual = __fmaf_rn(-quotient, kMax, x);
  return x == INFINITY ? x : __fmaf_rn(residual, kInverse, quotient);  // inf - inf is NaN in the residual
}

// exp2(ceil(log2(x))) for x >= 0 that is 0, normal or infinite.
__device__ __forceinline__ float round_up_to_power_of_two(float x) {
  return __uint_as_float((__float_as_uint(x) + 0x7fffffu) & 0x7f800000u);
}

// x / scale, close enough to IEEE division for the same codes, by a reciprocal in two parts that are made once a group.
struct TwoPartReciprocal {
  float high, low;

  __device__ __forceinline__ explicit TwoPartReciprocal(float scale) {
    float inverse = reciprocal(scale);
    high = __fmul_rn(inverse, 1.0f - 0x1p-22f);
    low = __fmul_rn(__fmaf_rn(-finite_or_zero(scale), high, 1.0f), inverse);
  }

  __device__ __forceinline__ float times(float x) const { return __fmaf_rn(x, high, __fmul_rn(x, low)); }
};

// 448 / top as nvcc's fast math divides; 1 for 0.
__device__ __forceinline__ float flashinfer_factor(float top) {
  return top == 0.0f ? 1.0f : fast_448_over(top);
}

}  // namespace vfp
