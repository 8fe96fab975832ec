// Arithmetic of .f16, .bf16 and their pairs: exact in double, rounded once.
#include "decode.h"

namespace emu {

namespace {

struct Rules {
  bool bfloat = false, pair = false, saturate = false, relu = false, ftz = false;
  bool nan = false, xorsign = false;
};

double widen(const Rules& r, uint16_t bits) {
  float x = r.bfloat ? bfloat_to_float(bits) : half_to_float(bits);
  if (r.ftz && !r.bfloat && std::fabs(x) < 6.103515625e-05f) return std::copysign(0.0, double(x));
  return x;
}

uint16_t narrow(const Rules& r, double x) {
  if (r.saturate) x = x > 0 ? (x < 1 ? x : 1) : 0;
  if (r.relu && x < 0) x = 0;
  uint16_t bits = r.bfloat ? float_to_bfloat(x, Round::Nearest) : float_to_half(x);
  if (r.ftz && !r.bfloat && (bits & 0x7c00) == 0) bits &= 0x8000;
  return bits;
}

// a * b + c; when the sum is inexact its last bit is made odd, so that the second rounding, to 16
// bits, gives what a single one would.
double fma_odd(double a, double b, double c) {
  double product = a * b, sum = product + c;  // the product has at most 22 bits: exact
  if (!std::isfinite(sum)) return sum;
  double back = sum - product;
  double error = (product - (sum - back)) + (c - back);
  uint64_t bits = bits_as<uint64_t>(sum);
  if (error != 0 && !(bits & 1)) bits += (error > 0) == (sum > 0) ? 1 : -1;
  return bits_as<double>(bits);
}

template <class F>
Step lanes(const Rules& r, F f, Ref to, std::vector<Ref> from) {
  from.resize(3, from[0]);
  return [=, a = from[0].offset, b = from[1].offset, c = from[2].offset](Warp& w, Mask m) {
    auto one = [&](uint16_t x, uint16_t y, uint16_t z) {
      return narrow(r, f(widen(r, x), widen(r, y), widen(r, z)));
    };
    if (r.pair) {
      for_lanes(m, [&](int l) {
        uint32_t x = w.at<uint32_t>(a)[l], y = w.at<uint32_t>(b)[l], z = w.at<uint32_t>(c)[l];
        uint32_t high = one(uint16_t(x >> 16), uint16_t(y >> 16), uint16_t(z >> 16));
        w.at<uint32_t>(to.offset)[l] = one(uint16_t(x), uint16_t(y), uint16_t(z)) | high << 16;
      });
    } else {
      for_lanes(m, [&](int l) {
        w.at<uint16_t>(to.offset)[l] =
            one(w.at<uint16_t>(a)[l], w.at<uint16_t>(b)[l], w.at<uint16_t>(c)[l]);
      });
    }
  };
}

// abs and neg change the sign bits alone.
Step sign_only(Decoder& d, const Rules& r, Type t, bool clear) {
  d.count_is(2);
  if (r.pair)
    return unary<uint32_t, uint32_t>(d.out(0, t), d.in(1, t), [clear](uint32_t x) {
      return clear ? x & 0x7fff7fff : x ^ 0x80008000;
    });
  return unary<uint16_t, uint16_t>(d.out(0, t), d.in(1, t), [clear](uint16_t x) {
    return uint16_t(clear ? x & 0x7fff : x ^ 0x8000);
  });
}

double extremum(const Rules& r, bool min, double x, double y) {
  if (std::isnan(x) || std::isnan(y)) {
    if (r.nan || (std::isnan(x) && std::isnan(y))) return NAN;
    if (!r.xorsign) return std::isnan(x) ? y : x;
  }
  bool negative = std::signbit(x) != std::signbit(y);
  if (r.xorsign) x = std::fabs(x), y = std::fabs(y);
  double out;
  if (std::isnan(x) || std::isnan(y))
    out = std::isnan(x) ? y : x;
  else if (x == y)
    out = std::signbit(x) == min ? x : y;
  else
    out = (x < y) == min ? x : y;
  return r.xorsign && negative ? -out : out;
}

}  // namespace

Step half_arithmetic(Decoder& d) {
  const std::string& op = d.source().opcode;
  Rules r;
  Type t = d.type();
  r.bfloat = t == Type::BF16 || t == Type::BF16x2;
  r.pair = t == Type::F16x2 || t == Type::BF16x2;
  r.ftz = d.mod("ftz");
  if (op == "abs" || op == "neg") return sign_only(d, r, t, op == "abs");
  if (op == "ex2" || op == "tanh") {
    if (!d.mod("approx")) d.reject("expected .approx");
    d.count_is(2);
    Ref to = d.out(0, t), a = d.in(1, t);
    if (op == "tanh")
      return lanes(r, [](double x, double, double) { return std::tanh(x); }, to, {a});
    return lanes(r, [](double x, double, double) { return std::exp2(x); }, to, {a});
  }
  r.saturate = d.mod("sat");
  r.relu = d.mod("relu");
  if (op == "min" || op == "max") {
    r.nan = d.mod("NaN");
    r.xorsign = d.mod("xorsign");
    if (r.xorsign && !d.mod("abs")) d.reject("expected .abs after .xorsign");
    d.count_is(3);
    bool min = op == "min";
    return lanes(r, [r, min](double x, double y, double) { return extremum(r, min, x, y); },
                 d.out(0, t), {d.in(1, t), d.in(2, t)});
  }
  if (d.round() != Round::Nearest) d.reject("only .rn is known for 16-bit floats");
  if (op == "fma") {
    d.count_is(4);
    return lanes(r, fma_odd, d.out(0, t), {d.in(1, t), d.in(2, t), d.in(3, t)});
  }
  d.count_is(3);
  Ref to = d.out(0, t);
  std::vector<Ref> from = {d.in(1, t), d.in(2, t)};
  if (op == "add")
    return lanes(r, [](double x, double y, double) { return fma_odd(x, 1, y); }, to, from);
  if (op == "sub")
    return lanes(r, [](double x, double y, double) { return fma_odd(x, 1, -y); }, to, from);
  if (op == "mul") return lanes(r, [](double x, double y, double) { return x * y; }, to, from);
  d.reject("no 16-bit float form of this instruction is known");
}

}  // namespace emu
