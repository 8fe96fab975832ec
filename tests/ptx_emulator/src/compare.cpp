// Comparison: setp and set.
#include "decode.h"

namespace emu {

namespace {

enum class Compare { Eq, Ne, Lt, Le, Gt, Ge, Equ, Neu, Ltu, Leu, Gtu, Geu, Num, Nan };

template <Compare C>
struct Comparison {
  template <class T>
  bool operator()(T a, T b) const {
    bool unordered = a != a || b != b;
    switch (C) {
      case Compare::Eq:
        return a == b;
      case Compare::Ne:
        return !unordered && a != b;
      case Compare::Lt:
        return a < b;
      case Compare::Le:
        return a <= b;
      case Compare::Gt:
        return a > b;
      case Compare::Ge:
        return a >= b;
      case Compare::Equ:
        return unordered || a == b;
      case Compare::Neu:
        return unordered || a != b;
      case Compare::Ltu:
        return unordered || a < b;
      case Compare::Leu:
        return unordered || a <= b;
      case Compare::Gtu:
        return unordered || a > b;
      case Compare::Geu:
        return unordered || a >= b;
      case Compare::Num:
        return !unordered;
      case Compare::Nan:
        return unordered;
    }
    return false;
  }
};

using Comparer = std::function<Mask(Warp&, Mask)>;  // one bit per lane

template <class T, Compare C>
Comparer comparer(Ref a, Ref b, bool ftz) {
  return [=, a = a.offset, b = b.offset](Warp& w, Mask) {
    const T *x = w.at<T>(a), *y = w.at<T>(b);
    Mask out = 0;
    if constexpr (std::is_same_v<T, float>) {
      if (ftz) {
        for (int l = 0; l < LANES; l++) out |= Mask(Comparison<C>()(flush(x[l]), flush(y[l]))) << l;
        return out;
      }
    }
    for (int l = 0; l < LANES; l++) out |= Mask(Comparison<C>()(x[l], y[l])) << l;
    return out;
  };
}

template <Compare C>
Comparer half_comparer(Ref a, Ref b, bool bfloat, int shift, int width, bool ftz) {
  return [=, a = a.offset, b = b.offset](Warp& w, Mask m) {
    auto value = [&](uint32_t offset, int l) {
      uint32_t bits = width == 4 ? w.at<uint32_t>(offset)[l] : w.at<uint16_t>(offset)[l];
      float x = bfloat ? bfloat_to_float(uint16_t(bits >> shift))
                       : half_to_float(uint16_t(bits >> shift));
      return ftz && !bfloat && std::fabs(x) < 6.103515625e-05f ? 0.0f * x : x;
    };
    Mask out = 0;
    for_lanes(m, [&](int l) { out |= Mask(Comparison<C>()(value(a, l), value(b, l))) << l; });
    return out;
  };
}

template <Compare C>
Comparer by_type(Decoder& d, Type t, Ref a, Ref b, bool ftz, int shift) {
  constexpr bool ordered = C <= Compare::Ge;
  bool half = t == Type::F16 || t == Type::F16x2, bfloat = t == Type::BF16 || t == Type::BF16x2;
  if (half || bfloat) return half_comparer<C>(a, b, bfloat, shift, size_of(t), ftz);
  if (t == Type::F32) return comparer<float, C>(a, b, ftz);
  if (t == Type::F64) return comparer<double, C>(a, b, false);
  if constexpr (ordered) {
    if (is_bits(t) && C != Compare::Eq && C != Compare::Ne)
      d.reject("only .eq and .ne compare bits");
    switch (t) {
      case Type::B16:
      case Type::U16:
        return comparer<uint16_t, C>(a, b, false);
      case Type::B32:
      case Type::U32:
        return comparer<uint32_t, C>(a, b, false);
      case Type::B64:
      case Type::U64:
        return comparer<uint64_t, C>(a, b, false);
      case Type::S16:
        return comparer<int16_t, C>(a, b, false);
      case Type::S32:
        return comparer<int32_t, C>(a, b, false);
      case Type::S64:
        return comparer<int64_t, C>(a, b, false);
      default:
        break;
    }
  }
  d.reject(format("the type .%s is not for this comparison", name_of(t)));
}

Comparer make_comparer(Decoder& d, int c, Type t, Ref a, Ref b, bool ftz, int shift) {
  switch (Compare(c)) {
#define CASE(name)    \
  case Compare::name: \
    return by_type<Compare::name>(d, t, a, b, ftz, shift)
    CASE(Eq);
    CASE(Ne);
    CASE(Lt);
    CASE(Le);
    CASE(Gt);
    CASE(Ge);
    CASE(Equ);
    CASE(Neu);
    CASE(Ltu);
    CASE(Leu);
    CASE(Gtu);
    CASE(Geu);
    CASE(Num);
    CASE(Nan);
#undef CASE
  }
  d.reject("unknown comparison");
}

int comparison(Decoder& d) {
  int c = d.one_of(
      {"eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"},
      true);
  if (c >= 0) return c;
  static constexpr Compare unsigned_names[] = {Compare::Lt, Compare::Le, Compare::Gt, Compare::Ge};
  return int(unsigned_names[d.one_of({"lo", "ls", "hi", "hs"})]);
}

Step setp(Decoder& d) {
  int c = comparison(d), combine = d.one_of({"and", "or", "xor"}, true);
  bool ftz = d.mod("ftz");
  Type t = d.type();
  d.count_is(combine < 0 ? 3 : 4);
  bool packed = t == Type::F16x2 || t == Type::BF16x2;
  Ref p, q;
  bool two = d.raw(0).kind == Operand::Kind::Pair;
  if (two) {
    p = d.out(d.part(0, 0), Type::Pred);
    q = d.out(d.part(0, 1), Type::Pred);
  } else {
    p = d.out(0, Type::Pred);
  }
  Ref a = d.in(1, t), b = d.in(2, t);
  Comparer low = make_comparer(d, c, t, a, b, ftz, 0);
  if (!two && combine < 0) return [=](Warp& w, Mask m) { w.set_predicate(p.offset, m, low(w, m)); };
  Comparer high = packed ? make_comparer(d, c, t, a, b, ftz, 16) : Comparer();
  Ref other = combine < 0 ? d.literal(1, 0) : d.in(3, Type::Pred);
  return [=](Warp& w, Mask m) {
    Mask with = predicate_value(w, other), first = low(w, m);
    Mask second = packed ? high(w, m) : ~first;
    auto combined = [&](Mask x) {
      return combine < 0 || combine == 0 ? x & with : combine == 1 ? x | with : x ^ with;
    };
    w.set_predicate(p.offset, m, combined(first));
    if (two) w.set_predicate(q.offset, m, combined(second));
  };
}

Step set(Decoder& d) {
  int c = comparison(d), combine = d.one_of({"and", "or", "xor"}, true);
  bool ftz = d.mod("ftz");
  Type to_type = d.type(), t = d.type();
  d.count_is(combine < 0 ? 3 : 4);
  bool packed = t == Type::F16x2 || t == Type::BF16x2;
  Ref to = d.out(0, to_type), a = d.in(1, t), b = d.in(2, t);
  Comparer low = make_comparer(d, c, t, a, b, ftz, 0);
  Comparer high = packed ? make_comparer(d, c, t, a, b, ftz, 16) : Comparer();
  Ref other = combine < 0 ? d.literal(1, 0) : d.in(3, Type::Pred);
  uint32_t one = to_type == Type::F32      ? 0x3f800000
                 : to_type == Type::F16    ? 0x3c00
                 : to_type == Type::BF16   ? 0x3f80
                 : to_type == Type::F16x2  ? 0x3c00
                 : to_type == Type::BF16x2 ? 0x3f80
                 : packed                  ? 0xffff
                                           : 0xffffffff;
  return [=](Warp& w, Mask m) {
    Mask with = predicate_value(w, other);
    auto combined = [&](Mask x) {
      return combine < 0 ? x : combine == 0 ? x & with : combine == 1 ? x | with : x ^ with;
    };
    Mask first = combined(low(w, m)), second = packed ? combined(high(w, m)) : 0;
    for_lanes(m, [&](int l) {
      uint32_t value = first >> l & 1 ? one : 0;
      if (packed && (second >> l & 1)) value |= one << 16;
      put(w, to, l, value);
    });
  };
}

}  // namespace

DecodeFunction find_compare(const std::string& opcode) {
  return opcode == "setp" ? setp : opcode == "set" ? set : nullptr;
}

}  // namespace emu
