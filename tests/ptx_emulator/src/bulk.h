// Asynchronous copies in bulk, with and without a tensor map.
#pragma once

#include "decode.h"

namespace emu {

Step bulk_copy(Decoder& d);  // cp.async.bulk..., cp.reduce.async.bulk...
// Performs it now or at a later moment that the schedule chooses.
void defer(Warp& w, std::function<void()> perform);

}  // namespace emu
