// Read-modify-write operations, for atom, red and the bulk reductions.
#pragma once

#include "values.h"

namespace emu {

enum class Rmw : uint8_t { And, Or, Xor, Exchange, Add, Inc, Dec, Min, Max, Cas };

// One element: what is there, the operand and the compare value in, the new value out.
using Update = uint64_t (*)(uint64_t old, uint64_t operand, uint64_t compare);

// nullptr: there is no such operation. `half_extrema`: .min and .max of 16-bit floats exist.
Update find_update(Rmw op, Type type, bool half_extrema);

}  // namespace emu
