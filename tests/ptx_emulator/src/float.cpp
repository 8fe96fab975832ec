// Arithmetic and functions of .f32 and .f64.
#include <cfenv>

#include "decode.h"

namespace emu {

namespace {

struct Rules {
  bool ftz = false, saturate = false;
  Round round = Round::Nearest;
};

template <class T>
T canonical(T x) {  // f32 results have one NaN
  if constexpr (sizeof(T) == 4) return x != x ? canonical_nan() : x;
  return x;
}

template <class T>
T saturated(T x) {  // to [0, 1]; NaN gives 0
  return x > T(0) ? (x < T(1) ? x : T(1)) : T(0);
}

template <bool FTZ, class T>
T flushed(T x) {
  if constexpr (FTZ && sizeof(T) == 4) return flush(x);
  return x;
}

int environment(Round round) {
  switch (round) {
    case Round::Zero:
      return FE_TOWARDZERO;
    case Round::Down:
      return FE_DOWNWARD;
    case Round::Up:
      return FE_UPWARD;
    default:
      return FE_TONEAREST;
  }
}

template <class T, bool FTZ, class F, class... Refs>
Step lanes(const Rules& rules, F f, Ref to, Refs... from) {
  if (rules.round == Round::Nearest && !rules.saturate) {
    auto g = [f](auto... x) { return flushed<FTZ>(canonical<T>(f(flushed<FTZ>(x)...))); };
    if constexpr (sizeof...(from) == 1) return unary<T, T>(to, from..., g);
    if constexpr (sizeof...(from) == 2) return binary<T, T, T>(to, from..., g);
    if constexpr (sizeof...(from) == 3) return ternary<T, T, T, T>(to, from..., g);
  }
  return [=](Warp& w, Mask m) {
    int before = std::fegetround();
    std::fesetround(environment(rules.round));
    for_lanes(m, [&](int l) {
      // volatile: the compiler must neither fold nor move the operation past the rounding mode
      volatile T x = f(flushed<FTZ>(*static_cast<volatile T*>(&w.at<T>(from.offset)[l]))...);
      T out = flushed<FTZ>(canonical<T>(x));
      w.at<T>(to.offset)[l] = rules.saturate ? saturated(out) : out;
    });
    std::fesetround(before);
  };
}

template <class T, class F, class... Refs>
Step with_rules(const Rules& rules, F f, Ref to, Refs... from) {
  if (rules.ftz) return lanes<T, true>(rules, f, to, from...);
  return lanes<T, false>(rules, f, to, from...);
}

// Takes .ftz, .sat and the rounding, then the type, and makes f of N operands.
template <size_t N, class F>
Step arithmetic(Decoder& d, F f) {
  Rules rules;
  rules.ftz = d.mod("ftz");
  rules.saturate = d.mod("sat");
  rules.round = d.round();
  Type t = d.type();
  if (t == Type::F64 && (rules.ftz || rules.saturate)) d.reject(".ftz and .sat are for .f32");
  d.count_is(N + 1);
  auto make = [&]<class T>(T) -> Step {
    Ref to = d.out(0, t), a = d.in(1, t);
    if constexpr (N == 1) return with_rules<T>(rules, f, to, a);
    if constexpr (N == 2) return with_rules<T>(rules, f, to, a, d.in(2, t));
    if constexpr (N == 3) return with_rules<T>(rules, f, to, a, d.in(2, t), d.in(3, t));
  };
  if (t == Type::F32) return make(float());
  if (t == Type::F64) return make(double());
  d.reject(format("the type .%s is not for this instruction", name_of(t)));
}

template <class T>
T least(T x, T y) {  // a number wins over NaN; -0 is below +0
  return x < y ? x : y < x ? y : x == y ? (std::signbit(x) ? x : y) : x != x ? y : x;
}
template <class T>
T greatest(T x, T y) {
  return x < y ? y : y < x ? x : x == y ? (std::signbit(x) ? y : x) : x != x ? y : x;
}

Step extremum(Decoder& d, bool min) {
  bool nan = d.mod("NaN"), xorsign = d.mod("xorsign");
  if (xorsign && !d.mod("abs")) d.reject("expected .abs after .xorsign");
  if (!nan && !xorsign) {
    if (min) return arithmetic<2>(d, [](auto x, auto y) { return least(x, y); });
    return arithmetic<2>(d, [](auto x, auto y) { return greatest(x, y); });
  }
  return arithmetic<2>(d, [=]<class T>(T x, T y) {
    if (nan && (x != x || y != y)) return std::numeric_limits<T>::quiet_NaN();
    bool negative = std::signbit(x) != std::signbit(y);
    if (xorsign) x = std::fabs(x), y = std::fabs(y);
    T r = min ? least(x, y) : greatest(x, y);
    return xorsign && negative ? -r : r;
  });
}

// abs and neg touch the sign bit alone
template <class F>
Step sign_only(Decoder& d, F f) {
  bool ftz = d.mod("ftz");
  Type t = d.type();
  d.count_is(2);
  if (t == Type::F64)
    return unary<double, double>(d.out(0, t), d.in(1, t), [f](double x) { return f(x); });
  if (ftz)
    return unary<float, float>(d.out(0, t), d.in(1, t), [f](float x) { return f(flush(x)); });
  return unary<float, float>(d.out(0, t), d.in(1, t), [f](float x) { return f(x); });
}

Step divide(Decoder& d) {
  if (!d.mod("approx")) d.mod("full");
  return arithmetic<2>(d, [](auto x, auto y) { return x / y; });
}

bool is_half(Type t) {
  return t == Type::F16 || t == Type::BF16 || t == Type::F16x2 || t == Type::BF16x2;
}

Step fma_instruction(Decoder& d) {
  if (is_half(d.peek_type())) return half_arithmetic(d);
  return arithmetic<3>(d, [](auto x, auto y, auto z) { return std::fma(x, y, z); });
}

Step rcp(Decoder& d) {
  bool approx = d.mod("approx");
  if (approx && d.peek_type() == Type::F64) {  // .ftz; 20 bits of mantissa
    if (!d.mod("ftz")) d.reject("expected .ftz");
    Type t = d.type();
    return unary<double, double>(d.out(0, t), d.in(1, t), [](double x) {
      return bits_as<double>(bits_as<uint64_t>(1.0 / x) & ~uint64_t(0xffffffff));
    });
  }
  return arithmetic<1>(d, []<class T>(T x) { return T(1) / x; });
}
Step square_root(Decoder& d) {
  d.mod("approx");
  return arithmetic<1>(d, [](auto x) { return std::sqrt(x); });
}
Step rsqrt(Decoder& d) {
  if (!d.mod("approx")) d.reject("expected .approx");
  return arithmetic<1>(d, []<class T>(T x) { return T(1 / std::sqrt(double(x))); });
}

template <class F>
Step approximate(Decoder& d, F f) {  // .approx, .f32
  if (is_half(d.peek_type())) return half_arithmetic(d);
  if (!d.mod("approx")) d.reject("expected .approx");
  Rules rules;
  rules.ftz = d.mod("ftz");
  d.type_is(Type::F32);
  d.count_is(2);
  return with_rules<float>(rules, f, d.out(0, Type::F32), d.in(1, Type::F32));
}

Step ex2(Decoder& d) {
  Step step = approximate(d, [](float x) { return std::exp2(x); });
  return [step](Warp& w, Mask m) {
    w.block.launch.stats->ex2 += std::popcount(m);
    step(w, m);
  };
}
Step lg2(Decoder& d) {
  return approximate(d, [](float x) { return std::log2(x); });
}
Step sine(Decoder& d) {
  return approximate(d, [](float x) { return std::sin(x); });
}
Step cosine(Decoder& d) {
  return approximate(d, [](float x) { return std::cos(x); });
}
Step hyperbolic_tangent(Decoder& d) {
  return approximate(d, [](float x) { return std::tanh(x); });
}

Step copysign_instruction(Decoder& d) {
  Type t = d.type();
  d.count_is(3);
  Ref to = d.out(0, t), a = d.in(1, t), b = d.in(2, t);
  if (t == Type::F64)
    return binary<double, double, double>(
        to, a, b, [](double sign, double x) { return std::copysign(x, sign); });
  if (t != Type::F32) d.reject("the type must be .f32 or .f64");
  return binary<float, float, float>(to, a, b,
                                     [](float sign, float x) { return std::copysign(x, sign); });
}

Step testp(Decoder& d) {
  int what = d.one_of({"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
  Type t = d.type();
  d.count_is(2);
  Ref to = d.out(0, Type::Pred), a = d.in(1, t);
  if (t != Type::F32 && t != Type::F64) d.reject("the type must be .f32 or .f64");
  return [=](Warp& w, Mask m) {
    Mask values = 0;
    for_lanes(m, [&](int l) {
      int c = t == Type::F64 ? std::fpclassify(w.at<double>(a.offset)[l])
                             : std::fpclassify(w.at<float>(a.offset)[l]);
      bool yes = what == 0   ? c != FP_NAN && c != FP_INFINITE
                 : what == 1 ? c == FP_INFINITE
                 : what == 2 ? c != FP_NAN
                 : what == 3 ? c == FP_NAN
                 : what == 4 ? c == FP_NORMAL
                             : c == FP_SUBNORMAL;
      values |= Mask(yes) << l;
    });
    w.set_predicate(to.offset, m, values);
  };
}

}  // namespace

Step float_arithmetic(Decoder& d) {
  if (is_half(d.peek_type())) return half_arithmetic(d);
  const std::string& op = d.source().opcode;
  if (op == "add") return arithmetic<2>(d, [](auto x, auto y) { return x + y; });
  if (op == "sub") return arithmetic<2>(d, [](auto x, auto y) { return x - y; });
  if (op == "mul") return arithmetic<2>(d, [](auto x, auto y) { return x * y; });
  if (op == "mad") return fma_instruction(d);
  if (op == "div") return divide(d);
  if (op == "min") return extremum(d, true);
  if (op == "max") return extremum(d, false);
  if (op == "abs") return sign_only(d, [](auto x) { return std::fabs(x); });
  if (op == "neg") return sign_only(d, [](auto x) { return -x; });
  d.reject("no float form of this instruction is known");
}

DecodeFunction find_float(const std::string& opcode) {
  static const std::map<std::string, DecodeFunction> table = {
      {"fma", fma_instruction},
      {"rcp", rcp},
      {"sqrt", square_root},
      {"rsqrt", rsqrt},
      {"ex2", ex2},
      {"lg2", lg2},
      {"sin", sine},
      {"cos", cosine},
      {"tanh", hyperbolic_tangent},
      {"copysign", copysign_instruction},
      {"testp", testp},
  };
  auto found = table.find(opcode);
  return found == table.end() ? nullptr : found->second;
}

}  // namespace emu
