// Launching a decoded kernel, for the C interface and for the pose as the CUDA runtime.
#pragma once

#include "machine.h"

namespace emu {

struct LaunchShape {
  std::array<uint32_t, 3> grid, block;
  uint32_t dynamic_shared;
};

// Throws Fault.
void launch(const CompiledModule&, const Program&, const LaunchShape&, const void* const* params,
            const EmuConfig&, const std::vector<EmuBuffer>&, EmuStats&);

void set_error(const std::string& text);

}  // namespace emu
