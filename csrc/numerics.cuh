// SPDX-License-Identifier: Apache-2.0
// Roundings of vLLM's ops, rebuilt from cheaper instructions: those of kernels/numerics.py, one by one. Why each has the
// bits of what it replaces is said there, and tested there over all inputs.
//
// Products and sums are spelled __fmul_rn and __fadd_rn, which the compiler fuses with nothing.
#pragma once

#include <cstdint>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

namespace vfp {

constexpr float kMax = 448.0f;  // the largest e4m3fn code

// Two bf16 numbers in 32 bits, the first in the lower half.
struct Bf16 {
  static constexpr bool kExactSilu = false;  // IEEE division shows no other bits after rounding

  static __device__ __forceinline__ float2 widen(uint32_t both) {
    return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
  }

  static __device__ __forceinline__ uint32_t round(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
  }

  // Of each of two numbers the larger; of NaN and a number the number.
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    uint32_t both;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(both) : "r"(a), "r"(b));
    return both;
  }
};

// Likewise of fp16.
struct Fp16 {
  static constexpr bool kExactSilu = true;

  static __device__ __forceinline__ float2 widen(uint32_t both) {
    float2 wide;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
        : "=f"(wide.x), "=f"(wide.y)
        : "r"(both));
    return wide;
  }

  static __device__ __forceinline__ uint32_t round(float low, float high) {
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
  }

  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    uint32_t both;
    asm("max.f16x2 %0, %1, %2;" : "=r"(both) : "r"(a), "r"(b));
    return both;
  }
};

// 1 / x within 1 ulp; flushes to zero above 2**126.
__device__ __forceinline__ float reciprocal(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}

__device__ __forceinline__ float finite_or_zero(float x) { return x == INFINITY ? 0.0f : x; }

// IEEE 1 / x for positive x, normal and up to 2**126, or infinite.
__device__ __forceinline__ float rounded_reciprocal(float x) {
  float near = reciprocal(x);
  return __fmaf_rn(__fmaf_rn(-finite_or_zero(x), near, 1.0f), near, near);
}

// expf(-x) of CUDA's library.
__device__ __forceinline__ float exp_of_negative(float x) {
  float p, power;
  asm("{\n"
      ".reg .f32 exponent, shifted, fraction;\n"
      ".reg .b32 bits;\n"
      "fma.rn.ftz.sat.f32 exponent, %2, 0fBBBB989D, 0f3F000000;\n"
      "fma.rm.ftz.f32 shifted, exponent, 0f437C0000, 0f4B400001;\n"
      "add.rn.f32 exponent, shifted, 0fCB40007F;\n"
      "neg.f32 exponent, exponent;\n"
      "fma.rn.ftz.f32 fraction, %2, 0fBFB8AA3B, exponent;\n"
      "fma.rn.ftz.f32 fraction, %2, 0fB2A57060, fraction;\n"
      "mov.b32 bits, shifted;\n"
      "shl.b32 bits, bits, 23;\n"
      "mov.b32 %1, bits;\n"
      "ex2.approx.ftz.f32 %0, fraction;\n"
      "}"
      : "=&f"(p), "=&f"(power)
      : "f"(x));
  return __fmul_rn(p, power);
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
  float factor;
  asm("div.approx.ftz.f32 %0, 0f43E00000, %1;" : "=f"(factor) : "f"(top));
  return top == 0.0f ? 1.0f : factor;
}

__device__ __forceinline__ float flushing_product(float x, float y) {
  float product;
  asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(product) : "f"(x), "f"(y));
  return product;
}

// Two e4m3fn codes, the first in the lower byte; saturates, keeps NaN.
__device__ __forceinline__ uint32_t e4m3_pair(float low, float high) {
#if __CUDA_ARCH__ >= 890
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
#else
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
#endif
}

}  // namespace vfp
