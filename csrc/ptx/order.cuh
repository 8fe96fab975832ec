// One instruction, one function: global memory that blocks of threads hand to each other.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#memory-consistency-model
#pragma once

#include <stdint.h>

// what the block wrote before its last barrier is seen by who reads this value
__device__ __forceinline__ void st_release(int32_t* global, int32_t value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(global), "r"(value) : "memory");
}

__device__ __forceinline__ int32_t ld_acquire(const int32_t* global) {
  int32_t value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(global) : "memory");
  return value;
}

// past the first-level caches, which are those of one multiprocessor
__device__ __forceinline__ void ld_global_cg(float (&value)[4], const float* global) {
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value[0]), "=f"(value[1]), "=f"(value[2]), "=f"(value[3])
               : "l"(global)
               : "memory");
}

__device__ __forceinline__ void st_global_cg(float* global, const float (&value)[4]) {
  asm volatile("st.global.cg.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(global), "f"(value[0]),
               "f"(value[1]), "f"(value[2]), "f"(value[3])
               : "memory");
}
