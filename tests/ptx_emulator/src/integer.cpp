// Integer arithmetic and bit manipulation.
#include <algorithm>

#include "decode.h"

namespace emu {

namespace {

// Calls f.operator()<T>() with the C++ type of an integer type.
template <class F>
Step with_integer(Decoder& d, Type t, F&& f) {
  switch (t) {
    case Type::U16:
    case Type::B16:
      return f.template operator()<uint16_t>();
    case Type::U32:
    case Type::B32:
      return f.template operator()<uint32_t>();
    case Type::U64:
    case Type::B64:
      return f.template operator()<uint64_t>();
    case Type::S16:
      return f.template operator()<int16_t>();
    case Type::S32:
      return f.template operator()<int32_t>();
    case Type::S64:
      return f.template operator()<int64_t>();
    default:
      d.reject(format("the type .%s is not for this instruction", name_of(t)));
  }
}

template <class T>
struct Wide;
template <>
struct Wide<uint16_t> {
  using type = uint32_t;
};
template <>
struct Wide<int16_t> {
  using type = int32_t;
};
template <>
struct Wide<uint32_t> {
  using type = uint64_t;
};
template <>
struct Wide<int32_t> {
  using type = int64_t;
};
template <>
struct Wide<uint64_t> {
  using type = unsigned __int128;
};
template <>
struct Wide<int64_t> {
  using type = __int128;
};
template <class T>
using wide_t = typename Wide<T>::type;
template <class T>
using unsigned_t = std::make_unsigned_t<T>;

Type wide_type(Type t) {
  switch (t) {
    case Type::U16:
      return Type::U32;
    case Type::S16:
      return Type::S32;
    case Type::U32:
      return Type::U64;
    case Type::S32:
      return Type::S64;
    default:
      return Type::None;
  }
}

bool is_float(Type t) {
  return t == Type::F32 || t == Type::F64 || t == Type::F16 || t == Type::BF16 ||
         t == Type::F16x2 || t == Type::BF16x2;
}

// Wrapping arithmetic: on unsigned types, which narrow types do not promote to signed overflow.
template <class T>
T wrap_add(T a, T b) {
  return T(uint64_t(a) + uint64_t(b));
}
template <class T>
T wrap_sub(T a, T b) {
  return T(uint64_t(a) - uint64_t(b));
}
template <class T>
T wrap_mul(T a, T b) {
  return T(uint64_t(a) * uint64_t(b));
}
template <class T>
T high_mul(T a, T b) {
  return T((wide_t<T>(a) * wide_t<T>(b)) >> (8 * sizeof(T)));
}

// add, sub, mad with .cc or addc, subc, madc: 32 or 64 bits, through the warp's carry mask.
template <class F>
Step with_carry(Decoder& d, Type t, bool read, bool write, size_t operands, F f) {
  d.count_is(operands + 1);
  Ref to = d.out(0, t), a = d.in(1, t), b = d.in(2, t);
  Ref c = operands == 3 ? d.in(3, t) : b;
  return with_integer(d, t, [&]<class T>() -> Step {
    using U = unsigned_t<T>;
    return [=](Warp& w, Mask m) {
      for_lanes(m, [&](int l) {
        U out;
        bool carry = f(w.at<U>(a.offset)[l], w.at<U>(b.offset)[l], w.at<U>(c.offset)[l],
                       read && (w.carry >> l & 1), out);
        w.at<U>(to.offset)[l] = out;
        if (write) w.carry = (w.carry & ~(Mask(1) << l)) | Mask(carry) << l;
      });
    };
  });
}

template <class U>
bool add_carry(U a, U b, bool carry, U& out) {
  unsigned __int128 sum = (unsigned __int128)(a) + b + carry;
  out = U(sum);
  return sum >> (8 * sizeof(U)) & 1;
}

Step packed_pair(Decoder& d, Type t, int what) {  // add, min, max of u16x2 and s16x2
  bool relu = d.mod("relu");
  d.count_is(3);
  bool sign = t == Type::S16x2;
  return binary<uint32_t, uint32_t, uint32_t>(
      d.out(0, t), d.in(1, t), d.in(2, t), [=](uint32_t a, uint32_t b) {
        uint32_t out = 0;
        for (int shift : {0, 16}) {
          int x = sign ? int16_t(a >> shift) : int(a >> shift & 0xffff);
          int y = sign ? int16_t(b >> shift) : int(b >> shift & 0xffff);
          int r = what == 0 ? x + y : what == 1 ? std::min(x, y) : std::max(x, y);
          if (relu) r = std::max(r, 0);
          out |= (uint32_t(r) & 0xffff) << shift;
        }
        return out;
      });
}

Step add(Decoder& d) {
  if (is_float(d.peek_type())) return float_arithmetic(d);
  Type t = d.type();
  if (t == Type::U16x2 || t == Type::S16x2) return packed_pair(d, t, 0);
  if (d.mod("cc"))
    return with_carry(d, t, false, true, 2, []<class U>(U a, U b, U, bool, U& out) {
      return add_carry(a, b, false, out);
    });
  d.count_is(3);
  if (d.mod("sat")) {
    if (t != Type::S32) d.reject(".sat is for .s32");
    return binary<int32_t, int32_t, int32_t>(
        d.out(0, t), d.in(1, t), d.in(2, t), [](int32_t a, int32_t b) {
          return int32_t(std::clamp<int64_t>(int64_t(a) + b, INT32_MIN, INT32_MAX));
        });
  }
  return with_integer(d, t, [&]<class T>() {
    return binary<T, T, T>(d.out(0, t), d.in(1, t), d.in(2, t),
                           [](T a, T b) { return wrap_add(a, b); });
  });
}

Step sub(Decoder& d) {
  if (is_float(d.peek_type())) return float_arithmetic(d);
  Type t = d.type();
  if (d.mod("cc"))
    return with_carry(d, t, false, true, 2, []<class U>(U a, U b, U, bool, U& out) {
      out = U(a - b);
      return a < b;
    });
  d.count_is(3);
  if (d.mod("sat")) {
    if (t != Type::S32) d.reject(".sat is for .s32");
    return binary<int32_t, int32_t, int32_t>(
        d.out(0, t), d.in(1, t), d.in(2, t), [](int32_t a, int32_t b) {
          return int32_t(std::clamp<int64_t>(int64_t(a) - b, INT32_MIN, INT32_MAX));
        });
  }
  return with_integer(d, t, [&]<class T>() {
    return binary<T, T, T>(d.out(0, t), d.in(1, t), d.in(2, t),
                           [](T a, T b) { return wrap_sub(a, b); });
  });
}

Step addc(Decoder& d) {
  bool write = d.mod("cc");
  return with_carry(d, d.type(), true, write, 2, []<class U>(U a, U b, U, bool carry, U& out) {
    return add_carry(a, b, carry, out);
  });
}

Step subc(Decoder& d) {
  bool write = d.mod("cc");
  return with_carry(d, d.type(), true, write, 2, []<class U>(U a, U b, U, bool borrow, U& out) {
    out = U(a - b - borrow);
    return (unsigned __int128)(a) < (unsigned __int128)(b) + borrow;
  });
}

Step mul(Decoder& d) {
  if (is_float(d.peek_type())) return float_arithmetic(d);
  int part = d.one_of({"lo", "hi", "wide"});
  Type t = d.type();
  d.count_is(3);
  return with_integer(d, t, [&]<class T>() -> Step {
    if (part == 0)
      return binary<T, T, T>(d.out(0, t), d.in(1, t), d.in(2, t),
                             [](T a, T b) { return wrap_mul(a, b); });
    if (part == 1)
      return binary<T, T, T>(d.out(0, t), d.in(1, t), d.in(2, t),
                             [](T a, T b) { return high_mul(a, b); });
    if constexpr (sizeof(T) == 8) {
      d.reject(".wide is for 16 and 32 bits");
    } else {
      using W = wide_t<T>;
      return binary<W, T, T>(d.out(0, wide_type(t)), d.in(1, t), d.in(2, t),
                             [](T a, T b) { return W(W(a) * W(b)); });
    }
  });
}

Step mad_carry(Decoder& d, bool read) {
  int part = d.one_of({"lo", "hi"});
  bool write = d.mod("cc");
  Type t = d.type();
  return with_carry(d, t, read, write, 3, [part]<class U>(U a, U b, U c, bool carry, U& out) {
    unsigned __int128 product = (unsigned __int128)(a)*b;
    U half = part ? U(product >> (8 * sizeof(U))) : U(product);
    return add_carry(half, c, carry, out);
  });
}

Step mad(Decoder& d) {
  if (is_float(d.peek_type())) return float_arithmetic(d);
  if (d.peek("cc")) {
    if (d.peek_type() != Type::U32 && d.peek_type() != Type::U64)
      d.reject("mad.cc is supported for .u32 and .u64");
    return mad_carry(d, false);
  }
  int part = d.one_of({"lo", "hi", "wide"});
  Type t = d.type();
  d.count_is(4);
  return with_integer(d, t, [&]<class T>() -> Step {
    if (part == 0)
      return ternary<T, T, T, T>(d.out(0, t), d.in(1, t), d.in(2, t), d.in(3, t),
                                 [](T a, T b, T c) { return wrap_add(wrap_mul(a, b), c); });
    if (part == 1)
      return ternary<T, T, T, T>(d.out(0, t), d.in(1, t), d.in(2, t), d.in(3, t),
                                 [](T a, T b, T c) { return wrap_add(high_mul(a, b), c); });
    if constexpr (sizeof(T) == 8) {
      d.reject(".wide is for 16 and 32 bits");
    } else {
      using W = wide_t<T>;
      Type wide = wide_type(t);
      return ternary<W, T, T, W>(d.out(0, wide), d.in(1, t), d.in(2, t), d.in(3, wide),
                                 [](T a, T b, W c) { return wrap_add<W>(W(W(a) * W(b)), c); });
    }
  });
}

Step madc(Decoder& d) {
  if (d.peek_type() != Type::U32 && d.peek_type() != Type::U64)
    d.reject("madc is supported for .u32 and .u64");
  return mad_carry(d, true);
}

Step mul24(Decoder& d) {
  bool add = d.source().opcode == "mad24";
  int part = d.one_of({"lo", "hi"});
  Type t = d.type();
  if (t != Type::U32 && t != Type::S32) d.reject("the type must be .u32 or .s32");
  d.count_is(add ? 4 : 3);
  Ref c = add ? d.in(3, t) : d.literal(0, 4);
  bool sign = t == Type::S32;
  return ternary<uint32_t, uint32_t, uint32_t, uint32_t>(
      d.out(0, t), d.in(1, t), d.in(2, t), c, [=](uint32_t a, uint32_t b, uint32_t add) {
        int64_t x = sign ? int32_t(a << 8) >> 8 : int32_t(a & 0xffffff);
        int64_t y = sign ? int32_t(b << 8) >> 8 : int32_t(b & 0xffffff);
        return uint32_t(part ? x * y >> 16 : x * y) + add;
      });
}

Step divide(Decoder& d) {
  bool remainder = d.source().opcode == "rem";
  if (is_float(d.peek_type())) return float_arithmetic(d);
  Type t = d.type();
  d.count_is(3);
  Ref to = d.out(0, t), a = d.in(1, t), b = d.in(2, t);
  return with_integer(d, t, [&]<class T>() -> Step {
    return [=](Warp& w, Mask m) {
      for_lanes(m, [&](int l) {
        T x = w.at<T>(a.offset)[l], y = w.at<T>(b.offset)[l];
        if (y == 0) w.fault(l, "integer division by zero");
        if (std::is_signed_v<T> && y == T(-1))  // the smallest number has no negative
          w.at<T>(to.offset)[l] = remainder ? T(0) : wrap_sub<T>(0, x);
        else
          w.at<T>(to.offset)[l] = remainder ? T(x % y) : T(x / y);
      });
    };
  });
}

Step absolute(Decoder& d) {
  if (is_float(d.peek_type())) return float_arithmetic(d);
  Type t = d.type();
  d.count_is(2);
  return with_integer(d, t, [&]<class T>() {
    return unary<T, T>(d.out(0, t), d.in(1, t), [](T a) { return a < 0 ? wrap_sub<T>(0, a) : a; });
  });
}

Step negate(Decoder& d) {
  if (is_float(d.peek_type())) return float_arithmetic(d);
  Type t = d.type();
  d.count_is(2);
  return with_integer(d, t, [&]<class T>() {
    return unary<T, T>(d.out(0, t), d.in(1, t), [](T a) { return wrap_sub<T>(0, a); });
  });
}

Step extremum(Decoder& d) {
  bool least = d.source().opcode == "min";
  if (is_float(d.peek_type())) return float_arithmetic(d);
  Type t = d.type();
  if (t == Type::U16x2 || t == Type::S16x2) return packed_pair(d, t, least ? 1 : 2);
  bool relu = d.mod("relu");
  if (relu && t != Type::S32) d.reject(".relu is for .s32 and .s16x2");
  d.count_is(3);
  return with_integer(d, t, [&]<class T>() -> Step {
    Ref to = d.out(0, t), a = d.in(1, t), b = d.in(2, t);
    T floor = relu ? T(0) : std::numeric_limits<T>::min();
    if (least)
      return binary<T, T, T>(to, a, b,
                             [floor](T x, T y) { return std::max<T>(x < y ? x : y, floor); });
    return binary<T, T, T>(to, a, b,
                           [floor](T x, T y) { return std::max<T>(x < y ? y : x, floor); });
  });
}

Step sad(Decoder& d) {
  Type t = d.type();
  d.count_is(4);
  return with_integer(d, t, [&]<class T>() {
    return ternary<T, T, T, T>(d.out(0, t), d.in(1, t), d.in(2, t), d.in(3, t), [](T a, T b, T c) {
      return wrap_add(c, a < b ? wrap_sub(b, a) : wrap_sub(a, b));
    });
  });
}

template <class F>
Step bits_to_count(Decoder& d, F f) {  // popc, clz
  Type t = d.type();
  d.count_is(2);
  if (t == Type::B32)
    return unary<uint32_t, uint32_t>(d.out(0, Type::U32), d.in(1, t),
                                     [f](uint32_t a) { return uint32_t(f(a)); });
  if (t != Type::B64) d.reject("the type must be .b32 or .b64");
  return unary<uint32_t, uint64_t>(d.out(0, Type::U32), d.in(1, t),
                                   [f](uint64_t a) { return uint32_t(f(a)); });
}

Step popc(Decoder& d) {
  return bits_to_count(d, [](auto a) { return std::popcount(a); });
}
Step clz(Decoder& d) {
  return bits_to_count(d, [](auto a) { return std::countl_zero(a); });
}

Step bfind(Decoder& d) {
  bool shift_amount = d.mod("shiftamt");
  Type t = d.type();
  d.count_is(2);
  return with_integer(d, t, [&]<class T>() {
    return unary<uint32_t, T>(d.out(0, Type::U32), d.in(1, t), [shift_amount](T a) {
      auto bits = unsigned_t<T>(a < 0 ? T(~a) : a);
      int top = int(8 * sizeof(T)) - 1;
      int place = top - std::countl_zero(bits);  // -1: none
      return place < 0 ? 0xffffffffu : uint32_t(shift_amount ? top - place : place);
    });
  });
}

Step brev(Decoder& d) {
  Type t = d.type();
  d.count_is(2);
  return with_integer(d, t, [&]<class T>() {
    return unary<T, T>(d.out(0, t), d.in(1, t), [](T a) {
      T out = 0;
      for (size_t i = 0; i < 8 * sizeof(T); i++) out = T(out << 1 | (a >> i & 1));
      return out;
    });
  });
}

Step bfe(Decoder& d) {
  Type t = d.type();
  d.count_is(4);
  return with_integer(d, t, [&]<class T>() {
    return ternary<T, T, uint32_t, uint32_t>(
        d.out(0, t), d.in(1, t), d.in(2, Type::U32), d.in(3, Type::U32),
        [](T a, uint32_t position, uint32_t length) {
          constexpr uint32_t width = 8 * sizeof(T);
          uint32_t pos = position & 255, len = length & 255;
          if (len == 0) return T(0);
          bool sign = std::is_signed_v<T> && (a >> std::min(pos + len - 1, width - 1) & 1);
          uint64_t value = pos < width ? uint64_t(unsigned_t<T>(a)) >> pos : 0;
          uint32_t have = pos < width ? std::min(len, width - pos) : 0;  // bits that are there
          uint64_t mask = have >= 64 ? ~uint64_t(0) : (uint64_t(1) << have) - 1;
          value &= mask;
          if (sign) value |= ~mask;
          return T(value);
        });
  });
}

Step bfi(Decoder& d) {
  Type t = d.type();
  d.count_is(5);
  Ref to = d.out(0, t), a = d.in(1, t), b = d.in(2, t), pos = d.in(3, Type::U32),
      len = d.in(4, Type::U32);
  return with_integer(d, t, [&]<class T>() -> Step {
    return [=](Warp& w, Mask m) {
      constexpr uint32_t width = 8 * sizeof(T);
      for_lanes(m, [&](int l) {
        uint32_t position = w.at<uint32_t>(pos.offset)[l] & 255;
        uint32_t length = w.at<uint32_t>(len.offset)[l] & 255;
        uint64_t ones = length >= 64 ? ~uint64_t(0) : (uint64_t(1) << length) - 1;
        uint64_t mask = position < width ? ones << position : 0;
        uint64_t field = position < width ? uint64_t(w.at<T>(a.offset)[l]) << position : 0;
        w.at<T>(to.offset)[l] = T((uint64_t(w.at<T>(b.offset)[l]) & ~mask) | (field & mask));
      });
    };
  });
}

Step bmsk(Decoder& d) {
  bool clamp = d.one_of({"clamp", "wrap"}) == 0;
  d.type_is(Type::B32);
  d.count_is(3);
  return binary<uint32_t, uint32_t, uint32_t>(
      d.out(0, Type::B32), d.in(1, Type::B32), d.in(2, Type::B32), [clamp](uint32_t a, uint32_t b) {
        uint32_t from = clamp ? std::min(a, 32u) : a & 31, bits = clamp ? std::min(b, 32u) : b & 31;
        uint64_t ones = (uint64_t(1) << bits) - 1;
        return uint32_t(ones << from);
      });
}

Step szext(Decoder& d) {
  bool clamp = d.one_of({"clamp", "wrap"}) == 0;
  Type t = d.type();
  if (t != Type::U32 && t != Type::S32) d.reject("the type must be .u32 or .s32");
  d.count_is(3);
  bool sign = t == Type::S32;
  return binary<uint32_t, uint32_t, uint32_t>(
      d.out(0, t), d.in(1, t), d.in(2, Type::U32), [=](uint32_t a, uint32_t b) {
        uint32_t bits = clamp ? std::min(b, 32u) : b & 31;
        if (bits == 0) return 0u;
        uint32_t shift = 32 - bits;
        return sign ? uint32_t(int32_t(a << shift) >> shift) : a << shift >> shift;
      });
}

Step dot_product(Decoder& d) {  // dp4a, dp2a
  bool four = d.source().opcode == "dp4a";
  bool high = !four && d.one_of({"lo", "hi"}) == 1;
  Type ta = d.type(), tb = d.type();
  d.count_is(4);
  Type out = is_signed(ta) || is_signed(tb) ? Type::S32 : Type::U32;
  bool sa = is_signed(ta), sb = is_signed(tb);
  auto byte = [](uint32_t v, int i, bool sign) {
    return sign ? int(int8_t(v >> 8 * i)) : int(v >> 8 * i & 255);
  };
  return ternary<uint32_t, uint32_t, uint32_t, uint32_t>(
      d.out(0, out), d.in(1, ta), d.in(2, tb), d.in(3, out),
      [=](uint32_t a, uint32_t b, uint32_t c) {
        for (int i = 0; i < (four ? 4 : 2); i++) {
          int x = four ? byte(a, i, sa) : sa ? int16_t(a >> 16 * i) : int(a >> 16 * i & 0xffff);
          c += uint32_t(x * byte(b, four ? i : i + 2 * high, sb));
        }
        return c;
      });
}

}  // namespace

DecodeFunction find_integer(const std::string& opcode) {
  static const std::map<std::string, DecodeFunction> table = {
      {"add", add},          {"sub", sub},          {"addc", addc},    {"subc", subc},
      {"mul", mul},          {"mad", mad},          {"madc", madc},    {"mul24", mul24},
      {"mad24", mul24},      {"div", divide},       {"rem", divide},   {"abs", absolute},
      {"neg", negate},       {"min", extremum},     {"max", extremum}, {"sad", sad},
      {"popc", popc},        {"clz", clz},          {"bfind", bfind},  {"brev", brev},
      {"bfe", bfe},          {"bfi", bfi},          {"bmsk", bmsk},    {"szext", szext},
      {"dp4a", dot_product}, {"dp2a", dot_product},
  };
  auto found = table.find(opcode);
  return found == table.end() ? nullptr : found->second;
}

}  // namespace emu
