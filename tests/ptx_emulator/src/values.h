// PTX types, and the number formats that the CPU does not have.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

namespace emu {

// A fault of the kernel or of the caller; its text is what emu_error() returns.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[gnu::format(printf, 1, 2)]] std::string format(const char* text, ...);

enum class Type : uint8_t {
  None,
  Pred,
  B8,
  B16,
  B32,
  B64,
  B128,
  U8,
  U16,
  U32,
  U64,
  S8,
  S16,
  S32,
  S64,
  F16,
  BF16,
  F16x2,
  BF16x2,
  U16x2,
  S16x2,
  TF32,
  E4M3,
  E5M2,
  E4M3x2,
  E5M2x2,
  F32,
  F64,
};

Type type_of(std::string_view name);  // Type::None if it is no type
const char* name_of(Type);
int size_of(Type);  // bytes; 0 for predicates
inline bool is_signed(Type t) { return (t >= Type::S8 && t <= Type::S64) || t == Type::S16x2; }
inline bool is_unsigned(Type t) { return t >= Type::U8 && t <= Type::U64; }
inline bool is_integer(Type t) { return t >= Type::U8 && t <= Type::S64; }
inline bool is_bits(Type t) { return t >= Type::B8 && t <= Type::B128; }

using Mask = uint32_t;  // one bit per lane of a warp
constexpr Mask ALL = 0xffffffffu;
constexpr int LANES = 32;

template <class F>
inline void for_lanes(Mask mask, F&& f) {
  for (; mask; mask &= mask - 1) f(std::countr_zero(mask));
}

template <class To, class From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  return std::bit_cast<To>(value);
}

enum class Round : uint8_t { Nearest, Zero, Down, Up, Away };  // .rn .rz .rm .rp .rna

float half_to_float(uint16_t bits);
uint16_t float_to_half(double value, Round round = Round::Nearest);  // overflow: see PTX cvt
inline float bfloat_to_float(uint16_t bits) { return bits_as<float>(uint32_t(bits) << 16); }
uint16_t float_to_bfloat(double value, Round round);
inline uint16_t float_to_bfloat(float value) {  // to the nearest
  uint32_t bits = bits_as<uint32_t>(value);
  return value != value ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
uint32_t float_to_tf32(float value, Round round);
uint8_t float_to_fp8(float value, bool e5m2);  // .rn.satfinite
float fp8_to_float(uint8_t bits, bool e5m2);
float double_to_float(double value, Round round);

// .ftz: subnormals are zero of their sign
inline float flush(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

constexpr uint32_t NAN_F32 = 0x7fffffff;  // what PTX arithmetic returns for NaN
inline float canonical_nan() { return bits_as<float>(NAN_F32); }

}  // namespace emu
