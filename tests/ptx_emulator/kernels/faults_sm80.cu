// Pairs of kernels: NAME_right is correct, NAME_wrong has one fault. The line at which the emulator
// must stop a wrong one ends in "// NAME".
#include <cstdint>

#define PAIR(name, parameters, arguments)                                       \
  extern "C" __global__ void name##_right parameters { name<false> arguments; } \
  extern "C" __global__ void name##_wrong parameters { name<true> arguments; }

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline void copy_async(float* to, const float* from) {  // 16 bytes
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}

__device__ inline void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ inline void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

template <int ID>
__device__ inline void named_barrier() {
  asm volatile("bar.sync %0, 64;" ::"n"(ID) : "memory");
}

// -- shared memory ---------------------------------------------------------------------------

// x[i] = x[n - 1 - i] for the n = 128 threads of a block
template <bool WRONG>
__device__ void reverse(float* x) {
  __shared__ float tile[128];
  tile[threadIdx.x] = x[threadIdx.x];
  if (!WRONG) __syncthreads();
  x[threadIdx.x] = tile[127 - threadIdx.x];  // reverse
}
PAIR(reverse, (float* x), (x))

// y[i] = sum over tiles of x[tile, 127 - i]
template <bool WRONG>
__device__ void refill(const float* x, float* y, int tiles) {
  __shared__ float tile[128];
  float sum = 0;
  for (int t = 0; t < tiles; t++) {
    tile[threadIdx.x] = x[128 * t + threadIdx.x];  // refill
    __syncthreads();
    sum += tile[127 - threadIdx.x];  // refill
    if (!WRONG) __syncthreads();
  }
  y[threadIdx.x] = sum;
}
PAIR(refill, (const float* x, float* y, int tiles), (x, y, tiles))

// the lanes of one warp exchange values through shared memory
template <bool WRONG>
__device__ void exchange(float* x) {
  __shared__ float tile[32];
  tile[threadIdx.x] = x[threadIdx.x];
  if (!WRONG) __syncwarp();
  x[threadIdx.x] = tile[threadIdx.x ^ 1];  // exchange
}
PAIR(exchange, (float* x), (x))

// neighbouring threads store two halves of one word: no race between them
template <bool WRONG>
__device__ void halves(uint16_t* x) {
  __shared__ uint16_t tile[64];
  tile[WRONG ? threadIdx.x / 2 : threadIdx.x] = x[threadIdx.x];  // halves
  __syncthreads();
  x[threadIdx.x] = tile[63 - threadIdx.x];
}
PAIR(halves, (uint16_t* x), (x))

// one element past the dynamic shared memory
template <bool WRONG>
__device__ void shared_end(float* x) {
  extern __shared__ float dynamic[];
  dynamic[threadIdx.x + WRONG] = x[threadIdx.x];  // shared_end
  __syncthreads();
  x[threadIdx.x] = dynamic[127 - threadIdx.x + WRONG];
}
PAIR(shared_end, (float* x), (x))

// the last element of a tile is not filled, but read
template <bool WRONG>
__device__ void unfilled(float* x) {
  __shared__ float tile[128];
  if (!WRONG || threadIdx.x < 127) tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = tile[127 - threadIdx.x];  // unfilled
}
PAIR(unfilled, (float* x), (x))

// bank conflicts are no fault, but counted: a column of a 32 x 32 tile, and of a 32 x 33 one
template <bool WRONG>
__device__ void transpose(float* x) {
  __shared__ float tile[32][WRONG ? 32 : 33];
  tile[threadIdx.y][threadIdx.x] = x[32 * threadIdx.y + threadIdx.x];
  __syncthreads();
  x[32 * threadIdx.y + threadIdx.x] = tile[threadIdx.x][threadIdx.y];
}
PAIR(transpose, (float* x), (x))

// -- cp.async --------------------------------------------------------------------------------

template <bool WRONG>
__device__ void in_flight(const float* x, float* y) {
  __shared__ __align__(16) float tile[512];
  copy_async(tile + 4 * threadIdx.x, x + 4 * threadIdx.x);
  commit();
  if (!WRONG) wait<0>();
  __syncthreads();
  y[threadIdx.x] = tile[511 - threadIdx.x];  // in_flight
}
PAIR(in_flight, (const float* x, float* y), (x, y))

// a pipeline of two stages: one group may be pending while its predecessor is read
template <bool WRONG>
__device__ void pipeline(const float* x, float* y, int tiles) {
  __shared__ __align__(16) float stage[2][512];
  float sum = 0;
  copy_async(stage[0] + 4 * threadIdx.x, x + 4 * threadIdx.x);
  commit();
  for (int t = 0; t < tiles; t++) {
    if (t + 1 < tiles)
      copy_async(stage[(t + 1) & 1] + 4 * threadIdx.x, x + 512 * (t + 1) + 4 * threadIdx.x);
    commit();
    wait<WRONG ? 2 : 1>();
    __syncthreads();
    sum += stage[t & 1][511 - threadIdx.x];  // pipeline
    __syncthreads();
  }
  y[threadIdx.x] = sum;
}
PAIR(pipeline, (const float* x, float* y, int tiles), (x, y, tiles))

// the buffer that a copy still fills is stored to
template <bool WRONG>
__device__ void overwritten(const float* x, float* y) {
  __shared__ __align__(16) float tile[512];
  copy_async(tile + 4 * threadIdx.x, x + 4 * threadIdx.x);
  commit();
  if (!WRONG) wait<0>();
  tile[4 * threadIdx.x] = 0;  // overwritten
  wait<0>();
  __syncthreads();
  y[threadIdx.x] = tile[511 - threadIdx.x];
}
PAIR(overwritten, (const float* x, float* y), (x, y))

// -- global memory ---------------------------------------------------------------------------

template <bool WRONG>
__device__ void past_end(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (WRONG || i < n) y[i] = 2 * x[min(i, n - 1)];  // past_end
}
PAIR(past_end, (const float* x, float* y, int n), (x, y, n))

template <bool WRONG>
__device__ void misaligned(const float* x, float* y) {
  const float* from = x + 4 * threadIdx.x + WRONG;
  float4 four;
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(four.x), "=f"(four.y), "=f"(four.z), "=f"(four.w)
               : "l"(from));  // misaligned
  y[threadIdx.x] = four.x + four.y + four.z + four.w;
}
PAIR(misaligned, (const float* x, float* y), (x, y))

template <bool WRONG>
__device__ void matrix_row(float* x) {  // a row of ldmatrix starts at a multiple of 16
  __shared__ __align__(16) float tile[64];
  tile[threadIdx.x] = x[threadIdx.x];
  tile[threadIdx.x + 32] = 0;
  __syncwarp();
  uint32_t word, row = shared_address(tile + 4 * (threadIdx.x & 7) + WRONG);
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(word)
               : "r"(row));  // matrix_row
  x[threadIdx.x] = __uint_as_float(word);
}
PAIR(matrix_row, (float* x), (x))

// -- warps and barriers ----------------------------------------------------------------------

// half of a warp shuffles, and says that all of it does
template <bool WRONG>
__device__ void half_warp(int* x) {
  if (threadIdx.x < 16) {
    int other;
    asm volatile("shfl.sync.bfly.b32 %0, %1, 1, 0x1f, %2;"
                 : "=r"(other)
                 : "r"(x[threadIdx.x]), "n"(WRONG ? -1 : 0xffff));  // half_warp
    x[threadIdx.x] = other;
  }
}
PAIR(half_warp, (int* x), (x))

// two warps that wait for each other at different barriers
template <bool WRONG>
__device__ void deadlock(int* x) {
  if (threadIdx.x < 32)
    named_barrier<1>();  // deadlock
  else
    named_barrier<WRONG ? 2 : 1>();
  x[threadIdx.x] = 1;
}
PAIR(deadlock, (int* x), (x))

// -- between blocks --------------------------------------------------------------------------

// every block adds 1 to a counter
template <bool WRONG>
__device__ void lost_update(int* counter) {
  if (threadIdx.x != 0) return;
  if (WRONG)
    *counter = *counter + 1;  // lost_update
  else
    atomicAdd(counter, 1);
}
PAIR(lost_update, (int* counter), (counter))

// block 0 hands a value to the others through a flag
template <bool WRONG>
__device__ void flag(int* ready, int* value, int* seen) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    *value = 42;
    if (WRONG)
      asm volatile("st.relaxed.gpu.global.b32 [%0], 1;" ::"l"(ready) : "memory");
    else
      asm volatile("st.release.gpu.global.b32 [%0], 1;" ::"l"(ready) : "memory");
  } else {
    int now;
    do {
      asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(now) : "l"(ready) : "memory");
    } while (now == 0);
    seen[blockIdx.x] = *value;  // flag
  }
}
PAIR(flag, (int* ready, int* value, int* seen), (ready, value, seen))

// the sum of x in two steps: the last block to finish adds what all blocks left
template <bool WRONG>
__device__ void split_sum(const float* x, float* parts, int* tickets, float* sum) {
  __shared__ bool last;
  __shared__ float lanes[32];
  lanes[threadIdx.x] = x[32 * blockIdx.x + threadIdx.x];
  __syncwarp();
  if (threadIdx.x == 0) {
    float part = 0;
    for (int i = 0; i < 32; i++) part += lanes[i];
    parts[blockIdx.x] = part;
    if (!WRONG) __threadfence();
    last = atomicAdd(tickets, 1) == int(gridDim.x) - 1;
    if (!WRONG) __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float total = 0;
    for (int i = 0; i < int(gridDim.x); i++) total += parts[i];  // split_sum
    *sum = total;
  }
}
PAIR(split_sum, (const float* x, float* parts, int* tickets, float* sum), (x, parts, tickets, sum))

// a lock around a counter, released with or without a fence
template <bool WRONG>
__device__ void lock(int* taken, int* counter) {
  if (threadIdx.x != 0) return;
  while (atomicCAS(taken, 0, 1) != 0) {
  }
  __threadfence();
  *counter = *counter + 1;  // lock
  if (!WRONG) __threadfence();
  atomicExch(taken, 0);
}
PAIR(lock, (int* taken, int* counter), (taken, counter))
