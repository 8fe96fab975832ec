#include "values.h"

#include <array>
#include <cstdarg>
#include <cstdio>

namespace emu {

std::string format(const char* text, ...) {
  va_list arguments;
  va_start(arguments, text);
  char buffer[2048];
  vsnprintf(buffer, sizeof buffer, text, arguments);
  va_end(arguments);
  return buffer;
}

namespace {

struct TypeInfo {
  const char* name;
  Type type;
  int size;
};

constexpr TypeInfo TYPES[] = {
    {"pred", Type::Pred, 0},     {"b8", Type::B8, 1},       {"b16", Type::B16, 2},
    {"b32", Type::B32, 4},       {"b64", Type::B64, 8},     {"b128", Type::B128, 16},
    {"u8", Type::U8, 1},         {"u16", Type::U16, 2},     {"u32", Type::U32, 4},
    {"u64", Type::U64, 8},       {"s8", Type::S8, 1},       {"s16", Type::S16, 2},
    {"s32", Type::S32, 4},       {"s64", Type::S64, 8},     {"f16", Type::F16, 2},
    {"bf16", Type::BF16, 2},     {"f16x2", Type::F16x2, 4}, {"bf16x2", Type::BF16x2, 4},
    {"u16x2", Type::U16x2, 4},   {"s16x2", Type::S16x2, 4}, {"tf32", Type::TF32, 4},
    {"e4m3", Type::E4M3, 1},     {"e5m2", Type::E5M2, 1},   {"e4m3x2", Type::E4M3x2, 2},
    {"e5m2x2", Type::E5M2x2, 2}, {"f32", Type::F32, 4},     {"f64", Type::F64, 8},
};

const TypeInfo* find(Type type) {
  for (const TypeInfo& info : TYPES)
    if (info.type == type) return &info;
  return nullptr;
}

// |value| >= 0 rounded to `mantissa` explicit bits with the smallest exponent `lowest` (of the
// leading bit of a normal number); `negative` decides the directed modes.
double round_magnitude(double value, int mantissa, int lowest, Round round, bool negative) {
  int exponent = value == 0 ? lowest : std::max(std::ilogb(value), lowest);
  double unit = std::ldexp(1.0, exponent - mantissa), scaled = value / unit;
  double below = std::floor(scaled), rest = scaled - below;
  bool up = false;
  switch (round) {
    case Round::Nearest:
      up = rest > 0.5 || (rest == 0.5 && std::fmod(below, 2) != 0);
      break;
    case Round::Away:
      up = rest >= 0.5;
      break;
    case Round::Zero:
      break;
    case Round::Down:
      up = negative && rest > 0;
      break;
    case Round::Up:
      up = !negative && rest > 0;
      break;
  }
  return (below + up) * unit;
}

// The bits of a rounded magnitude in a format with `mantissa` explicit bits.
uint32_t encode(double value, int mantissa, int lowest) {
  if (value == 0) return 0;
  int exponent = std::ilogb(value);
  if (exponent < lowest) return uint32_t(std::ldexp(value, mantissa - lowest));
  return (uint32_t(exponent - lowest + 1) << mantissa) +
         uint32_t(std::ldexp(value, mantissa - exponent) - std::ldexp(1.0, mantissa));
}

// Past the largest finite number the directed modes stop there, the others give infinity.
bool stays_finite(Round round, bool negative) {
  return round == Round::Zero || (round == Round::Down && !negative) ||
         (round == Round::Up && negative);
}

std::array<float, 65536> half_table() {
  std::array<float, 65536> table;
  for (uint32_t bits = 0; bits < 65536; bits++) {
    uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023, sign = (bits & 0x8000) << 16;
    float magnitude = exponent == 31  ? bits_as<float>(0x7f800000u | mantissa << 13)
                      : exponent == 0 ? std::ldexp(float(mantissa), -24)
                                      : std::ldexp(float(mantissa + 1024), int(exponent) - 25);
    table[bits] = bits_as<float>(bits_as<uint32_t>(magnitude) | sign);
  }
  return table;
}

}  // namespace

Type type_of(std::string_view name) {
  for (const TypeInfo& info : TYPES)
    if (name == info.name) return info.type;
  return Type::None;
}
const char* name_of(Type type) {
  const TypeInfo* info = find(type);
  return info ? info->name : "none";
}
int size_of(Type type) {
  const TypeInfo* info = find(type);
  return info ? info->size : 0;
}

float half_to_float(uint16_t bits) {
  static const std::array<float, 65536> table = half_table();
  return table[bits];
}

uint16_t float_to_half(double value, Round round) {
  if (std::isnan(value)) return 0x7fff;
  bool negative = std::signbit(value);
  uint16_t sign = negative ? 0x8000 : 0;
  float single = float(value);
  if (round == Round::Nearest && double(single) == value) {  // the common case, in integers
    uint32_t bits = bits_as<uint32_t>(single) & 0x7fffffff;
    if (bits >= 0x47800000) return sign | 0x7c00;
    if (bits < 0x38800000)  // subnormal: the addition rounds at the right bit
      return sign | uint16_t(bits_as<uint32_t>(bits_as<float>(bits) + 0.5f) - 0x3f000000);
    return sign | uint16_t((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
  }
  double magnitude = std::fabs(value);
  if (std::isinf(magnitude)) return sign | 0x7c00;
  magnitude = round_magnitude(magnitude, 10, -14, round, negative);
  if (magnitude > 65504) return sign | (stays_finite(round, negative) ? 0x7bff : 0x7c00);
  return sign | uint16_t(encode(magnitude, 10, -14));
}

uint16_t float_to_bfloat(double value, Round round) {
  if (std::isnan(value)) return 0x7fff;
  if (round == Round::Nearest && double(float(value)) == value)
    return float_to_bfloat(float(value));
  bool negative = std::signbit(value);
  uint16_t sign = negative ? 0x8000 : 0;
  double magnitude = std::fabs(value);
  if (std::isinf(magnitude)) return sign | 0x7f80;
  magnitude = round_magnitude(magnitude, 7, -126, round, negative);
  if (magnitude > double(bfloat_to_float(0x7f7f)))
    return sign | (stays_finite(round, negative) ? 0x7f7f : 0x7f80);
  return sign | uint16_t(encode(magnitude, 7, -126));
}

uint32_t float_to_tf32(float value, Round round) {
  uint32_t bits = bits_as<uint32_t>(value);
  if (std::isnan(value)) return NAN_F32;
  if (std::isinf(value)) return bits;
  uint32_t add = round == Round::Away      ? 0x1000
                 : round == Round::Nearest ? 0xfff + (bits >> 13 & 1)
                                           : 0;
  return (bits + add) & ~0x1fffu;  // the 13 bits that the tensor cores do not read
}

uint8_t float_to_fp8(float value, bool e5m2) {
  if (std::isnan(value)) return 0x7f;
  uint8_t sign = std::signbit(value) ? 0x80 : 0;
  int mantissa = e5m2 ? 2 : 3, lowest = e5m2 ? -14 : -6;
  double largest = e5m2 ? 57344 : 448;
  double magnitude = std::fabs(double(value));
  if (magnitude < largest)
    magnitude = round_magnitude(magnitude, mantissa, lowest, Round::Nearest, false);
  return sign | uint8_t(encode(std::min(magnitude, largest), mantissa, lowest));
}

float fp8_to_float(uint8_t bits, bool e5m2) {
  if (e5m2) return half_to_float(uint16_t(bits << 8));
  int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if (exponent == 15 && mantissa == 7) return canonical_nan();
  float magnitude =
      exponent ? std::ldexp(float(mantissa + 8), exponent - 10) : std::ldexp(float(mantissa), -9);
  return bits & 0x80 ? -magnitude : magnitude;
}

float double_to_float(double value, Round round) {
  float nearest = float(value);
  if (round == Round::Nearest || std::isnan(value) || double(nearest) == value) return nearest;
  float infinity = std::numeric_limits<float>::infinity();
  bool above = double(nearest) > value;
  bool want_above = round == Round::Up || (round == Round::Zero && std::signbit(value));
  if (above == want_above) return nearest;
  return std::nextafter(nearest, above ? -infinity : infinity);
}

}  // namespace emu
