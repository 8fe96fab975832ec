// A stand-in for the CUDA driver that loads and launches nothing, and counts: enough for Triton to
// go through its whole launch path on a machine without a GPU. Pointers are what the host says.
#include <cstddef>
#include <cstdint>

using std::size_t;

namespace {
int loads = 0, launches = 0;
unsigned grid_x = 0, block_x = 0;
void* first_argument = nullptr;
void* const handle = &loads;
}  // namespace

extern "C" {
int stub_loads() { return loads; }
int stub_launches() { return launches; }
unsigned stub_grid() { return grid_x; }
unsigned stub_block() { return block_x; }
void* stub_first_argument() { return first_argument; }

int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuGetErrorString(int, const char** text) { return *text = "stub", 0; }
int cuDeviceGet(int* device, int) { return *device = 0, 0; }
int cuDeviceGetAttribute(int* value, int, int) { return *value = 232448, 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = handle, 0; }
int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
int cuCtxGetDevice(int* device) { return *device = 0, 0; }
int cuCtxGetCurrent(void** context) { return *context = handle, 0; }
int cuCtxSetCurrent(void*) { return 0; }
int cuCtxPushCurrent_v2(void*) { return 0; }
int cuCtxPopCurrent_v2(void** context) { return *context = handle, 0; }
int cuCtxSetLimit(int, size_t) { return 0; }
int cuCtxGetLimit(size_t* value, int) { return *value = 0, 0; }
int cuModuleLoadData(void** module, const void*) { return *module = handle, ++loads, 0; }
int cuModuleGetFunction(void** function, void*, const char*) { return *function = handle, 0; }
int cuFuncGetAttribute(int* value, int kind, void*) { return *value = kind == 0 ? 1024 : 0, 0; }
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuFuncSetCacheConfig(void*, int) { return 0; }
int cuOccupancyMaxActiveClusters(int* count, void*, const void*) { return *count = 1, 0; }
int cuModuleUnload(void*) { return 0; }
int cuStreamIsCapturing(void*, int* status) { return *status = 0, 0; }
int cuTensorMapEncodeIm2col() { return 0; }
int cuTensorMapEncodeTiled() { return 0; }
int cuPointerGetAttributes() { return 1; }
int cuPointerGetAttribute(void* out, int, uint64_t pointer) {
  return *static_cast<uint64_t*>(out) = pointer, 0;
}

int cuLaunchKernelEx(const unsigned* config, void*, void** arguments, void**) {
  grid_x = config[0], block_x = config[3];
  first_argument = *static_cast<void**>(arguments[0]);
  ++launches;
  return 0;
}
}
