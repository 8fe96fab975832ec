// Tensor maps: what cuTensorMapEncodeTiled makes, in 128 bytes of our own.
#pragma once

#include "values.h"

namespace emu {

struct alignas(64) TensorMap {
  uint32_t magic = 0;
  uint8_t rank = 0, dtype = 0, swizzle = 0, fill_nan = 0;
  uint64_t base = 0;
  uint64_t stride[5] = {};  // bytes; stride[0] is the element's size
  uint32_t dim[5] = {};
  uint16_t box[5] = {};

  static constexpr uint32_t MAGIC = 0x70616d74;
  Type type() const;
  uint32_t element() const { return uint32_t(stride[0]); }
  uint32_t span() const { return swizzle ? 16u << swizzle : 0; }  // bytes; 0: not swizzled
  uint32_t box_bytes() const;
};
static_assert(sizeof(TensorMap) == 128);

// Throws Fault as cuTensorMapEncodeTiled would refuse, or for what is not modelled.
TensorMap encode_tensor_map(int dtype, const void* base, int rank, const uint64_t* dims,
                            const uint64_t* strides, const uint32_t* box,
                            const uint32_t* element_strides, int interleave, int swizzle, int oob);

// Swizzling exchanges 16-byte pieces within a row of 128 bytes: address bits 4 to 6 are xored with
// bits 7 to 9, as many of them as the span has. TMA and wgmma address shared memory through it.
inline uint32_t swizzled(uint32_t address, uint32_t span) {
  uint32_t mask = span == 128 ? 0x70 : span == 64 ? 0x30 : span == 32 ? 0x10 : 0;
  return address ^ ((address >> 3) & mask);
}

}  // namespace emu
