// One instruction, one function: integers.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#logic-and-shift-instructions
#pragma once

#include <stdint.h>

// of a power of two
__host__ __device__ constexpr int log2_of(int x) { return x > 1 ? 1 + log2_of(x / 2) : 0; }

// 0 for n >= 32, where C++ leaves it open
__device__ __forceinline__ uint32_t shl(uint32_t x, uint32_t n) {
  uint32_t y;
  asm("shl.b32 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(n));
  return y;
}

// x, of which the compiler knows nothing: what is computed from it in a loop stays in the loop.
__device__ __forceinline__ uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// threadIdx.x, read where this stands: no register holds it meanwhile
__device__ __forceinline__ uint32_t thread_index() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}
