// SPDX-License-Identifier: Apache-2.0
// The instructions that CUDA C++ has no word for, or another one by options. Nothing else is inline PTX, so that
// tests/kernels/emulated can stand in for it on a CPU.
#pragma once

#include <cstdint>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

namespace vfp {

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

// 448 / x within 2 ulp, as nvcc's fast math divides; subnormal x count as 0.
__device__ __forceinline__ float fast_448_over(float x) {
  float quotient;
  asm("div.approx.ftz.f32 %0, 0f43E00000, %1;" : "=f"(quotient) : "f"(x));
  return quotient;
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

// kWide 16-bit numbers.
template <int kWide>
struct Numbers {
  uint32_t pairs[kWide / 2];
};

// Zeros where `here` is false. Without a branch, so that all loads of a thread are under way before one is waited for.
template <int kWide>
__device__ __forceinline__ Numbers<kWide> load(const uint16_t* from, bool here) {
  Numbers<kWide> n = {};
  // volatile: after the wait for the producer. Not .nc, which the wait says nothing about.
  if constexpr (kWide == 8) {
    asm volatile("{ .reg .pred here; setp.ne.b32 here, %5, 0; @here ld.global.v4.b32 {%0, %1, %2, %3}, [%4]; }"
                 : "+r"(n.pairs[0]), "+r"(n.pairs[1]), "+r"(n.pairs[2]), "+r"(n.pairs[3])
                 : "l"(from), "r"(static_cast<int>(here)));
  } else {
    static_assert(kWide == 4);
    asm volatile("{ .reg .pred here; setp.ne.b32 here, %3, 0; @here ld.global.v2.b32 {%0, %1}, [%2]; }"
                 : "+r"(n.pairs[0]), "+r"(n.pairs[1])
                 : "l"(from), "r"(static_cast<int>(here)));
  }
  return n;
}

// Nothing before this reads what another kernel writes, or writes what another reads. `address` is computed before: the
// assembler, which would do that after the wait, moves no wait across an exit that hangs on it.
__device__ __forceinline__ void wait_for_producer(const void* address) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .pred never; setp.eq.u64 never, %0, 0; @never exit; griddepcontrol.wait; }" ::"l"(address) : "memory");
#endif
}

}  // namespace vfp
