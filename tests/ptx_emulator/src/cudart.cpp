// The pose as the CUDA runtime: a library linked against this one in place of cudart registers its
// kernels here and launches them on host memory. The PTX is taken from the fat binary, which must
// be uncompressed (nvcc -gencode arch=compute_80,code=compute_80 -Xfatbin -compress=false).
#include <cstdlib>
#include <cstring>

#include "launch.h"
#include "tensor_map.h"

namespace emu {

namespace {

// cudaError_t and CUresult, as far as they are returned here
enum Error : int {
  Success = 0,
  InvalidValue = 1,
  MemoryAllocation = 2,
  InvalidConfiguration = 9,
  InvalidDeviceFunction = 98,
  InvalidDevice = 101,
  NoKernelImage = 209,
  SymbolNotFound = 500,
  LaunchFailure = 719,
  NotSupported = 801,
};

struct ErrorName {
  Error error;
  const char *name, *text;
};
constexpr ErrorName ERRORS[] = {
    {Success, "cudaSuccess", "no error"},
    {InvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {MemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {InvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {InvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {InvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {NoKernelImage, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {SymbolNotFound, "cudaErrorSymbolNotFound", "named symbol not found"},
    {LaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {NotSupported, "cudaErrorNotSupported", "operation not supported"},
};

struct Dim3 {
  uint32_t x, y, z;
};

struct FatBinary {
  const uint8_t* data = nullptr;
  std::map<int, std::unique_ptr<CompiledModule>> modules;  // by the architecture asked for
};

struct Kernel {
  FatBinary* binary = nullptr;
  std::string name;
  uint32_t dynamic_limit = 48 * 1024;  // cudaFuncSetAttribute raises it
};

struct PushedCall {
  Dim3 grid, block;
  size_t shared;
  void* stream;
};

struct Launched {
  std::string kernel;
  EmuStats stats;
  int device;
};

struct Runtime {
  int arch = 80;
  EmuConfig config{};
  std::vector<EmuBuffer> buffers;
  std::vector<std::unique_ptr<FatBinary>> binaries;
  std::map<const void*, Kernel> kernels;                                // by host function
  std::map<const void*, std::pair<FatBinary*, std::string>> variables;  // by host variable
  std::vector<PushedCall> calls;
  std::vector<Launched> launches;
  Error last = Success;
  int devices = 1;
  std::map<int, int> retained, released;  // primary contexts, by device: how often
  std::vector<int> pushed;                // devices whose context is current, the last one on top

  int device() const { return pushed.empty() ? 0 : pushed.back(); }
};

// Registration runs before other static constructors.
Runtime& runtime() {
  static Runtime* one = new Runtime;
  return *one;
}

Error remember(Error e) {
  if (e != Success) runtime().last = e;
  return e;
}

Error fail(Error e, const std::string& text) {
  set_error(text);
  return remember(e);
}

// of a block; a multiprocessor has 1 KiB more
uint32_t shared_limit() {
  const int arch = runtime().arch;
  const bool small = arch == 86 || arch == 89 || arch >= 120;
  return (small ? 99 : arch >= 90 ? 227 : 163) * 1024;
}

template <class T>
T read(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// The PTX text of the fat binary for the highest architecture that this one can run.
std::string ptx_of(const FatBinary& binary) {
  const uint8_t* at = binary.data;
  if (read<uint32_t>(at) != 0xba55ed50) throw Fault("the fat binary is not understood");
  const uint8_t* end = at + read<uint16_t>(at + 6) + read<uint64_t>(at + 8);
  at += read<uint16_t>(at + 6);
  std::string best;
  int best_arch = -1;
  while (at < end) {
    uint16_t kind = read<uint16_t>(at);
    uint32_t header = read<uint32_t>(at + 4);
    uint64_t size = read<uint64_t>(at + 8);
    int arch = int(read<uint32_t>(at + 28));
    const char* text = reinterpret_cast<const char*>(at + header);
    if (kind == 1 && arch <= runtime().arch && arch > best_arch) {
      std::string ptx(text, strnlen(text, size));
      if (ptx.find(".version") == std::string::npos)
        throw Fault("the PTX in the fat binary is compressed: build with -Xfatbin -compress=false");
      best = ptx;
      best_arch = arch;
    }
    at += header + size;
  }
  if (best_arch < 0)
    throw Fault(
        format("the fat binary has no PTX for sm_%d: build with "
               "-gencode arch=compute_%d,code=compute_%d",
               runtime().arch, runtime().arch, runtime().arch));
  return best;
}

CompiledModule& module_of(FatBinary& binary) {
  auto& module = binary.modules[runtime().arch];
  if (!module) module = std::make_unique<CompiledModule>(ptx_of(binary).c_str());
  return *module;
}

Kernel* kernel_of(const void* function) {
  auto found = runtime().kernels.find(function);
  return found == runtime().kernels.end() ? nullptr : &found->second;
}

Error launch_kernel(const void* function, Dim3 grid, Dim3 block, void** params, size_t shared,
                    bool cooperative) {
  Runtime& r = runtime();
  Kernel* kernel = kernel_of(function);
  if (!kernel) return fail(InvalidDeviceFunction, "the launched function was not registered");
  try {
    CompiledModule& module = module_of(*kernel->binary);
    const Program* program = module.find(kernel->name);
    if (!program) return fail(InvalidDeviceFunction, "the PTX has no kernel " + kernel->name);
    if (shared > kernel->dynamic_limit || program->own_shared + shared > shared_limit())
      return fail(InvalidValue, format("%s: %zu bytes of dynamic and %u of static shared memory; "
                                       "cudaFuncSetAttribute allows %u, the device %u",
                                       kernel->name.c_str(), shared, program->own_shared,
                                       kernel->dynamic_limit, shared_limit()));
    uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (blocks == 0 || threads == 0 || threads > 1024)
      return fail(InvalidConfiguration,
                  format("%s: %llu blocks of %llu threads", kernel->name.c_str(),
                         (unsigned long long)blocks, (unsigned long long)threads));
    EmuConfig config = r.config;
    if (cooperative) config.resident_blocks = int32_t(blocks);
    LaunchShape shape{{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, uint32_t(shared)};
    EmuStats stats{};
    launch(module, *program, shape, params, config, r.buffers, stats);
    r.launches.push_back({kernel->name, stats, r.device()});
    return Success;
  } catch (const std::exception& e) {
    return fail(LaunchFailure, e.what());
  }
}

int encode_tiled(void* map, int dtype, uint32_t rank, void* base, const uint64_t* dims,
                 const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                 int interleave, int swizzle, int l2, int oob) {
  return emu_tensor_map(map, dtype, base, int(rank), dims, strides, box, element_strides,
                        interleave, swizzle, l2, oob)
             ? InvalidValue
             : Success;
}

// Primary contexts of the driver: a handle is the device's number + 1.
enum : int { InvalidContext = 201 };

int retain_context(void** context, int device) {
  if (device < 0 || device >= runtime().devices) return InvalidDevice;
  ++runtime().retained[device];
  *context = reinterpret_cast<void*>(intptr_t(device) + 1);
  return Success;
}

int release_context(int device) {
  Runtime& r = runtime();
  if (r.retained[device] == r.released[device]) return InvalidContext;
  ++r.released[device];
  return Success;
}

int push_context(void* context) {
  runtime().pushed.push_back(int(reinterpret_cast<intptr_t>(context)) - 1);
  return Success;
}

int pop_context(void** context) {
  Runtime& r = runtime();
  if (r.pushed.empty()) return InvalidContext;
  *context = reinterpret_cast<void*>(intptr_t(r.device()) + 1);
  r.pushed.pop_back();
  return Success;
}

Error entry_point(const char* symbol, void** function, int* status) {
  static const std::map<std::string, void*> KNOWN = {
      {"cuTensorMapEncodeTiled", reinterpret_cast<void*>(encode_tiled)},
      {"cuDevicePrimaryCtxRetain", reinterpret_cast<void*>(retain_context)},
      {"cuDevicePrimaryCtxRelease", reinterpret_cast<void*>(release_context)},
      {"cuCtxPushCurrent", reinterpret_cast<void*>(push_context)},
      {"cuCtxPopCurrent", reinterpret_cast<void*>(pop_context)},
  };
  auto found = KNOWN.find(symbol);
  bool known = found != KNOWN.end();
  *function = known ? found->second : nullptr;
  if (status) *status = known ? 0 : 1;  // cudaDriverEntryPointSymbolNotFound
  if (!known) set_error(std::string("the driver's ") + symbol + " is not provided");
  return known || status ? Success : remember(SymbolNotFound);
}

Error variable_address(void** address, const void* symbol) {
  auto found = runtime().variables.find(symbol);
  if (found == runtime().variables.end())
    return fail(InvalidValue, "the variable was not registered");
  try {
    CompiledModule& module = module_of(*found->second.first);
    auto at = module.addresses.find(found->second.second);
    if (at == module.addresses.end()) return fail(SymbolNotFound, found->second.second);
    *address = reinterpret_cast<void*>(at->second);
    return Success;
  } catch (const std::exception& e) {
    return fail(InvalidValue, e.what());
  }
}

}  // namespace

}  // namespace emu

using namespace emu;

// cudaFuncAttributes and cudaLaunchConfig_t, whose layouts are part of the runtime's ABI
struct FunctionAttributes {
  size_t shared, constant, local;
  int max_threads, registers, ptx_version, binary_version, cache_mode, max_dynamic_shared, carveout;
};
struct LaunchAttribute {
  int id;
  int padding;
  uint32_t value[16];
};
struct LaunchConfig {
  Dim3 grid, block;
  size_t shared;
  void* stream;
  const LaunchAttribute* attributes;
  uint32_t count;
};
struct FatBinaryWrapper {
  int magic, version;
  const uint8_t* data;
  void* file;
};

extern "C" {

EMU_API void emu_set_arch(int arch) { runtime().arch = arch; }

EMU_API void emu_configure(const EmuConfig* config, const EmuBuffer* buffers, int count) {
  runtime().config = *config;
  runtime().buffers.assign(buffers, buffers + count);
  runtime().last = Success;
}

EMU_API int emu_launches(void) { return int(runtime().launches.size()); }
EMU_API const char* emu_launch_kernel(int index) {
  return runtime().launches.at(size_t(index)).kernel.c_str();
}
EMU_API const EmuStats* emu_launch_stats(int index) {
  return &runtime().launches.at(size_t(index)).stats;
}
EMU_API int emu_launch_device(int index) { return runtime().launches.at(size_t(index)).device; }
EMU_API void emu_forget_launches(void) { runtime().launches.clear(); }

EMU_API void emu_set_devices(int count) {
  Runtime& r = runtime();
  r.devices = count;
  r.retained.clear();
  r.released.clear();
  r.pushed.clear();
}
EMU_API int emu_contexts_made(int device) { return runtime().retained[device]; }
EMU_API int emu_contexts_open(void) {
  const Runtime& r = runtime();
  int open = int(r.pushed.size());
  for (auto& [device, count] : r.retained) open += count;
  for (auto& [device, count] : r.released) open -= count;
  return open;
}

// ---- what nvcc's host code calls ----

EMU_API void** __cudaRegisterFatBinary(void* wrapper) {
  auto binary = std::make_unique<FatBinary>();
  binary->data = static_cast<FatBinaryWrapper*>(wrapper)->data;
  runtime().binaries.push_back(std::move(binary));
  return reinterpret_cast<void**>(runtime().binaries.back().get());
}
EMU_API void __cudaRegisterFatBinaryEnd(void**) {}

EMU_API void __cudaUnregisterFatBinary(void** handle) {
  Runtime& r = runtime();
  auto* binary = reinterpret_cast<FatBinary*>(handle);
  std::erase_if(r.kernels, [&](const auto& k) { return k.second.binary == binary; });
  std::erase_if(r.variables, [&](const auto& v) { return v.second.first == binary; });
  std::erase_if(r.binaries, [&](const auto& b) { return b.get() == binary; });
}

EMU_API void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int,
                                    void*, void*, void*, void*, int*) {
  runtime().kernels[host] = Kernel{reinterpret_cast<FatBinary*>(handle), name, 48 * 1024};
}
EMU_API void __cudaRegisterVar(void** handle, char* host, char*, const char* name, int, size_t, int,
                               int) {
  runtime().variables[host] = {reinterpret_cast<FatBinary*>(handle), name};
}
EMU_API char __cudaInitModule(void**) { return 1; }

EMU_API uint32_t __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  runtime().calls.push_back({grid, block, shared, stream});
  return 0;
}
EMU_API int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
  if (runtime().calls.empty()) return remember(InvalidConfiguration);
  PushedCall call = runtime().calls.back();
  runtime().calls.pop_back();
  *grid = call.grid;
  *block = call.block;
  *shared = call.shared;
  *static_cast<void**>(stream) = call.stream;
  return Success;
}
EMU_API int __cudaGetKernel(void** kernel, const void* function) {
  *kernel = const_cast<void*>(function);
  return Success;
}
EMU_API int cudaLaunchKernel(const void* function, Dim3 grid, Dim3 block, void** params,
                             size_t shared, void*) {
  return launch_kernel(function, grid, block, params, shared, false);
}
EMU_API int __cudaLaunchKernel(const void* function, Dim3 grid, Dim3 block, void** params,
                               size_t shared, void*) {
  return launch_kernel(function, grid, block, params, shared, false);
}
EMU_API int cudaLaunchCooperativeKernel(const void* function, Dim3 grid, Dim3 block, void** params,
                                        size_t shared, void*) {
  return launch_kernel(function, grid, block, params, shared, true);
}
EMU_API int cudaLaunchKernelExC(const LaunchConfig* c, const void* function, void** params) {
  bool cooperative = false;
  for (uint32_t i = 0; i < c->count; i++) {
    const LaunchAttribute& a = c->attributes[i];
    if (a.id == 2) cooperative = a.value[0] != 0;  // cudaLaunchAttributeCooperative
    // cudaLaunchAttributeClusterDimension
    if (a.id == 4 && (a.value[0] > 1 || a.value[1] > 1 || a.value[2] > 1))
      return fail(NotSupported, "clusters of several blocks are not modelled");
  }
  return launch_kernel(function, c->grid, c->block, params, c->shared, cooperative);
}

// ---- functions and devices ----

EMU_API int cudaFuncSetAttribute(const void* function, int attribute, int value) {
  Kernel* kernel = kernel_of(function);
  if (!kernel) return fail(InvalidDeviceFunction, "the function was not registered");
  if (attribute == 9) return Success;  // cudaFuncAttributePreferredSharedMemoryCarveout
  if (attribute != 8)                  // cudaFuncAttributeMaxDynamicSharedMemorySize
    return fail(NotSupported, format("cudaFuncSetAttribute: attribute %d", attribute));
  if (value < 0 || uint32_t(value) > shared_limit())
    return fail(InvalidValue, format("cudaFuncSetAttribute: %d bytes of dynamic shared memory, the "
                                     "device has %u",
                                     value, shared_limit()));
  kernel->dynamic_limit = uint32_t(value);
  return Success;
}

EMU_API int cudaFuncGetAttributes(FunctionAttributes* out, const void* function) {
  Kernel* kernel = kernel_of(function);
  if (!kernel) return fail(InvalidDeviceFunction, "the function was not registered");
  try {
    const Program* p = module_of(*kernel->binary).find(kernel->name);
    if (!p) return fail(InvalidDeviceFunction, "the PTX has no kernel " + kernel->name);
    uint32_t most = p->function.max_threads;
    *out = FunctionAttributes{};
    out->shared = p->own_shared;
    out->local = p->local_bytes;
    out->max_threads = most ? int(most) : 1024;
    out->ptx_version = out->binary_version = runtime().arch;
    out->max_dynamic_shared = int(kernel->dynamic_limit);
    return Success;
  } catch (const std::exception& e) {
    return fail(NoKernelImage, e.what());
  }
}

EMU_API int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks,
                                                                   const void* function,
                                                                   int threads, size_t shared,
                                                                   uint32_t) {
  FunctionAttributes a;
  if (int e = cudaFuncGetAttributes(&a, function)) return e;
  size_t bytes = a.shared + shared + 1024;
  *blocks = threads <= 0
                ? 0
                : int(std::min<size_t>(2048 / size_t(threads), (shared_limit() + 1024) / bytes));
  return Success;
}
EMU_API int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function,
                                                          int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared,
                                                                0);
}

EMU_API int cudaGetDevice(int* device) {
  *device = runtime().device();
  return Success;
}
EMU_API int cudaSetDevice(int device) {
  return remember(device == runtime().device() ? Success : InvalidDevice);
}
EMU_API int cudaGetDeviceCount(int* count) {
  *count = runtime().devices;
  return Success;
}

EMU_API int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  const Runtime& r = runtime();
  if (device < 0 || device >= r.devices) return remember(InvalidDevice);
  switch (attribute) {  // cudaDeviceAttr
    case 1:             // MaxThreadsPerBlock
      *value = 1024;
      break;
    case 8:  // MaxSharedMemoryPerBlock
      *value = 48 * 1024;
      break;
    case 10:  // WarpSize
      *value = 32;
      break;
    case 12:  // MaxRegistersPerBlock
    case 82:  // MaxRegistersPerMultiprocessor
      *value = 65536;
      break;
    case 16:  // MultiProcessorCount
      *value = r.config.multiprocessors > 0 ? r.config.multiprocessors : 132;
      break;
    case 38:  // L2CacheSize
      *value = 50 << 20;
      break;
    case 39:  // MaxThreadsPerMultiProcessor
      *value = 2048;
      break;
    case 75:  // ComputeCapabilityMajor
      *value = r.arch / 10;
      break;
    case 76:  // ComputeCapabilityMinor
      *value = r.arch % 10;
      break;
    case 81:  // MaxSharedMemoryPerMultiprocessor
      *value = int(shared_limit()) + 1024;
      break;
    case 95:  // CooperativeLaunch
      *value = 1;
      break;
    case 97:  // MaxSharedMemoryPerBlockOptin
      *value = int(shared_limit());
      break;
    case 111:  // ReservedSharedMemoryPerBlock
      *value = 1024;
      break;
    default:
      return fail(InvalidValue, format("cudaDeviceGetAttribute: attribute %d", attribute));
  }
  return Success;
}

EMU_API int cudaGetDriverEntryPoint(const char* symbol, void** function, unsigned long long,
                                    int* status) {
  return entry_point(symbol, function, status);
}
EMU_API int cudaGetDriverEntryPointByVersion(const char* symbol, void** function, uint32_t,
                                             unsigned long long, int* status) {
  return entry_point(symbol, function, status);
}
EMU_API int cuTensorMapEncodeTiled(void* map, int dtype, uint32_t rank, void* base,
                                   const uint64_t* dims, const uint64_t* strides,
                                   const uint32_t* box, const uint32_t* element_strides,
                                   int interleave, int swizzle, int l2, int oob) {
  return encode_tiled(map, dtype, rank, base, dims, strides, box, element_strides, interleave,
                      swizzle, l2, oob);
}

// ---- errors ----

EMU_API int cudaPeekAtLastError(void) { return runtime().last; }
EMU_API int cudaGetLastError(void) {
  Error e = runtime().last;
  runtime().last = Success;
  return e;
}
EMU_API const char* cudaGetErrorName(int error) {
  for (const ErrorName& e : ERRORS)
    if (e.error == error) return e.name;
  return "unrecognized error code";
}
EMU_API const char* cudaGetErrorString(int error) {
  for (const ErrorName& e : ERRORS)
    if (e.error == error) return e.text;
  return "unrecognized error code";
}

// ---- memory and streams: everything is host memory, and done at once ----

EMU_API int cudaMalloc(void** memory, size_t bytes) {
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *memory || bytes == 0 ? Success : remember(MemoryAllocation);
}
EMU_API int cudaFree(void* memory) {
  std::free(memory);
  return Success;
}
EMU_API int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, void*) {
  std::memmove(to, from, bytes);
  return Success;
}
EMU_API int cudaMemcpy(void* to, const void* from, size_t bytes, int) {
  std::memmove(to, from, bytes);
  return Success;
}
EMU_API int cudaMemsetAsync(void* memory, int value, size_t bytes, void*) {
  std::memset(memory, value, bytes);
  return Success;
}
EMU_API int cudaMemset(void* memory, int value, size_t bytes) {
  std::memset(memory, value, bytes);
  return Success;
}
EMU_API int cudaGetSymbolAddress(void** address, const void* symbol) {
  return variable_address(address, symbol);
}
EMU_API int cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset,
                               int) {
  void* to;
  if (int e = variable_address(&to, symbol)) return e;
  std::memcpy(static_cast<uint8_t*>(to) + offset, from, bytes);
  return Success;
}
EMU_API int cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset, int) {
  void* from;
  if (int e = variable_address(&from, symbol)) return e;
  std::memcpy(to, static_cast<uint8_t*>(from) + offset, bytes);
  return Success;
}
EMU_API int cudaStreamSynchronize(void*) { return Success; }
EMU_API int cudaDeviceSynchronize(void) { return Success; }
EMU_API int cudaStreamIsCapturing(void*, int* status) {
  *status = 0;
  return Success;
}

}  // extern "C"
