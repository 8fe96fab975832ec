// Launching: the caller's device and stream, and codes instead of exceptions.
#pragma once

#include <cuda.h>  // types only: libcuda is not linked
#include <cuda_runtime.h>
#include <stdint.h>

#include "ptx/mma.cuh"
#include "tilemask.h"
#include "tiles.h"

#define TILEMASK_TRY(expression)                    \
  do {                                              \
    if (int code = (expression); code) return code; \
  } while (0)

constexpr int WIDEST = 256;
constexpr int LONGEST = 1 << 30;  // positions are int32 in the kernels
constexpr int LEAST_BLOCK = 16;   // rows or columns of a tile, at least

inline int code_of(cudaError_t error) { return -static_cast<int>(error); }

// A struct of this version of the header?
template <typename Call>
int check_head(const Call& call) {
  return call.head.size == sizeof(Call) && call.head.abi == TILEMASK_ABI ? TILEMASK_OK
                                                                         : TILEMASK_WRONG_ABI;
}

// The struct, dtype and sizes of a call on q, k and v.
template <typename Call>
int check_call(const Call& call, const TilemaskSizes& sizes) {
  TILEMASK_TRY(check_head(call));
  if (call.head.dtype != TILEMASK_FLOAT16 && call.head.dtype != TILEMASK_BFLOAT16)
    return TILEMASK_WRONG_DTYPE;
  const bool right =
      sizes.batch >= 0 && sizes.heads >= 0 && sizes.kv_heads >= 0 && sizes.len_q >= 0 &&
      sizes.len_k >= 0 && sizes.len_q < LONGEST && sizes.len_k < LONGEST && sizes.width >= 1 &&
      sizes.width <= WIDEST && sizes.width_v >= 1 && sizes.width_v <= WIDEST &&
      (sizes.heads == 0 || (sizes.kv_heads > 0 && sizes.heads % sizes.kv_heads == 0));
  if (!right) return TILEMASK_WRONG_SIZE;
  // blocks of a grid are numbered by int32
  const int64_t heads = static_cast<int64_t>(sizes.batch) * sizes.heads;
  const int64_t longest = sizes.len_q > sizes.len_k ? sizes.len_q : sizes.len_k;
  return heads <= INT32_MAX / (longest / LEAST_BLOCK + 1) ? TILEMASK_OK : TILEMASK_WRONG_SIZE;
}

// Lists where the mask needs them, made for this tile.
inline int check_lists(const TilemaskMask& mask, const TilemaskLists& lists, int block_m,
                       int block_n) {
  const bool affine = !mask.lo && !mask.words && !mask.keys;
  const bool right = lists.counts ? lists.block_m == block_m && lists.block_n == block_n : affine;
  return right ? TILEMASK_OK : TILEMASK_WRONG_TILE;
}

inline int max_width(const TilemaskSizes& sizes) {
  return sizes.width > sizes.width_v ? sizes.width : sizes.width_v;
}

// A compile-time value as an argument: flag.value.
template <bool VALUE>
struct Flag {
  static constexpr bool value = VALUE;
};

template <int VALUE>
struct Number {
  static constexpr int value = VALUE;
};

// body(T(), Number<WIDTH>()) for what a call has: the one place where kernels are instantiated.
template <typename Body>
auto dispatch(int dtype, int width, Body body) {
  const auto with_type = [&](auto type) {
    return width <= 64    ? body(type, Number<64>())
           : width <= 128 ? body(type, Number<128>())
                          : body(type, Number<256>());
  };
  return dtype == TILEMASK_FLOAT16 ? with_type(Float16()) : with_type(BFloat16());
}

// body(T(), Number<WIDTH>(), Flag<GENERAL>()).
template <typename Body>
int dispatch(int dtype, int width, bool general, Body body) {
  return dispatch(dtype, width, [&](auto type, auto padded) {
    return general ? body(type, padded, Flag<true>()) : body(type, padded, Flag<false>());
  });
}

// A function of the CUDA driver, or null.
template <typename Function>
Function driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess
             ? reinterpret_cast<Function>(found)
             : nullptr;
}

// Makes a device the current one for its lifetime, only where it is another. By pushing its primary
// context: setting the old device again at the end would make a context there.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    int current = 0;
    code_ = code_of(cudaGetDevice(&current));
    if (code_ || current == device) return;
    auto retain = driver_function<CUresult (*)(CUcontext*, CUdevice)>("cuDevicePrimaryCtxRetain");
    auto push = driver_function<CUresult (*)(CUcontext)>("cuCtxPushCurrent");
    CUcontext context;
    if (!retain || !push || retain(&context, device)) {
      code_ = code_of(cudaErrorInvalidDevice);
      return;
    }
    device_ = device;
    code_ = -static_cast<int>(push(context));
    pushed_ = code_ == 0;
  }
  ~DeviceScope() {
    if (device_ < 0) return;
    CUcontext context;
    if (pushed_) driver_function<CUresult (*)(CUcontext*)>("cuCtxPopCurrent")(&context);
    driver_function<CUresult (*)(CUdevice)>("cuDevicePrimaryCtxRelease")(device_);
  }
  DeviceScope(const DeviceScope&) = delete;
  int code() const { return code_; }

 private:
  int code_ = 0, device_ = -1;
  bool pushed_ = false;
};

// Bytes of shared memory of a multiprocessor, and the most that a block may have; 0 on errors.
struct SharedMemory {
  int multiprocessor = 0, block = 0;
};

inline SharedMemory shared_memory(int device) {
  SharedMemory bytes;
  if (cudaDeviceGetAttribute(&bytes.multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                             device) ||
      cudaDeviceGetAttribute(&bytes.block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
    return {};
  return bytes;
}

// Whether a multiprocessor holds so many blocks at once, by their shared memory.
inline bool holds(const SharedMemory& bytes, int blocks, int shared) {
  return bytes.block >= shared && bytes.multiprocessor >= blocks * (shared + RESERVED_SHARED);
}

// Launches kernel(call), with more than 48 KiB of shared memory where it asks for it. The current
// device is the call's: see DeviceScope.
template <typename Call>
int launch(void (*kernel)(Call), dim3 grid, int threads, int shared, const Call& call) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return TILEMASK_OK;
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared > 48 * 1024)
    TILEMASK_TRY(code_of(
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)));
  void* arguments[] = {const_cast<Call*>(&call)};
  return code_of(cudaLaunchKernel(function, grid, dim3(threads), arguments, shared,
                                  static_cast<cudaStream_t>(call.head.stream)));
}
