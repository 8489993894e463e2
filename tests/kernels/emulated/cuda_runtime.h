// SPDX-License-Identifier: Apache-2.0
// As much of CUDA as csrc's kernels use, on a CPU: blocks one after another, the threads of a block as coroutines that take
// turns, in order, at each exchange within a warp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include <ucontext.h>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct float2 { float x, y; };
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(x));
  return bits;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

// ---- threads ---------------------------------------------------------------------------------------------------------

struct Emulated {
  unsigned thread = 0, finished = 0;
  std::vector<uint32_t> exchanged;
  ucontext_t scheduler;
  std::vector<ucontext_t> threads;
};
inline Emulated emulated;

struct ThreadIndex {
  struct X {
    operator unsigned() const { return emulated.thread; }
  } x;
};
inline ThreadIndex threadIdx;
inline dim3 blockIdx, blockDim;

inline void take_turns() {
  const unsigned thread = emulated.thread;
  swapcontext(&emulated.threads[thread], &emulated.scheduler);
}

inline uint32_t __shfl_xor_sync(unsigned, uint32_t value, int mask) {
  emulated.exchanged[emulated.thread] = value;
  take_turns();
  const uint32_t other = emulated.exchanged[emulated.thread ^ mask];
  take_turns();
  return other;
}

inline uint32_t __reduce_max_sync(unsigned, uint32_t value) {
  for (int mask = 16; mask > 0; mask /= 2) value = std::max(value, __shfl_xor_sync(~0u, value, mask));
  return value;
}

inline std::function<void()> emulated_kernel;
inline void run_emulated_kernel() {
  emulated_kernel();
  ++emulated.finished;
  for (;;) take_turns();
}

// ---- launches --------------------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
  int id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  constexpr size_t kStack = 64 << 10;
  const unsigned threads = config->blockDim.x;
  std::unique_ptr<char[]> stacks(new char[threads * kStack]);
  blockDim = config->blockDim;
  emulated.exchanged.resize(threads);
  emulated_kernel = [&] { kernel(arguments...); };
  for (unsigned block = 0; block < config->gridDim.x * config->gridDim.y; ++block) {
    blockIdx = dim3(block % config->gridDim.x, block / config->gridDim.x);
    emulated.threads.assign(threads, {});
    for (unsigned t = 0; t < threads; ++t) {
      getcontext(&emulated.threads[t]);
      emulated.threads[t].uc_stack = {stacks.get() + t * kStack, 0, kStack};
      emulated.threads[t].uc_link = nullptr;
    }
    for (ucontext_t& thread : emulated.threads) makecontext(&thread, run_emulated_kernel, 0);
    // Each runs to its next exchange, or to its end, in turn; all have as many.
    for (emulated.finished = 0; emulated.finished < threads;) {
      for (emulated.thread = 0; emulated.thread < threads; ++emulated.thread) {
        swapcontext(&emulated.scheduler, &emulated.threads[emulated.thread]);
      }
    }
  }
  return cudaSuccess;
}
