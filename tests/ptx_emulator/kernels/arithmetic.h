// What C++ lacks of PTX arithmetic, for the reference of micro_alu.py. Types have PTX's names.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
using s8 = int8_t;
using u8 = uint8_t;
using s16 = int16_t;
using u16 = uint16_t;
using s32 = int32_t;
using u32 = uint32_t;
using s64 = int64_t;
using u64 = uint64_t;
using s128 = __int128;
using u128 = unsigned __int128;
using b16 = u16;
using b32 = u32;
using b64 = u64;
using f16 = _Float16;
using f32 = float;
using f64 = double;
using pred = u32;
using f16x2 = u32;
using bf16x2 = u32;
template <class To, class From>
To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
struct bf16 {
  u16 raw;
  bf16() = default;
  explicit bf16(float x) {
    u32 v = bits<u32>(x);
    raw = std::isnan(x) ? 0x7fff : u16((v + 0x7fff + (v >> 16 & 1)) >> 16);
  }
  operator float() const { return bits<float>(u32(raw) << 16); }
};
inline float ftz(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}
template <class T>
T least(T x, T y) {  // min.f32: a number beats NaN, -0 is less than +0
  if (std::isnan(float(x))) return y;
  if (std::isnan(float(y))) return x;
  if (float(x) == float(y)) return std::signbit(float(x)) ? x : y;
  return float(x) < float(y) ? x : y;
}
template <class T>
T most(T x, T y) {
  if (std::isnan(float(x))) return y;
  if (std::isnan(float(y))) return x;
  if (float(x) == float(y)) return std::signbit(float(x)) ? y : x;
  return float(x) > float(y) ? x : y;
}
// float to integer: clamped; of NaN 0, but 1 << (width - 1) where 64 bits are involved
template <class To, class From>
To integer(From x) {
  using L = std::numeric_limits<To>;
  bool wide = sizeof(To) == 8 || sizeof(From) == 8;
  if (std::isnan(x)) return wide ? To(To(1) << (sizeof(To) * 8 - 1)) : 0;
  if (double(x) <= double(L::min())) return L::min();
  if (double(x) >= std::ldexp(1.0, L::digits)) return L::max();
  return To(x);
}
template <class To, class From>
To clamped(From x) {
  using L = std::numeric_limits<To>;
  return s128(x) < s128(L::min()) ? L::min() : s128(x) > s128(L::max()) ? L::max() : To(x);
}
inline float saturated(float x) {  // NaN and -0 become +0
  return x > 0 ? std::min(x, 1.0f) : 0.0f;
}
template <class T>
T shifted_right(T x, u32 n) {
  u32 width = sizeof(T) * 8;
  return n < width ? T(x >> n) : T(x < 0 ? -1 : 0);
}
template <class T>
T shifted_left(T x, u32 n) {
  return n < sizeof(T) * 8 ? T(x << n) : T(0);
}
template <class T>
T extracted(T x, u32 start, u32 length) {  // bfe
  u32 width = sizeof(T) * 8;
  start &= 255;
  length &= 255;
  bool is_signed = std::numeric_limits<T>::is_signed;
  u64 raw = width == 32 ? u64(u32(x)) : u64(x);
  bool sign = is_signed && length && (raw >> std::min(start + length - 1, width - 1) & 1);
  u64 result = 0;
  for (u32 i = 0; i < width; i++) {
    bool bit = i < length && start + i < width ? raw >> (start + i) & 1 : sign;
    result |= u64(bit) << i;
  }
  return T(result);
}
template <class T>
T inserted(T x, T y, u32 start, u32 length) {  // bfi of x into y
  u32 width = sizeof(T) * 8;
  start &= 255;
  length &= 255;
  for (u32 i = 0; i < length && start + i < width; i++) {
    T place = T(1) << (start + i);
    y = (y & ~place) | ((x >> i & 1) << (start + i));
  }
  return y;
}
template <class T>
u32 highest(T x) {  // bfind
  if (std::numeric_limits<T>::is_signed && x < 0) x = ~x;
  for (int i = sizeof(T) * 8 - 1; i >= 0; i--)
    if (u64(x) >> i & 1) return i;
  return 0xffffffff;
}
template <class T>
T reversed(T x) {
  T y = 0;
  for (u32 i = 0; i < sizeof(T) * 8; i++) y |= (x >> i & 1) << (sizeof(T) * 8 - 1 - i);
  return y;
}
inline u32 permuted(u32 x, u32 y, u32 how) {
  u64 bytes = u64(y) << 32 | x;
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    u32 pick = how >> 4 * i & 15, byte = bytes >> 8 * (pick & 7) & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}
inline u32 logic(u32 x, u32 y, u32 z, u32 table) {  // lop3
  u32 result = 0;
  for (int i = 0; i < 32; i++) {
    u32 row = (x >> i & 1) << 2 | (y >> i & 1) << 1 | (z >> i & 1);
    result |= (table >> row & 1) << i;
  }
  return result;
}
inline u32 funnel_left(u32 low, u32 high, u32 n) {
  return n ? u32((u64(high) << 32 | low) << n >> 32) : high;
}
inline u32 funnel_right(u32 low, u32 high, u32 n) { return u32((u64(high) << 32 | low) >> n); }
inline float towards_zero(double x) {
  float y = float(x);
  if (std::isfinite(x) && std::fabs(double(y)) > std::fabs(x)) y = std::nextafter(y, 0.0f);
  return y;
}
// rounded so that rounding the result again, to at least two bits less, is as rounding x once
inline float to_odd(double x) {
  float y = towards_zero(x);
  return std::isfinite(x) && double(y) != x ? bits<float>(bits<u32>(y) | 1) : y;
}
inline float tf32(float x) {  // to nearest, ties away from zero
  u32 v = bits<u32>(x);
  if (std::isnan(x) || std::isinf(x)) return x;
  return bits<float>((v + 0x1000) & ~0x1fffu);
}
inline u32 pair(u16 low, u16 high) { return u32(high) << 16 | low; }
template <class T>
T low(u32 x) {
  return bits<T>(u16(x));
}
template <class T>
T high(u32 x) {
  return bits<T>(u16(x >> 16));
}
template <class T>
u16 raw(T x) {
  return bits<u16>(x);
}
template <>
u16 raw<bf16>(bf16 x) {
  return x.raw;
}
template <>
bf16 low<bf16>(u32 x) {
  bf16 y;
  y.raw = u16(x);
  return y;
}
template <>
bf16 high<bf16>(u32 x) {
  bf16 y;
  y.raw = u16(x >> 16);
  return y;
}
