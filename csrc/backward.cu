// Backward: in one pass, or dq_kernel, which also writes delta, then dkv_kernel, which reads it.
#include "backward.cuh"
#include "tile/shared.cuh"

namespace {

// With what is worked out before the launch.
BackwardCall worked_out(const TilemaskBackward& given) {
  BackwardCall call{given};
  const TilemaskSizes& sizes = call.sizes;
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
  return call;
}

bool is_general(const BackwardCall& call) {
  const bool chunked = call.q_chunked && call.k_chunked && call.v_chunked && call.out_chunked &&
                       call.dout_chunked && call.dq_chunked && call.dk_chunked && call.dv_chunked;
  return has_options(call.score) || !chunked || !(call.sizes.scale > LEAST_SCALE);
}

}  // namespace

extern "C" int64_t tilemask_backward_workspace(const TilemaskBackward* given) {
  if (check_call(*given, given->sizes)) return 0;
  const BackwardCall call = worked_out(*given);
  return call.sizes.batch ? dqkv_workspace(call, is_general(call)) : 0;
}

extern "C" int tilemask_backward(const TilemaskBackward* given) {
  TILEMASK_TRY(check_call(*given, given->sizes));
  const BackwardCall call = worked_out(*given);
  if (call.sizes.batch == 0) return TILEMASK_OK;
  const bool general = is_general(call);
  const int64_t needed = dqkv_workspace(call, general);
  if (needed && (!call.workspace || call.workspace_size < needed)) return TILEMASK_NO_WORKSPACE;

  DeviceScope scope(call.head.device);
  TILEMASK_TRY(scope.code());
  if (needed) return launch_dqkv(call);
  TILEMASK_TRY(launch_dq(call, general));
  return launch_dkv(call, general);
}
