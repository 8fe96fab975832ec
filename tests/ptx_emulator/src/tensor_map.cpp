#include "tensor_map.h"

namespace emu {

namespace {

struct Element {
  Type type;
  uint32_t bytes;
};

// CUtensorMapDataType
constexpr Element ELEMENTS[] = {
    {Type::U8, 1},  {Type::U16, 2},  {Type::U32, 4},  {Type::S32, 4}, {Type::U64, 8},
    {Type::S64, 8}, {Type::F16, 2},  {Type::F32, 4},  {Type::F64, 8}, {Type::BF16, 2},
    {Type::F32, 4}, {Type::TF32, 4}, {Type::TF32, 4},
};

void require(bool ok, const std::string& text) {
  if (!ok) throw Fault("tensor map: " + text);
}

}  // namespace

Type TensorMap::type() const { return ELEMENTS[dtype].type; }

uint32_t TensorMap::box_bytes() const {
  uint32_t bytes = element();
  for (int i = 0; i < rank; i++) bytes *= box[i];
  return bytes;
}

TensorMap encode_tensor_map(int dtype, const void* base, int rank, const uint64_t* dims,
                            const uint64_t* strides, const uint32_t* box,
                            const uint32_t* element_strides, int interleave, int swizzle, int oob) {
  TensorMap map;
  require(dtype >= 0 && dtype < int(std::size(ELEMENTS)),
          format("data type %d is not modelled", dtype));
  require(rank >= 1 && rank <= 5, format("rank %d, expected 1 to 5", rank));
  require(interleave == 0, "interleaved layouts are not modelled");
  require(swizzle >= 0 && swizzle <= 3, format("swizzle %d is not modelled", swizzle));
  require(oob == 0 || oob == 1, format("out-of-bounds fill %d", oob));
  uint64_t address = reinterpret_cast<uint64_t>(base);
  require(base && address % 16 == 0, format("base %p is not aligned to 16 bytes", base));
  uint32_t size = ELEMENTS[dtype].bytes;
  map.magic = TensorMap::MAGIC;
  map.rank = uint8_t(rank);
  map.dtype = uint8_t(dtype);
  map.swizzle = uint8_t(swizzle);
  map.fill_nan = uint8_t(oob);
  map.base = address;
  map.stride[0] = size;
  for (int i = 0; i < rank; i++) {
    require(dims[i] >= 1 && dims[i] <= uint64_t(1) << 32,
            format("dimension %d is %llu", i, (unsigned long long)dims[i]));
    require(box[i] >= 1 && box[i] <= 256, format("box[%d] is %u, expected 1 to 256", i, box[i]));
    require(!element_strides || element_strides[i] == 1,
            format("element stride %u is not modelled", element_strides ? element_strides[i] : 0));
    map.dim[i] = uint32_t(std::min<uint64_t>(dims[i], 0xffffffff));
    map.box[i] = uint16_t(box[i]);
    if (i == 0) continue;
    uint64_t stride = strides[i - 1];
    require(stride % 16 == 0 && stride < uint64_t(1) << 40,
            format("stride %d is %llu bytes, expected a multiple of 16 below 2^40", i,
                   (unsigned long long)stride));
    map.stride[i] = stride;
  }
  uint32_t inner = box[0] * size;
  require(inner % 16 == 0, format("the box is %u bytes wide, expected a multiple of 16", inner));
  uint32_t span = map.span();
  require(!span || inner <= span,
          format("the box is %u bytes wide, more than the swizzle's %u", inner, span));
  require(!span || inner == span || rank == 1,
          format("a box of %u bytes below the swizzle's %u is not modelled", inner, span));
  return map;
}

}  // namespace emu
