// Barrier objects in shared memory, for the instructions that arrive on them.
#pragma once

#include "machine.h"

namespace emu {

Mbarrier& mbarrier_at(Warp& w, int lane, uint32_t address);
void mbarrier_arrive(Warp& w, int lane, uint32_t address, uint32_t count);
void mbarrier_expect(Warp& w, int lane, uint32_t address, int64_t bytes);
// An asynchronous copy brought `bytes`; from now on the phase's waiters see what it wrote.
void mbarrier_complete_bytes(Block& block, uint32_t address, int64_t bytes);
// The event that such a copy's writes carry, to be released by the barrier's current phase.
Event mbarrier_async_event(Block& block, Mbarrier& b);

}  // namespace emu
