// What belongs to no kernel: versions, errors, devices, tile shapes.
#include "forward.cuh"
#include "launch.cuh"
#include "tiles.h"

extern "C" int tilemask_abi(void) { return TILEMASK_ABI; }

extern "C" const char* tilemask_error_text(int code) {
  if (code < 0) return cudaGetErrorString(static_cast<cudaError_t>(-code));
  switch (code) {
    case TILEMASK_OK:
      return "no error";
    case TILEMASK_WRONG_ABI:
      return "the caller's structs are of another version of tilemask";
    case TILEMASK_WRONG_DTYPE:
      return "the call does not compute this dtype";
    case TILEMASK_WRONG_SIZE:
      return "a length, width or count is out of range";
    case TILEMASK_NO_WORKSPACE:
      return "the workspace is missing or too small: see tilemask_*_workspace()";
    case TILEMASK_WRONG_TILE:
      return "tile lists are missing, or were made for another tile: see tilemask_tile()";
    case TILEMASK_NO_KERNEL:
      return "the library has no code for this GPU";
    default:
      return "unknown error";
  }
}

namespace {

__global__ void probe_kernel() {}

}  // namespace

extern "C" int tilemask_check_device(int device) {
  DeviceScope scope(device);
  TILEMASK_TRY(scope.code());
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
    return TILEMASK_NO_KERNEL;
  return code_of(error);
}

extern "C" int tilemask_tile(int kernel, int width, int device, int32_t tile[2]) {
  if (width < 1 || width > WIDEST) return TILEMASK_WRONG_SIZE;
  TileShape shape;
  switch (kernel) {
    case TILEMASK_FORWARD:
      shape = forward_rows(width, device) == forward_tile(width).block_m ? forward_tile(width)
                                                                         : wide_forward_tile(width);
      break;
    case TILEMASK_DECODE:
      shape = decode_tile(width);
      break;
    case TILEMASK_DQ:
      shape = dq_tile(width);
      break;
    case TILEMASK_DKV:
      shape = dkv_tile(width);
      break;
    case TILEMASK_DQKV:
      shape = dqkv_tile(width);
      break;
    default:
      return TILEMASK_WRONG_SIZE;
  }
  tile[0] = shape.block_m;
  tile[1] = shape.block_n;
  return TILEMASK_OK;
}
