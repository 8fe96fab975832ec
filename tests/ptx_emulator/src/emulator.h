// The C interface of the PTX emulator. Every call that fails leaves its message in emu_error().
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define EMU_API __attribute__((visibility("default")))

typedef struct EmuModule EmuModule;

enum { EMU_ASYNC_EARLY = 0, EMU_ASYNC_LATE = 1, EMU_ASYNC_RANDOM = 2 };

typedef struct {
  uint64_t seed;            // 0: warps take turns in order; else the schedule is drawn from it
  int32_t async;            // when asynchronous copies land: EMU_ASYNC_*
  int32_t checks;           // 0: no race, proxy, in-flight or buffer checks
  int32_t resident_blocks;  // how many blocks interleave; 1: one after another
  int32_t multiprocessors;  // what %nsmid and device queries answer; 0: 132
} EmuConfig;

typedef struct {
  uint64_t address, bytes;  // global memory that kernels may touch; none given: anything goes
} EmuBuffer;

// Counters of a launch; emu_stats_names() names them in this order.
typedef struct {
  uint64_t instructions;  // executed by a warp, whatever its mask
  uint64_t blocks;
  uint64_t barriers;         // warps arriving at bar, barrier or bar.warp
  uint64_t mbarrier_phases;  // completed
  uint64_t mma;              // mma.sync
  uint64_t wgmma;            // wgmma.mma_async, once per warpgroup
  uint64_t ldmatrix;
  uint64_t ldmatrix_wavefronts;  // one per 8x8 matrix when free of bank conflicts
  uint64_t stmatrix;
  uint64_t stmatrix_wavefronts;
  uint64_t shared_loads;  // ld.shared of a warp
  uint64_t shared_load_wavefronts;
  uint64_t shared_load_ideal;  // wavefronts that the bytes alone ask for
  uint64_t shared_stores;
  uint64_t shared_store_wavefronts;
  uint64_t shared_store_ideal;
  uint64_t global_loads;         // ld.global of a warp
  uint64_t global_load_sectors;  // distinct 32-byte sectors
  uint64_t global_stores;
  uint64_t global_store_sectors;
  uint64_t local_accesses;  // ld.local and st.local of a warp
  uint64_t atomics;         // lanes of atom and red
  uint64_t shuffles;
  uint64_t ex2;  // lanes of ex2
  uint64_t cp_async_bytes;
  uint64_t bulk_bytes;    // cp.async.bulk and cp.async.bulk.tensor, both ways
  uint64_t threads;       // of a block
  uint64_t shared_bytes;  // of a block, static and dynamic
} EmuStats;

EMU_API EmuModule* emu_load(const char* ptx_text);  // NULL on failure
EMU_API void emu_unload(EmuModule*);
EMU_API int emu_kernels(EmuModule*);
EMU_API const char* emu_kernel_name(EmuModule*, int index);
EMU_API int emu_params(EmuModule*, const char* kernel);  // -1: no such kernel
EMU_API int emu_param_size(EmuModule*, const char* kernel, int index);
// Runs a kernel to its end. params[i] points to parameter i. 0, or 1 on failure; stats may be NULL.
EMU_API int emu_launch(EmuModule*, const char* kernel, const uint32_t grid[3],
                       const uint32_t block[3], uint32_t dynamic_shared, const void* const* params,
                       const EmuConfig*, const EmuBuffer*, int buffers, EmuStats* stats);
EMU_API const char* emu_error(void);        // of the last failed call of this thread
EMU_API const char* emu_stats_names(void);  // separated by blanks

// cuTensorMapEncodeTiled's rules and enums; 0, or 1 on failure. strides_bytes has rank - 1 entries.
EMU_API int emu_tensor_map(void* map128, int dtype, const void* base, int rank,
                           const uint64_t* dims, const uint64_t* strides_bytes, const uint32_t* box,
                           const uint32_t* element_strides, int interleave, int swizzle, int l2,
                           int oob);

// The pose as the CUDA runtime (cudart.cpp): what the libraries linked against it launch.
EMU_API void emu_set_arch(int arch);  // 80 or 90: what device queries answer and which PTX is taken
EMU_API void emu_configure(const EmuConfig*, const EmuBuffer*, int buffers);  // later launches
EMU_API int emu_launches(void);                                               // made so far
EMU_API const char* emu_launch_kernel(int index);  // the kernel of launch `index`
EMU_API const EmuStats* emu_launch_stats(int index);
EMU_API int emu_launch_device(int index);
EMU_API void emu_forget_launches(void);
// Devices that share memory, of which 0 is current; contexts are forgotten.
EMU_API void emu_set_devices(int count);
EMU_API int emu_contexts_made(int device);  // primary contexts asked for by the driver's functions
EMU_API int emu_contexts_open(void);        // not released, or still current

#ifdef __cplusplus
}
#endif
