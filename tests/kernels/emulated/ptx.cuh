// SPDX-License-Identifier: Apache-2.0
// Stands in for csrc/ptx.cuh on a CPU: plain operations for approximate instructions, as in Triton's interpreter.
#pragma once

#include "cuda_runtime.h"

namespace vfp {

inline uint32_t rounded_to(float x, int mantissa, int lowest) {  // to nearest even, as bits of the narrow format's value in fp32
  if (!std::isfinite(x) || x == 0.0f) return __float_as_uint(x);
  const int exponent = std::max(std::ilogb(x), lowest);
  return __float_as_uint(std::ldexp(std::nearbyint(std::ldexp(x, mantissa - exponent)), exponent - mantissa));
}

struct Bf16 {
  static constexpr bool kExactSilu = false;
  static float one(uint32_t half) { return __uint_as_float(half << 16); }
  static uint32_t half(float x) { return std::isnan(x) ? 0x7fff : rounded_to(x, 7, -126) >> 16; }
  static float2 widen(uint32_t both) { return {one(both & 0xffff), one(both >> 16)}; }
  static uint32_t round(float low, float high) { return half(low) | half(high) << 16; }
  static uint32_t larger(uint32_t a, uint32_t b) {
    const float2 x = widen(a), y = widen(b);
    return round(std::fmax(x.x, y.x), std::fmax(x.y, y.y));
  }
};

struct Fp16 {
  static constexpr bool kExactSilu = true;
  static float one(uint32_t half) {
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const float magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                            : exponent == 0 ? std::ldexp(mantissa, -24)
                                            : std::ldexp(1024 + mantissa, exponent - 25);
    return half >> 15 ? -magnitude : magnitude;
  }
  static uint32_t half(float x) {
    if (std::isnan(x)) return 0x7fff;
    const float rounded = __uint_as_float(rounded_to(x, 10, -14)), magnitude = std::fabs(rounded);
    const uint32_t sign = std::signbit(x) ? 0x8000 : 0;
    if (magnitude > 65504.0f) return sign | 0x7c00;
    if (magnitude < 0x1p-14f) return sign | static_cast<uint32_t>(std::ldexp(magnitude, 24));
    const int exponent = std::ilogb(magnitude);
    return sign | ((exponent + 14) << 10) + static_cast<uint32_t>(std::ldexp(magnitude, 10 - exponent));
  }
  static float2 widen(uint32_t both) { return {one(both & 0xffff), one(both >> 16)}; }
  static uint32_t round(float low, float high) { return half(low) | half(high) << 16; }
  static uint32_t larger(uint32_t a, uint32_t b) {
    const float2 x = widen(a), y = widen(b);
    return round(std::fmax(x.x, y.x), std::fmax(x.y, y.y));
  }
};

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float reciprocal(float x) { return flushed(1.0f / x); }
inline float fast_448_over(float x) { return x > 0x1p126f ? 0.0f : 448.0f / flushed(x); }
inline float exp_of_negative(float x) { return std::exp(-x); }
inline float flushing_product(float x, float y) { return flushed(flushed(x) * flushed(y)); }

inline uint32_t e4m3(float x) {
  if (std::isnan(x)) return 0x7f;
  const uint32_t sign = std::signbit(x) ? 0x80 : 0;
  const float magnitude = std::fmin(std::fabs(__uint_as_float(rounded_to(x, 3, -6))), 448.0f);
  if (magnitude < 0x1p-6f) return sign | static_cast<uint32_t>(std::ldexp(magnitude, 9));
  const int exponent = std::ilogb(magnitude);
  return sign | ((exponent + 6) << 3) + static_cast<uint32_t>(std::ldexp(magnitude, 3 - exponent));
}
inline uint32_t e4m3_pair(float low, float high) { return e4m3(low) | e4m3(high) << 8; }

template <int kWide>
struct Numbers {
  uint32_t pairs[kWide / 2];
};

template <int kWide>
Numbers<kWide> load(const uint16_t* from, bool here) {
  Numbers<kWide> n = {};
  if (here) std::memcpy(&n, from, sizeof(n));
  return n;
}

inline void wait_for_producer(const void*) {}

}  // namespace vfp
