// One instruction, one function: copies from global to shared memory.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async
#pragma once

#include <stdint.h>

// 16 bytes, or, where `there` is 0, 16 zero bytes: then `global` is not read
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, uint32_t there) {
  asm volatile(
      "{ .reg .pred there; .reg .b32 bytes;\n"
      "  setp.ne.u32 there, %2, 0;\n"
      "  selp.b32 bytes, 16, 0, there;\n"
      "  cp.async.cg.shared.global [%0], [%1], 16, bytes; }" ::"r"(shared),
      "l"(global), "r"(there)
      : "memory");
}

// SIZE bytes, 4, 8 or 16, of which the first `bytes` are read and the others are 0
template <int SIZE>
__device__ __forceinline__ void cp_async_ca(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(global),
               "n"(SIZE), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// until at most PENDING of this thread's groups are under way
template <int PENDING>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void st_shared_v4(uint32_t shared, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}

__device__ __forceinline__ uint4 ld_shared_v4(uint32_t shared) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(shared)
               : "memory");
  return value;
}

__device__ __forceinline__ void ld_shared_v4(float (&value)[4], uint32_t shared) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value[0]), "=f"(value[1]), "=f"(value[2]), "=f"(value[3])
               : "r"(shared)
               : "memory");
}

__device__ __forceinline__ void st_shared(uint32_t shared, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared), "r"(value) : "memory");
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
