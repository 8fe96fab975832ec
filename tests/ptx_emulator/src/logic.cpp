// Moves, logic, shifts and selection.
#include <algorithm>

#include "decode.h"

namespace emu {

namespace {

// Calls f.operator()<T>() with the unsigned type of t's size.
template <class F>
Step with_bits(Decoder& d, Type t, F&& f) {
  switch (size_of(t)) {
    case 2:
      return f.template operator()<uint16_t>();
    case 4:
      return f.template operator()<uint32_t>();
    case 8:
      return f.template operator()<uint64_t>();
    default:
      d.reject(format("the type .%s is not for this instruction", name_of(t)));
  }
}

Type bits_of(int bytes) {
  return bytes == 1 ? Type::B8 : bytes == 2 ? Type::B16 : bytes == 4 ? Type::B32 : Type::B64;
}

// mov.b32 {a, b}, c and mov.b32 c, {a, b}
Step pack(Decoder& d, Type t) {
  d.count_is(2);
  bool unpack = d.is_vector(0);
  size_t n = d.raw(unpack ? 0 : 1).parts.size();
  int bytes = size_of(t), part = n ? bytes / int(n) : 0;
  if (part == 0 || part * int(n) != bytes || bytes > 16)
    d.reject("the vector does not fill the type");
  if (bytes == 16) d.reject("the type .b128 is not supported");
  if (unpack) {
    Ref from = d.in(1, t);
    std::vector<Ref> to = d.outs(0, bits_of(part), n);
    return [=](Warp& w, Mask m) {
      for_lanes(m, [&](int l) {
        uint64_t value = 0;
        std::memcpy(&value, w.file + from.offset + l * bytes, bytes);
        for (size_t i = 0; i < n; i++) put(w, to[i], l, value >> (8 * part * i));
      });
    };
  }
  Ref to = d.out(0, t);
  std::vector<Ref> from = d.ins(1, bits_of(part), n);
  return [=](Warp& w, Mask m) {
    for_lanes(m, [&](int l) {
      uint64_t value = 0;
      for (size_t i = 0; i < n; i++)
        std::memcpy(reinterpret_cast<uint8_t*>(&value) + part * i,
                    w.file + from[i].offset + l * part, part);
      put(w, to, l, value);
    });
  };
}

template <class F>
Step predicate_logic(Decoder& d, F f) {
  d.count_is(3);
  Ref to = d.out(0, Type::Pred), a = d.in(1, Type::Pred), b = d.in(2, Type::Pred);
  return [=](Warp& w, Mask m) {
    w.set_predicate(to.offset, m, f(predicate_value(w, a), predicate_value(w, b)));
  };
}

Step mov(Decoder& d) {
  Type t = d.type();
  d.op().copies = true;
  if (t == Type::Pred) {
    d.count_is(2);
    Ref to = d.out(0, t), from = d.in(1, t);
    return [=](Warp& w, Mask m) { w.set_predicate(to.offset, m, predicate_value(w, from)); };
  }
  if (d.is_vector(0) || d.is_vector(1)) return pack(d, t);
  d.count_is(2);
  if (d.raw(1).kind == Operand::Kind::Special) {  // it may be narrower or wider than the type
    Ref from = d.in_any(d.raw(1), Type::B8), to = d.out(0, t);
    return [=](Warp& w, Mask m) {
      for_lanes(m, [&](int l) {
        uint64_t value = 0;
        std::memcpy(&value, w.file + from.offset + l * from.width, from.width);
        put(w, to, l, value);
      });
    };
  }
  return with_bits(
      d, t, [&]<class T>() { return unary<T, T>(d.out(0, t), d.in(1, t), [](T x) { return x; }); });
}

template <class F>
Step bitwise(Decoder& d, F f) {
  Type t = d.type();
  if (t == Type::Pred) return predicate_logic(d, f);
  d.count_is(3);
  return with_bits(d, t, [&]<class T>() {
    return binary<T, T, T>(d.out(0, t), d.in(1, t), d.in(2, t), [f](T a, T b) { return f(a, b); });
  });
}

Step and_instruction(Decoder& d) {
  return bitwise(d, []<class T>(T a, T b) { return T(a & b); });
}
Step or_instruction(Decoder& d) {
  return bitwise(d, []<class T>(T a, T b) { return T(a | b); });
}
Step xor_instruction(Decoder& d) {
  return bitwise(d, []<class T>(T a, T b) { return T(a ^ b); });
}

Step not_instruction(Decoder& d) {
  bool logical = d.source().opcode == "cnot";
  Type t = d.type();
  d.count_is(2);
  if (t == Type::Pred) {
    Ref to = d.out(0, t), a = d.in(1, t);
    return [=](Warp& w, Mask m) { w.set_predicate(to.offset, m, ~predicate_value(w, a)); };
  }
  return with_bits(d, t, [&]<class T>() {
    return unary<T, T>(d.out(0, t), d.in(1, t),
                       [logical](T a) { return logical ? T(a == 0) : T(~a); });
  });
}

Step shl(Decoder& d) {
  Type t = d.type();
  d.count_is(3);
  return with_bits(d, t, [&]<class T>() {
    return binary<T, T, uint32_t>(d.out(0, t), d.in(1, t), d.in(2, Type::U32), [](T a, uint32_t n) {
      constexpr uint32_t width = 8 * sizeof(T);
      return n < width ? T(a << (n & (width - 1))) : T(0);
    });
  });
}

Step shr(Decoder& d) {
  Type t = d.type();
  d.count_is(3);
  bool sign = is_signed(t);
  return with_bits(d, t, [&]<class T>() -> Step {
    Ref to = d.out(0, t), a = d.in(1, t), b = d.in(2, Type::U32);
    constexpr uint32_t width = 8 * sizeof(T);
    if (sign) {
      using S = std::make_signed_t<T>;
      return binary<S, S, uint32_t>(
          to, a, b, [](S x, uint32_t n) { return S(x >> (n < width ? n : width - 1)); });
    }
    return binary<T, T, uint32_t>(
        to, a, b, [](T x, uint32_t n) { return n < width ? T(x >> (n & (width - 1))) : T(0); });
  });
}

Step shf(Decoder& d) {  // the 64 bits b:a shifted, and one half of them
  bool left = d.one_of({"l", "r"}) == 0, clamp = d.one_of({"clamp", "wrap"}) == 0;
  d.type_is(Type::B32);
  d.count_is(4);
  Type t = Type::B32;
  return ternary<uint32_t, uint32_t, uint32_t, uint32_t>(
      d.out(0, t), d.in(1, t), d.in(2, t), d.in(3, Type::U32),
      [=](uint32_t a, uint32_t b, uint32_t c) {
        uint32_t n = clamp ? std::min(c, 32u) : c & 31;
        uint64_t both = uint64_t(b) << 32 | a;
        return left ? uint32_t(both << n >> 32) : uint32_t(both >> n);
      });
}

uint32_t lookup(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t out = 0;
  if (table & 0x01) out |= ~a & ~b & ~c;
  if (table & 0x02) out |= ~a & ~b & c;
  if (table & 0x04) out |= ~a & b & ~c;
  if (table & 0x08) out |= ~a & b & c;
  if (table & 0x10) out |= a & ~b & ~c;
  if (table & 0x20) out |= a & ~b & c;
  if (table & 0x40) out |= a & b & ~c;
  if (table & 0x80) out |= a & b & c;
  return out;
}

Step lop3(Decoder& d) {
  int combine = d.one_of({"or", "and"}, true);  // lop3.or: also d != 0 combined with a predicate
  Type t = Type::B32;
  d.type_is(t);
  d.count_is(combine < 0 ? 5 : 6);
  uint32_t table = d.constant(4);
  if (combine < 0)
    return ternary<uint32_t, uint32_t, uint32_t, uint32_t>(
        d.out(0, t), d.in(1, t), d.in(2, t), d.in(3, t),
        [table](uint32_t a, uint32_t b, uint32_t c) { return lookup(a, b, c, table); });
  Ref to = d.out(d.part(0, 0), t), p = d.out(d.part(0, 1), Type::Pred);
  Ref a = d.in(1, t), b = d.in(2, t), c = d.in(3, t), q = d.in(5, Type::Pred);
  return [=](Warp& w, Mask m) {
    Mask nonzero = 0;
    for_lanes(m, [&](int l) {
      uint32_t r = lookup(w.at<uint32_t>(a.offset)[l], w.at<uint32_t>(b.offset)[l],
                          w.at<uint32_t>(c.offset)[l], table);
      put(w, to, l, r);
      nonzero |= Mask(r != 0) << l;
    });
    Mask other = predicate_value(w, q);
    w.set_predicate(p.offset, m, combine == 0 ? nonzero | other : nonzero & other);
  };
}

uint32_t permute(uint32_t a, uint32_t b, uint32_t selector, int mode) {
  static constexpr uint16_t forward[] = {0x3210, 0x4321, 0x5432, 0x6543};
  static constexpr uint16_t backward[] = {0x5670, 0x6701, 0x7012, 0x0123};
  static constexpr uint16_t byte[] = {0x0000, 0x1111, 0x2222, 0x3333};
  static constexpr uint16_t left[] = {0x3210, 0x3211, 0x3222, 0x3333};
  static constexpr uint16_t right[] = {0x0000, 0x1110, 0x2210, 0x3210};
  static constexpr uint16_t half[] = {0x1010, 0x3232, 0x1010, 0x3232};
  static constexpr const uint16_t* tables[] = {forward, backward, byte, left, right, half};
  if (mode >= 0) selector = tables[mode][selector & 3];
  uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; i++) {
    uint32_t s = selector >> (4 * i) & 15;
    uint8_t value = uint8_t(bytes >> (8 * (s & 7)));
    if (s & 8) value = value & 0x80 ? 0xff : 0;  // replicate the sign
    out |= uint32_t(value) << (8 * i);
  }
  return out;
}

Step prmt(Decoder& d) {
  Type t = Type::B32;
  d.type_is(t);
  int mode = d.one_of({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"}, true);
  d.count_is(4);
  return ternary<uint32_t, uint32_t, uint32_t, uint32_t>(
      d.out(0, t), d.in(1, t), d.in(2, t), d.in(3, t),
      [mode](uint32_t a, uint32_t b, uint32_t c) { return permute(a, b, c, mode); });
}

Step selp(Decoder& d) {
  Type t = d.type();
  d.count_is(4);
  Ref p = d.in(3, Type::Pred);
  return with_bits(d, t, [&]<class T>() -> Step {
    Ref to = d.out(0, t), a = d.in(1, t), b = d.in(2, t);
    return [=](Warp& w, Mask m) {
      Mask choose = predicate_value(w, p);
      T* out = w.at<T>(to.offset);
      const T *x = w.at<T>(a.offset), *y = w.at<T>(b.offset);
      if (m == ALL) {
        for (int l = 0; l < LANES; l++) out[l] = choose >> l & 1 ? x[l] : y[l];
      } else {
        for_lanes(m, [&](int l) { out[l] = choose >> l & 1 ? x[l] : y[l]; });
      }
    };
  });
}

Step slct(Decoder& d) {  // d = c >= 0 ? a : b
  bool ftz = d.mod("ftz");
  Type t = d.type(), tc = d.type();
  d.count_is(4);
  if (tc != Type::S32 && tc != Type::F32) d.reject("the last type must be .s32 or .f32");
  Ref c = d.in(3, tc);
  return with_bits(d, t, [&]<class T>() {
    return ternary<T, T, T, uint32_t>(
        d.out(0, t), d.in(1, t), d.in(2, t), c, [=](T a, T b, uint32_t bits) {
          float x = bits_as<float>(bits);
          if (ftz) x = flush(x);
          return (tc == Type::S32 ? int32_t(bits) >= 0 : x >= 0) ? a : b;
        });
  });
}

}  // namespace

DecodeFunction find_logic(const std::string& opcode) {
  static const std::map<std::string, DecodeFunction> table = {
      {"mov", mov},
      {"and", and_instruction},
      {"or", or_instruction},
      {"xor", xor_instruction},
      {"not", not_instruction},
      {"cnot", not_instruction},
      {"shl", shl},
      {"shr", shr},
      {"shf", shf},
      {"lop3", lop3},
      {"prmt", prmt},
      {"selp", selp},
      {"slct", slct},
  };
  auto found = table.find(opcode);
  return found == table.end() ? nullptr : found->second;
}

}  // namespace emu
