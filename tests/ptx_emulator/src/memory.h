// Addresses of lanes turned into checked host memory.
#pragma once

#include "decode.h"

namespace emu {

enum class Sem : uint8_t { Weak, Relaxed, Acquire, Release, AcquireRelease };

struct Place {
  Space space = Space::Global;  // never Generic
  uint64_t address = 0;         // of its space
  uint8_t* host = nullptr;
};

// Where `bytes` at `address` are; faults if they are out of bounds or misaligned.
Place locate(Warp& w, int lane, Space space, uint64_t address, uint32_t bytes, uint32_t align);

// The race checks of an access.
void note_read(Warp& w, int lane, const Place&, uint32_t bytes, bool atomic = false);
void note_write(Warp& w, int lane, const Place&, uint32_t bytes, const uint8_t* incoming,
                bool atomic = false);

// The key of Launch::released.
uint64_t sync_key(Warp& w, const Place&);
void acquire_at(Warp& w, int lane, const Place&, Sem);             // after a read of this kind
void release_at(Warp& w, int lane, const Place&, Sem, bool keep);  // before a write; keep: RMW

Space take_space(Decoder& d);    // .global, .shared, .shared::cta, ...; Generic without one
Sem take_semantics(Decoder& d);  // .relaxed.gpu, .acquire.sys, .volatile, ...

// Wavefronts that shared memory's 32 banks need for these accesses of `bytes` each.
struct Wavefronts {
  uint32_t needed, ideal;
};
Wavefronts wavefronts(const uint32_t* addresses, Mask lanes, uint32_t bytes);

}  // namespace emu
