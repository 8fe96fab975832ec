// Backward: dq_kernel, which also writes delta, then dkv_kernel, which reads it.
#include "backward.cuh"
#include "tile/shared.cuh"

extern "C" int tilemask_backward(const TilemaskBackward* given) {
  TILEMASK_TRY(check_call(*given, given->sizes));
  BackwardCall call{*given};
  const TilemaskSizes& sizes = call.sizes;
  if (sizes.batch == 0) return TILEMASK_OK;
  call.q_chunked = is_chunked(call.q, sizes.width);
  call.k_chunked = is_chunked(call.k, sizes.width);
  call.v_chunked = is_chunked(call.v, sizes.width_v);
  call.out_chunked = is_chunked(call.out, sizes.width_v);
  call.dout_chunked = is_chunked(call.dout, sizes.width_v);
  call.dq_chunked = is_chunked(call.dq, sizes.width);
  call.dk_chunked = is_chunked(call.dk, sizes.width);
  call.dv_chunked = is_chunked(call.dv, sizes.width_v);
  call.scale_log2 = sizes.scale * LOG2_E;
  call.unscale_log2 = 1 / call.scale_log2;
  const bool chunked = call.q_chunked && call.k_chunked && call.v_chunked && call.out_chunked &&
                       call.dout_chunked && call.dq_chunked && call.dk_chunked && call.dv_chunked;
  const bool general = has_options(call.score) || !chunked || !(sizes.scale > LEAST_SCALE);

  DeviceScope scope(call.head.device);
  TILEMASK_TRY(scope.code());
  TILEMASK_TRY(launch_dq(call, general));
  return launch_dkv(call, general);
}
