// ldmatrix, stmatrix, movmatrix: 8x8 matrices of 16-bit elements. Lane 4i + j holds elements
// (i, 2j) and (i, 2j + 1); transposed, (2j, i) and (2j + 1, i).
#include "memory.h"

namespace emu {

namespace {

using Rows = uint16_t[8][8];

uint32_t fragment(const Rows& rows, int lane, bool trans) {
  int i = lane / 4, j = lane % 4 * 2;
  return trans ? rows[j][i] | uint32_t(rows[j + 1][i]) << 16
               : rows[i][j] | uint32_t(rows[i][j + 1]) << 16;
}

void scatter(Rows& rows, int lane, bool trans, uint32_t value) {
  int i = lane / 4, j = lane % 4 * 2;
  (trans ? rows[j][i] : rows[i][j]) = uint16_t(value);
  (trans ? rows[j + 1][i] : rows[i][j + 1]) = uint16_t(value >> 16);
}

struct Form {
  int matrices;
  bool trans;
};

Form take_form(Decoder& d) {
  if (!d.mod("sync")) d.reject("expected .sync");
  if (!d.mod("aligned")) d.reject("expected .aligned");
  if (!d.mod("m8n8")) d.reject("only the shape .m8n8 is supported");
  Form f;
  f.matrices = 1 << d.one_of({"x1", "x2", "x4"});
  f.trans = d.mod("trans");
  Space space = take_space(d);
  if (space != Space::Shared && space != Space::Generic) d.reject("expected .shared");
  d.type_is(Type::B16);
  d.count_is(2);
  return f;
}

// The row addresses: lane 8i + r gives row r of matrix i.
void row_addresses(Warp& w, const Address& a, int matrices, uint32_t* rows) {
  for (int l = 0; l < 8 * matrices; l++) {
    Place p = locate(w, l, Space::Shared, uint32_t(a.of(w, l)), 16, 16);
    rows[l] = uint32_t(p.address);
  }
}

uint32_t bank_wavefronts(const uint32_t* rows, int matrices) {
  uint32_t total = 0;
  for (int i = 0; i < matrices; i++) {
    uint32_t addresses[LANES] = {};
    for (int r = 0; r < 8; r++) addresses[r] = rows[8 * i + r];
    total += wavefronts(addresses, 0xff, 16).needed;
  }
  return total;
}

Step ldmatrix(Decoder& d) {
  Form f = take_form(d);
  std::vector<Ref> to = d.outs(0, Type::B32, f.matrices);
  Address a = d.address(1, Space::Shared);
  return [=](Warp& w, Mask m) {
    if (!w.gather_all(m)) return;
    uint32_t rows[LANES];
    row_addresses(w, a, f.matrices, rows);
    EmuStats& stats = *w.block.launch.stats;
    stats.ldmatrix++;
    stats.ldmatrix_wavefronts += bank_wavefronts(rows, f.matrices);
    Rows matrix[4];
    for (int l = 0; l < 8 * f.matrices; l++) {
      if (w.block.launch.checks()) w.block.shadow.read({w, l, true}, rows[l], 16);
      std::memcpy(matrix[l / 8][l % 8], w.block.shared_at(w, l, rows[l], 16, 16), 16);
    }
    for (int i = 0; i < f.matrices; i++)
      for (int l = 0; l < LANES; l++) put(w, to[i], l, fragment(matrix[i], l, f.trans));
  };
}

Step stmatrix(Decoder& d) {
  Form f = take_form(d);
  Address a = d.address(0, Space::Shared);
  std::vector<Ref> from = d.ins(1, Type::B32, f.matrices);
  return [=](Warp& w, Mask m) {
    if (!w.gather_all(m)) return;
    uint32_t rows[LANES];
    row_addresses(w, a, f.matrices, rows);
    EmuStats& stats = *w.block.launch.stats;
    stats.stmatrix++;
    stats.stmatrix_wavefronts += bank_wavefronts(rows, f.matrices);
    w.block.launch.progress++;
    Rows matrix[4];
    for (int i = 0; i < f.matrices; i++)
      for (int l = 0; l < LANES; l++)
        scatter(matrix[i], l, f.trans, w.at<uint32_t>(from[i].offset)[l]);
    for (int l = 0; l < 8 * f.matrices; l++) {
      uint8_t* to = w.block.shared_at(w, l, rows[l], 16, 16);
      const uint8_t* data = reinterpret_cast<const uint8_t*>(matrix[l / 8][l % 8]);
      if (w.block.launch.checks()) w.block.shadow.write({w, l}, rows[l], 16, to, data);
      std::memcpy(to, data, 16);
    }
  };
}

Step movmatrix(Decoder& d) {
  for (const char* name : {"sync", "aligned", "m8n8", "trans"})
    if (!d.mod(name)) d.reject(format("expected .%s", name));
  d.type_is(Type::B16);
  d.count_is(2);
  Ref to = d.out(0, Type::B32), from = d.in(1, Type::B32);
  return [=](Warp& w, Mask m) {
    if (!w.gather_all(m)) return;
    Rows matrix;
    for (int l = 0; l < LANES; l++) scatter(matrix, l, false, w.at<uint32_t>(from.offset)[l]);
    for (int l = 0; l < LANES; l++) put(w, to, l, fragment(matrix, l, true));
  };
}

}  // namespace

DecodeFunction find_matrix(const std::string& opcode) {
  if (opcode == "ldmatrix") return ldmatrix;
  if (opcode == "stmatrix") return stmatrix;
  if (opcode == "movmatrix") return movmatrix;
  return nullptr;
}

}  // namespace emu
