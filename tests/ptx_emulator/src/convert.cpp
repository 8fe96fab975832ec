// cvt: conversions between all types.
#include <algorithm>
#include <cfenv>

#include "decode.h"

namespace emu {

namespace {

struct Rules {
  Type to, from;
  bool ftz = false, saturate = false, relu = false, finite = false;
  Round round = Round::Nearest;
  int to_integer = -1;  // rni rzi rmi rpi
};

bool is_float(Type t) {
  return t == Type::F16 || t == Type::BF16 || t == Type::F32 || t == Type::F64;
}

double load_float(Type t, uint64_t bits) {
  switch (t) {
    case Type::F16:
      return half_to_float(uint16_t(bits));
    case Type::BF16:
      return bfloat_to_float(uint16_t(bits));
    case Type::F32:
      return bits_as<float>(uint32_t(bits));
    default:
      return bits_as<double>(bits);
  }
}

uint64_t store_float(Type t, double x, Round round) {
  switch (t) {
    case Type::F16:
      return float_to_half(x, round);
    case Type::BF16:
      return float_to_bfloat(x, round);
    case Type::F32:
      return std::isnan(x) ? NAN_F32 : bits_as<uint32_t>(double_to_float(x, round));
    default:
      return bits_as<uint64_t>(x);
  }
}

__int128 load_integer(Type t, uint64_t bits) {
  int shift = 64 - 8 * size_of(t);
  if (is_signed(t)) return int64_t(bits << shift) >> shift;
  return bits << shift >> shift;
}

void limits(Type t, __int128& least, __int128& greatest) {
  int bits = 8 * size_of(t);
  least = is_signed(t) ? -(__int128(1) << (bits - 1)) : 0;
  greatest = (__int128(1) << (is_signed(t) ? bits - 1 : bits)) - 1;
}

double round_integral(double x, int mode) {
  switch (mode) {
    case 0:
      return std::nearbyint(x);
    case 1:
      return std::trunc(x);
    case 2:
      return std::floor(x);
    default:
      return std::ceil(x);
  }
}

uint64_t float_to_integer(const Rules& r, double x) {
  if (std::isnan(x)) {  // 0, but the highest bit where 64 bits are involved
    bool wide = size_of(r.to) == 8 || r.from == Type::F64;
    return wide ? uint64_t(1) << (8 * size_of(r.to) - 1) : 0;
  }
  __int128 least, greatest;
  limits(r.to, least, greatest);
  x = round_integral(x, r.to_integer);
  if (x <= double(least)) return uint64_t(least);
  if (x >= double(greatest)) return uint64_t(greatest);
  return uint64_t(__int128(x));
}

uint64_t integer_to_float(const Rules& r, __int128 x) {
  if (r.to == Type::F32 && r.round == Round::Nearest)
    return bits_as<uint32_t>(x < 0 ? float(int64_t(x)) : float(uint64_t(x)));
  if (r.to == Type::F32) {  // a sticky bit keeps the direction beyond 53 bits
    __int128 magnitude = x < 0 ? -x : x;
    if (magnitude >> 54)
      magnitude = (magnitude & ~__int128(0x7ff)) | ((magnitude & 0x7ff) != 0) << 11;
    double y = double(uint64_t(magnitude));
    return bits_as<uint32_t>(double_to_float(x < 0 ? -y : y, r.round));
  }
  if (r.to == Type::F64 && r.round != Round::Nearest) {
    long double exact = x;
    double y = double(exact);
    bool above = (long double)(y) > exact;
    bool want = r.round == Round::Up || (r.round == Round::Zero && x < 0);
    if ((long double)(y) != exact && above != want)
      y = std::nextafter(y, above ? -INFINITY : INFINITY);
    return bits_as<uint64_t>(y);
  }
  return store_float(r.to, x < 0 ? double(int64_t(x)) : double(uint64_t(x)), r.round);
}

uint64_t convert(const Rules& r, uint64_t bits) {
  if (is_float(r.from)) {
    double x = load_float(r.from, bits);
    if (r.ftz && r.from == Type::F32) x = flush(float(x));
    if (!is_float(r.to)) return float_to_integer(r, x);
    if (r.to_integer >= 0) x = round_integral(x, r.to_integer);
    if (r.saturate) x = x > 0 ? std::min(x, 1.0) : 0.0;
    if (r.relu && (x < 0 || x == 0)) x = 0;
    uint64_t out = store_float(r.to, x, r.round);
    if (r.ftz && r.to == Type::F32 && !(out & 0x7f800000)) out &= 0x80000000;
    if (r.finite && !std::isnan(x)) {
      if (r.to == Type::F16 && (out & 0x7fff) == 0x7c00) out -= 1;
      if (r.to == Type::BF16 && (out & 0x7fff) == 0x7f80) out -= 1;
    }
    return out;
  }
  __int128 x = load_integer(r.from, bits);
  if (is_float(r.to)) {
    uint64_t out = integer_to_float(r, x);
    if (r.saturate)
      out = store_float(r.to, std::clamp(load_float(r.to, out), 0.0, 1.0), Round::Nearest);
    return out;
  }
  if (r.saturate) {
    __int128 least, greatest;
    limits(r.to, least, greatest);
    x = std::clamp(x, least, greatest);
  }
  return uint64_t(x);
}

// The value as the destination register holds it: extended by the sign of its type.
uint64_t extend(Type t, uint64_t bits) {
  int shift = 64 - 8 * size_of(t);
  return is_signed(t) ? uint64_t(int64_t(bits << shift) >> shift) : bits << shift >> shift;
}

Step scalar(Decoder& d, Rules r) {
  d.count_is(2);
  for (Type t : {r.to, r.from})
    if (!is_float(t) && !is_integer(t))
      d.reject(format("the type .%s is not for this conversion", name_of(t)));
  if (is_float(r.from) && is_integer(r.to) && r.to_integer < 0)
    d.reject("float to integer needs .rni, .rzi, .rmi or .rpi");
  Ref to = d.out_any(d.raw(0), r.to), a = d.in_any(d.raw(1), r.from);
  if (to.sink) to.width = uint8_t(size_of(r.to));
  int width = size_of(r.from);
  bool plain = !r.saturate && !r.ftz && !r.relu && r.round == Round::Nearest && r.to_integer < 0;
  // the common ones, a vector at a time
  if (plain && to.width == size_of(r.to) && a.width == width) {
    if (r.from == Type::S32 && r.to == Type::F32)
      return unary<float, int32_t>(to, a, [](int32_t x) { return float(x); });
    if (r.from == Type::BF16 && r.to == Type::F32)
      return unary<float, uint16_t>(to, a, [](uint16_t x) {
        float y = bfloat_to_float(x);
        return y != y ? canonical_nan() : y;
      });
    if (r.from == Type::F32 && r.to == Type::BF16)
      return unary<uint16_t, float>(to, a, [](float x) { return float_to_bfloat(x); });
    if (r.from == Type::U32 && size_of(r.to) == 8 && is_integer(r.to))
      return unary<uint64_t, uint32_t>(to, a, [](uint32_t x) { return uint64_t(x); });
    if (r.from == Type::S32 && size_of(r.to) == 8 && is_integer(r.to))
      return unary<int64_t, int32_t>(to, a, [](int32_t x) { return int64_t(x); });
    if (width == 8 && is_integer(r.from) && is_integer(r.to) && size_of(r.to) == 4)
      return unary<uint32_t, uint64_t>(to, a, [](uint64_t x) { return uint32_t(x); });
  }
  return [=](Warp& w, Mask m) {
    for_lanes(m, [&](int l) {
      uint64_t bits = 0;
      std::memcpy(&bits, w.file + a.offset + size_t(l) * a.width, width);
      put(w, to, l, extend(r.to, convert(r, bits)));
    });
  };
}

uint16_t narrow_half(Rules r, bool bfloat, float x) {
  r.from = Type::F32;
  r.to = bfloat ? Type::BF16 : Type::F16;
  return uint16_t(convert(r, bits_as<uint32_t>(x)));
}

// cvt.rn.{f16x2,bf16x2,e4m3x2,e5m2x2}.f32 d, high, low
Step pair_of_floats(Decoder& d, Rules r) {
  d.count_is(3);
  Ref to = d.out(0, r.to), high = d.in(1, Type::F32), low = d.in(2, Type::F32);
  if (r.to == Type::E4M3x2 || r.to == Type::E5M2x2) {
    if (!r.finite) d.reject("expected .satfinite");
    bool e5m2 = r.to == Type::E5M2x2;
    return binary<uint16_t, float, float>(to, high, low, [=](float h, float l) {
      if (r.relu) h = h > 0 || h != h ? h : 0, l = l > 0 || l != l ? l : 0;
      return uint16_t(float_to_fp8(h, e5m2) << 8 | float_to_fp8(l, e5m2));
    });
  }
  bool bfloat = r.to == Type::BF16x2;
  if (bfloat && r.round == Round::Nearest && !r.relu && !r.finite)
    return binary<uint32_t, float, float>(to, high, low, [](float h, float l) {
      return uint32_t(float_to_bfloat(h)) << 16 | float_to_bfloat(l);
    });
  return binary<uint32_t, float, float>(to, high, low, [=](float h, float l) {
    return uint32_t(narrow_half(r, bfloat, h)) << 16 | narrow_half(r, bfloat, l);
  });
}

Step pair_of_fp8(Decoder& d, Rules r) {  // cvt.rn.f16x2.e4m3x2 d, a
  d.count_is(2);
  bool e5m2 = r.from == Type::E5M2x2;
  if (r.to != Type::F16x2) d.reject("expected .f16x2");
  return unary<uint32_t, uint16_t>(d.out(0, r.to), d.in(1, r.from), [=](uint16_t x) {
    uint32_t out = 0;
    for (int shift : {0, 8}) {
      float y = fp8_to_float(uint8_t(x >> shift), e5m2);
      if (r.relu && y < 0) y = 0;
      out |= uint32_t(float_to_half(y)) << 2 * shift;
    }
    return out;
  });
}

Step fp8_of_halves(Decoder& d, Rules r) {  // cvt.rn.satfinite.e4m3x2.f16x2 d, a
  d.count_is(2);
  if (!r.finite) d.reject("expected .satfinite");
  bool e5m2 = r.to == Type::E5M2x2;
  return unary<uint16_t, uint32_t>(d.out(0, r.to), d.in(1, r.from), [=](uint32_t x) {
    uint16_t out = 0;
    for (int i = 0; i < 2; i++) {
      float y = half_to_float(uint16_t(x >> 16 * i));
      if (r.relu && y < 0) y = 0;
      out |= uint16_t(float_to_fp8(y, e5m2) << 8 * i);
    }
    return out;
  });
}

Step pack_saturated(Decoder& d) {  // cvt.pack.sat.u16.s32 d, a, b; .u8.s32.b32 d, a, b, c
  if (!d.mod("sat")) d.reject("expected .sat");
  Type part = d.type(), from = d.type(), rest = d.optional_type();
  if (from != Type::S32 || (size_of(part) == 2) != (rest == Type::None))
    d.reject("this form of cvt.pack is not known");
  d.count_is(rest == Type::None ? 3 : 4);
  __int128 least, greatest;
  limits(part, least, greatest);
  int bits = 8 * size_of(part);
  int64_t lo = int64_t(least), hi = int64_t(greatest);
  Ref c = rest == Type::None ? d.literal(0, 4) : d.in(3, rest);
  return ternary<uint32_t, int32_t, int32_t, uint32_t>(
      d.out(0, Type::B32), d.in(1, from), d.in(2, from), c,
      [=](int32_t a, int32_t b, uint32_t keep) {
        uint32_t mask = (1u << bits) - 1;
        uint32_t x = uint32_t(std::clamp<int64_t>(a, lo, hi)) & mask;
        uint32_t y = uint32_t(std::clamp<int64_t>(b, lo, hi)) & mask;
        return (bits == 16 ? 0 : keep << 16) | x << bits | y;
      });
}

Step cvt(Decoder& d) {
  if (d.mod("pack")) return pack_saturated(d);
  Rules r;
  r.to_integer = d.one_of({"rni", "rzi", "rmi", "rpi"}, true);
  r.round = d.round();
  r.ftz = d.mod("ftz");
  r.saturate = d.mod("sat");
  r.relu = d.mod("relu");
  r.finite = d.mod("satfinite");
  r.to = d.type();
  r.from = d.type();
  switch (r.to) {
    case Type::F16x2:
      if (r.from == Type::E4M3x2 || r.from == Type::E5M2x2) return pair_of_fp8(d, r);
      [[fallthrough]];
    case Type::BF16x2:
      if (r.from != Type::F32) break;
      return pair_of_floats(d, r);
    case Type::E4M3x2:
    case Type::E5M2x2:
      if (r.from == Type::F16x2) return fp8_of_halves(d, r);
      if (r.from != Type::F32) break;
      return pair_of_floats(d, r);
    case Type::TF32:
      d.count_is(2);
      if (r.from != Type::F32) break;
      return unary<uint32_t, float>(d.out(0, Type::B32), d.in(1, r.from), [r](float x) {
        if (r.relu && x < 0) x = 0;
        return float_to_tf32(x, r.round);
      });
    default:
      return scalar(d, r);
  }
  d.reject(format("no conversion from .%s to .%s is known", name_of(r.from), name_of(r.to)));
}

}  // namespace

DecodeFunction find_convert(const std::string& opcode) { return opcode == "cvt" ? cvt : nullptr; }

}  // namespace emu
