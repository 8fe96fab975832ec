// mma.sync: D[16, 8] = A[16, K] * B[K, 8] + C of one warp.
//
// With E elements per 32-bit register, lane l = 4g + t holds
//   A register i, element e: row g + 8 (i & 1), column t E + e + 4 E (i >> 1)
//   B register i, element e: row t E + e + 4 E i, column g
//   C, D element i: row g + 8 (i >> 1), column 2 t + (i & 1)
#include <algorithm>

#include "decode.h"

namespace emu {

namespace {

using Load = float (*)(uint32_t bits);

float load_half(uint32_t bits) { return half_to_float(uint16_t(bits)); }
float load_bfloat(uint32_t bits) { return bfloat_to_float(uint16_t(bits)); }
float load_tf32(uint32_t bits) { return bits_as<float>(bits & ~0x1fffu); }
float load_e4m3(uint32_t bits) { return fp8_to_float(uint8_t(bits), false); }
float load_e5m2(uint32_t bits) { return fp8_to_float(uint8_t(bits), true); }

Load loader(Type t) {
  switch (t) {
    case Type::F16:
      return load_half;
    case Type::BF16:
      return load_bfloat;
    case Type::TF32:
      return load_tf32;
    case Type::E4M3:
      return load_e4m3;
    case Type::E5M2:
      return load_e5m2;
    default:
      return nullptr;
  }
}

int element_bytes(Type t) { return t == Type::TF32 ? 4 : size_of(t); }

template <class T, class LoadA, class LoadB>
void read_operands(Warp& w, const std::vector<Ref>& ra, const std::vector<Ref>& rb, int bytes,
                   LoadA load_a, LoadB load_b, T (&a)[16][64], T (&b)[64][8]) {
  int per = 4 / bytes, width = 8 * bytes;
  for (size_t i = 0; i < ra.size(); i++) {
    const uint32_t* bits = w.at<uint32_t>(ra[i].offset);
    for (int l = 0; l < LANES; l++)
      for (int e = 0; e < per; e++)
        a[l / 4 + 8 * (i & 1)][l % 4 * per + e + 4 * per * (i >> 1)] = load_a(bits[l] >> e * width);
  }
  for (size_t i = 0; i < rb.size(); i++) {
    const uint32_t* bits = w.at<uint32_t>(rb[i].offset);
    for (int l = 0; l < LANES; l++)
      for (int e = 0; e < per; e++)
        b[l % 4 * per + e + 4 * per * i][l / 4] = load_b(bits[l] >> e * width);
  }
}

template <class T>
void multiply(const T (&a)[16][64], const T (&b)[64][8], int k, T (&c)[16][8]) {
  for (int row = 0; row < 16; row++)
    for (int i = 0; i < k; i++)
      for (int col = 0; col < 8; col++) c[row][col] += a[row][i] * b[i][col];
}

// C and D of 32-bit elements: one per register
template <class T>
void load_c(Warp& w, const std::vector<Ref>& rc, T (&c)[16][8]) {
  for (int i = 0; i < 4; i++)
    for (int l = 0; l < LANES; l++)
      c[l / 4 + 8 * (i >> 1)][l % 4 * 2 + (i & 1)] = w.at<T>(rc[i].offset)[l];
}
template <class T>
void store_d(Warp& w, const std::vector<Ref>& rd, const T (&c)[16][8]) {
  for (int i = 0; i < 4; i++)
    for (int l = 0; l < LANES; l++)
      w.at<T>(rd[i].offset)[l] = c[l / 4 + 8 * (i >> 1)][l % 4 * 2 + (i & 1)];
}

Step float_mma(Decoder& d, int k, Type td, Type ta, Type tb, Type tc) {
  Load load_a = loader(ta), load_b = loader(tb);
  int bytes = element_bytes(ta);
  bool half = td == Type::F16;
  if (!load_a || !load_b || bytes != element_bytes(tb) || td != tc || (td != Type::F32 && !half) ||
      (half && ta != Type::F16))
    d.reject("this combination of types is not known");
  size_t na = size_t(16 * k * bytes / 128), nb = na / 2, nc = half ? 2 : 4;
  Type accumulator = half ? Type::B32 : Type::F32;
  std::vector<Ref> to = d.outs(0, accumulator, nc), a = d.ins(1, Type::B32, na),
                   b = d.ins(2, Type::B32, nb), c = d.ins(3, accumulator, nc);
  return [=](Warp& w, Mask m) {
    if (!w.gather_all(m)) return;
    w.block.launch.stats->mma++;
    float va[16][64], vb[64][8], vc[16][8];
    read_operands(w, a, b, bytes, load_a, load_b, va, vb);
    if (half) {
      for (int i = 0; i < 4; i++)
        for (int l = 0; l < LANES; l++)
          vc[l / 4 + 8 * (i >> 1)][l % 4 * 2 + (i & 1)] =
              half_to_float(uint16_t(w.at<uint32_t>(c[i >> 1].offset)[l] >> 16 * (i & 1)));
    } else {
      load_c(w, c, vc);
    }
    multiply(va, vb, k, vc);
    if (!half) {
      store_d(w, to, vc);
      return;
    }
    for (int i = 0; i < 2; i++)
      for (int l = 0; l < LANES; l++) {
        const float* row = &vc[l / 4 + 8 * i][l % 4 * 2];
        w.at<uint32_t>(to[i].offset)[l] = float_to_half(row[0]) | uint32_t(float_to_half(row[1]))
                                                                      << 16;
      }
  };
}

Step integer_mma(Decoder& d, int k, Type td, Type ta, Type tb, Type tc) {
  bool saturate = d.mod("satfinite");
  if (td != Type::S32 || tc != Type::S32 || size_of(ta) != 1 || size_of(tb) != 1)
    d.reject("this combination of types is not known");
  size_t na = size_t(k / 8), nb = na / 2;
  std::vector<Ref> to = d.outs(0, td, 4), a = d.ins(1, Type::B32, na), b = d.ins(2, Type::B32, nb),
                   c = d.ins(3, tc, 4);
  bool sa = is_signed(ta), sb = is_signed(tb);
  return [=](Warp& w, Mask m) {
    if (!w.gather_all(m)) return;
    w.block.launch.stats->mma++;
    auto load = [](bool sign) {
      return
          [sign](uint32_t bits) { return sign ? int64_t(int8_t(bits)) : int64_t(uint8_t(bits)); };
    };
    int64_t va[16][64], vb[64][8], vc[16][8];
    int32_t out[16][8];
    read_operands(w, a, b, 1, load(sa), load(sb), va, vb);
    load_c(w, c, out);
    for (int i = 0; i < 128; i++) vc[i / 8][i % 8] = out[i / 8][i % 8];
    multiply(va, vb, k, vc);
    for (int i = 0; i < 128; i++) {
      int64_t x = vc[i / 8][i % 8];
      if (saturate) x = std::clamp<int64_t>(x, INT32_MIN, INT32_MAX);
      out[i / 8][i % 8] = int32_t(x);
    }
    store_d(w, to, out);
  };
}

// m8n8k4 of f64: A one register (row g, column t), B (row t, column g), C two
Step double_mma(Decoder& d) {
  Type t = Type::F64;
  std::vector<Ref> to = d.outs(0, t, 2), a = d.ins(1, t, 1), b = d.ins(2, t, 1), c = d.ins(3, t, 2);
  return [=](Warp& w, Mask m) {
    if (!w.gather_all(m)) return;
    w.block.launch.stats->mma++;
    double out[2][LANES];
    for (int i = 0; i < 2; i++)
      for (int l = 0; l < LANES; l++) {
        double sum = w.at<double>(c[i].offset)[l];
        for (int k = 0; k < 4; k++)
          sum = std::fma(w.at<double>(a[0].offset)[l / 4 * 4 + k],
                         w.at<double>(b[0].offset)[(l % 4 * 2 + i) * 4 + k], sum);
        out[i][l] = sum;
      }
    for (int i = 0; i < 2; i++) std::memcpy(w.at<double>(to[i].offset), out[i], sizeof out[i]);
  };
}

Step mma(Decoder& d) {
  if (!d.mod("sync")) d.reject("expected .sync");
  if (!d.mod("aligned")) d.reject("expected .aligned");
  static constexpr int depths[] = {4, 4, 8, 16, 32};
  int shape = d.one_of({"m8n8k4", "m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32"});
  int k = depths[shape];
  if (!d.mod("row") || !d.mod("col")) d.reject("expected .row.col");
  Type td = d.type(), ta = d.type(), tb = d.type(), tc = d.type();
  d.count_is(4);
  if (shape == 0) {
    for (Type t : {td, ta, tb, tc})
      if (t != Type::F64) d.reject("m8n8k4 is supported for .f64");
    return double_mma(d);
  }
  int bits = 8 * element_bytes(ta);
  if (k * bits != 128 && k * bits != 256) d.reject("this shape is not for this type");
  if (ta == Type::S8 || ta == Type::U8) return integer_mma(d, k, td, ta, tb, tc);
  return float_mma(d, k, td, ta, tb, tc);
}

}  // namespace

DecodeFunction find_mma(const std::string& opcode) { return opcode == "mma" ? mma : nullptr; }

}  // namespace emu
