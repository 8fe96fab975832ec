// Pairs of kernels as in faults_sm80.cu, for what compute capability 9.0 adds: mbarriers, bulk
// copies, tensor maps, wgmma, setmaxnreg.
#include <cstdint>

#define PAIR(name, parameters, arguments)                                       \
  extern "C" __global__ void name##_right parameters { name<false> arguments; } \
  extern "C" __global__ void name##_wrong parameters { name<true> arguments; }

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline void barrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}

__device__ inline void init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

__device__ inline void expect(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ inline bool try_wait(uint64_t* barrier, int parity) {
  uint32_t done;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; "
      "}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done;
}

__device__ inline void wait(uint64_t* barrier, int parity) {
  while (!try_wait(barrier, parity)) {
  }
}

__device__ inline void load_bulk(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

__device__ inline void store_bulk(void* to, const void* from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

__device__ inline void proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// -- bulk copies and mbarriers ---------------------------------------------------------------

template <bool WRONG>
__device__ void not_awaited(const float* x, float* y) {
  __shared__ __align__(128) float tile[128];
  __shared__ uint64_t full;
  if (threadIdx.x == 0) {
    barrier_init(&full, 1);
    init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    expect(&full, 512);
    load_bulk(tile, x, 512, &full);
  }
  if (WRONG)
    __syncthreads();
  else
    wait(&full, 0);
  y[threadIdx.x] = tile[127 - threadIdx.x];  // not_awaited
}
PAIR(not_awaited, (const float* x, float* y), (x, y))

// the parity of the phase before: the wait is over at once
template <bool WRONG>
__device__ void wrong_phase(const float* x, float* y) {
  __shared__ __align__(128) float tile[128];
  __shared__ uint64_t full;
  if (threadIdx.x == 0) {
    barrier_init(&full, 1);
    init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    expect(&full, 512);
    load_bulk(tile, x, 512, &full);
  }
  wait(&full, WRONG ? 1 : 0);
  y[threadIdx.x] = tile[127 - threadIdx.x];  // wrong_phase
}
PAIR(wrong_phase, (const float* x, float* y), (x, y))

// try_wait may answer no: its answer is not to be ignored
template <bool WRONG>
__device__ void ignored_answer(const float* x, float* y) {
  __shared__ __align__(128) float tile[128];
  __shared__ uint64_t full;
  if (threadIdx.x == 0) {
    barrier_init(&full, 1);
    init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    expect(&full, 512);
    load_bulk(tile, x, 512, &full);
  }
  if (WRONG)
    try_wait(&full, 0);
  else
    wait(&full, 0);
  y[threadIdx.x] = tile[127 - threadIdx.x];  // ignored_answer
}
PAIR(ignored_answer, (const float* x, float* y), (x, y))

// more bytes are expected than come
template <bool WRONG>
__device__ void too_few_bytes(const float* x, float* y) {
  __shared__ __align__(128) float tile[128];
  __shared__ uint64_t full;
  if (threadIdx.x == 0) {
    barrier_init(&full, 1);
    init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    expect(&full, WRONG ? 1024 : 512);
    load_bulk(tile, x, 512, &full);
  }
  wait(&full, 0);
  y[threadIdx.x] = tile[127 - threadIdx.x];
}
PAIR(too_few_bytes, (const float* x, float* y), (x, y))

// a phase takes its arrivals and no more, also while it waits for bytes
template <bool WRONG>
__device__ void too_many_arrivals(const float* x, float* y) {
  __shared__ __align__(128) float tile[128];
  __shared__ uint64_t full;
  if (threadIdx.x == 0) {
    barrier_init(&full, 1);
    init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    expect(&full, 512);
    if (WRONG) arrive(&full);  // too_many_arrivals
    load_bulk(tile, x, 512, &full);
  }
  wait(&full, 0);
  y[threadIdx.x] = tile[127 - threadIdx.x];
}
PAIR(too_many_arrivals, (const float* x, float* y), (x, y))

template <bool WRONG>
__device__ void init_not_seen(int* x) {
  __shared__ uint64_t full;
  if (threadIdx.x == 0) {
    barrier_init(&full, 64);
    init_fence();
  }
  if (!WRONG) __syncthreads();
  arrive(&full);  // init_not_seen
  wait(&full, 0);
  x[threadIdx.x] = 1;
}
PAIR(init_not_seen, (int* x), (x))

// the producer refills a stage that consumers still read
template <bool WRONG>
__device__ void stage_reused(const float* x, float* y, int tiles) {
  __shared__ __align__(128) float tile[128];
  __shared__ uint64_t full, empty;
  if (threadIdx.x == 0) {
    barrier_init(&full, 1);
    barrier_init(&empty, 128);
    init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= 128) {
    if (threadIdx.x == 128)
      for (int t = 0; t < tiles; t++) {
        if (t > 0 && !WRONG) wait(&empty, (t - 1) & 1);
        expect(&full, 512);                        // stage_reused
        load_bulk(tile, x + 128 * t, 512, &full);  // stage_reused
      }
  } else {
    float sum = 0;
    for (int t = 0; t < tiles; t++) {
      wait(&full, t & 1);
      sum += tile[127 - threadIdx.x];  // stage_reused
      arrive(&empty);
    }
    y[threadIdx.x] = sum;
  }
}
PAIR(stage_reused, (const float* x, float* y, int tiles), (x, y, tiles))

template <bool WRONG>
__device__ void store_unfenced(const float* x, float* y) {
  __shared__ __align__(128) float tile[128];
  tile[127 - threadIdx.x] = x[threadIdx.x];
  if (!WRONG) proxy_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    store_bulk(y, tile, 512);  // store_unfenced
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}
PAIR(store_unfenced, (const float* x, float* y), (x, y))

// a bulk copy comes after what threads wrote there, and only a proxy fence makes it come after
template <bool WRONG>
__device__ void refill_unfenced(const float* x, float* y) {
  __shared__ __align__(128) float tile[128];
  __shared__ uint64_t full;
  tile[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    barrier_init(&full, 1);
    init_fence();
  }
  if (!WRONG) proxy_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    expect(&full, 512);
    load_bulk(tile, x, 512, &full);  // refill_unfenced
  }
  wait(&full, 0);
  y[threadIdx.x] = tile[127 - threadIdx.x];
}
PAIR(refill_unfenced, (const float* x, float* y), (x, y))

// shared memory is written again while a bulk store still reads it
template <bool WRONG>
__device__ void source_reused(const float* x, float* y) {
  __shared__ __align__(128) float tile[128];
  tile[threadIdx.x] = x[threadIdx.x];
  proxy_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    store_bulk(y, tile, 512);
    if (!WRONG) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
  __syncthreads();
  tile[threadIdx.x] = 0;  // source_reused
  if (threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
PAIR(source_reused, (const float* x, float* y), (x, y))

// a bulk copy moves multiples of 16 bytes
template <bool WRONG>
__device__ void odd_size(const float* x, float* y) {
  __shared__ __align__(128) float tile[128];
  __shared__ uint64_t full;
  if (threadIdx.x == 0) {
    barrier_init(&full, 1);
    init_fence();
    expect(&full, WRONG ? 500 : 512);
    load_bulk(tile, x, WRONG ? 500 : 512, &full);  // odd_size
  }
  __syncthreads();
  wait(&full, 0);
  y[threadIdx.x] = tile[threadIdx.x];
}
PAIR(odd_size, (const float* x, float* y), (x, y))

// -- wgmma -----------------------------------------------------------------------------------

// d [64, 8] = a [64, 16] @ b [16, 8], bf16 in core matrices of 8 x 8 without swizzle
__device__ inline void multiply(float (&d)[4], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, "
      "0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "l"(a), "l"(b)
      : "memory");
}

__device__ inline uint64_t descriptor(const void* start) {
  return uint64_t(shared_address(start) >> 4) | uint64_t(128 >> 4) << 16 | uint64_t(256 >> 4) << 32;
}

enum Fault { NONE, NO_PROXY_FENCE, NO_FENCE, NO_WAIT, SOURCE_WRITTEN };

template <Fault FAULT>
__device__ void product(const uint32_t* x, float* y) {
  __shared__ __align__(1024) uint32_t a[512], b[64];
  for (int i = 0; i < 4; i++) a[threadIdx.x + 128 * i] = x[threadIdx.x + 128 * i];
  if (threadIdx.x < 64) b[threadIdx.x] = x[512 + threadIdx.x];
  if (FAULT != NO_PROXY_FENCE) proxy_fence();
  __syncthreads();
  float d[4] = {0, 0, 0, 0};
  if (FAULT != NO_FENCE) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  multiply(d, descriptor(a), descriptor(b));  // proxy_unfenced unfenced
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  if (FAULT == SOURCE_WRITTEN) b[threadIdx.x & 63] = 0;  // operand_written
  if (FAULT != NO_WAIT) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < 4; i++) y[4 * threadIdx.x + i] = d[i];  // too_early
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

#define FAULTY(name, fault)                                                                     \
  extern "C" __global__ void name##_right(const uint32_t* x, float* y) { product<NONE>(x, y); } \
  extern "C" __global__ void name##_wrong(const uint32_t* x, float* y) { product<fault>(x, y); }
FAULTY(proxy_unfenced, NO_PROXY_FENCE)
FAULTY(unfenced, NO_FENCE)
FAULTY(too_early, NO_WAIT)
FAULTY(operand_written, SOURCE_WRITTEN)

// -- registers -------------------------------------------------------------------------------

// three warpgroups of 168 registers: one gives up, two take; 65536 in all
template <bool WRONG>
__device__ void budget(int* x) {
  if (threadIdx.x < 128) {
    if (WRONG)
      asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    else
      asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");  // budget
  }
  x[threadIdx.x] = 1;
}
extern "C" __global__ void __launch_bounds__(384, 1) budget_right(int* x) { budget<false>(x); }
extern "C" __global__ void __launch_bounds__(384, 1) budget_wrong(int* x) { budget<true>(x); }
