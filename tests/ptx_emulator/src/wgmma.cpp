// wgmma: D[64, N] (+)= A[64, K] * B[K, N] by a warpgroup, A from registers or shared memory, B from
// shared memory. The numbers are computed at once; what may not be touched until wait_group is
// marked: the registers (Warp::wgmma) and the shared memory (Shadow).
#include <algorithm>

#include "memory.h"
#include "tensor_map.h"

namespace emu {

namespace {

// The warpgroup of w comes together at the current instruction: its four warps on the last arrival,
// empty before.
std::vector<Warp*> gather_warpgroup(Warp& w, Mask m) {
  if (!w.gather_all(m)) return {};
  Block& block = w.block;
  size_t g = size_t(w.index) / 4;
  if (w.exists != ALL || 4 * g + 4 > block.warps.size())
    w.fault(0, "wgmma needs a whole warpgroup of 128 threads");
  if (block.warpgroups.size() <= g) block.warpgroups.resize(g + 1);
  Block::Warpgroup& group = block.warpgroups[g];
  if (!group.here.empty() && group.op != w.op)
    w.fault(0, "divergent collective: warp " + std::to_string(group.here[0]->index) +
                   " of the warpgroup is at " + place(*group.op));
  group.op = w.op;
  group.here.push_back(&w);
  if (group.here.size() < 4) {
    w.block_lanes(ALL, Wait{Wait::Kind::Warpgroup, uint32_t(g), 0}, true);
    return {};
  }
  std::vector<Warp*> warps(4);
  for (Warp* one : group.here) {
    warps[one->index % 4] = one;
    if (one == &w) continue;
    one->blocked = 0;
    one->wait.fill(Wait{});
  }
  group.here.clear();
  block.launch.progress++;
  return warps;
}

// ---- descriptors ----

struct Descriptor {
  uint32_t start, leading, stride, span;  // bytes; span 0: not swizzled
};

Descriptor read_descriptor(Warp& w, uint64_t bits) {
  static constexpr uint32_t spans[] = {0, 128, 64, 32};
  Descriptor d{uint32_t(bits & 0x3fff) << 4, uint32_t(bits >> 16 & 0x3fff) << 4,
               uint32_t(bits >> 32 & 0x3fff) << 4, spans[bits >> 62]};
  if (bits >> 49 & 7)
    w.fault(0,
            format("descriptor 0x%llx: base offsets are not modelled", (unsigned long long)bits));
  if (d.span && d.start % (8 * d.span) >= d.span)
    w.fault(0, format("descriptor start 0x%x: the swizzle's pattern is not on its %u-byte boundary "
                      "and the base offset is 0",
                      d.start, 8 * d.span));
  return d;
}

// Where 16 bytes of an operand are: `piece` counts them along the contiguous dimension, `line`
// counts the other one. The contiguous dimension is K, or M/N if `transposed`.
uint32_t chunk_address(const Descriptor& d, bool transposed, int line, int piece) {
  uint32_t line8 = uint32_t(line) / 8, in8 = uint32_t(line) % 8, at = uint32_t(piece);
  if (!transposed) {  // lines are rows of M or N
    uint32_t address = d.start + line8 * d.stride;
    if (!d.span) return address + in8 * 16 + at * d.leading;
    return swizzled(address + in8 * d.span + at * 16, d.span);
  }
  // lines are steps of K
  if (!d.span) return d.start + at * d.stride + line8 * d.leading + in8 * 16;
  uint32_t per = d.span / 16;  // pieces in a span
  return swizzled(d.start + at / per * d.leading + at % per * 16 + line8 * d.stride + in8 * d.span,
                  d.span);
}

// ---- types ----

struct Shape {
  int n, k, bytes;  // bytes of an element
  Type d, a, b;
};

float load_element(Type t, const uint8_t* from) {
  uint32_t bits = 0;
  switch (t) {
    case Type::F16:
      std::memcpy(&bits, from, 2);
      return half_to_float(uint16_t(bits));
    case Type::BF16:
      std::memcpy(&bits, from, 2);
      return bfloat_to_float(uint16_t(bits));
    case Type::TF32:
      std::memcpy(&bits, from, 4);
      return bits_as<float>(bits & ~0x1fffu);
    case Type::E4M3:
    case Type::E5M2:
      return fp8_to_float(*from, t == Type::E5M2);
    case Type::S8:
      return float(int8_t(*from));
    default:
      return float(*from);
  }
}

// Rows of M or N by K as floats; notes the chunks read.
void load_shared(Warp& w, const Descriptor& d, bool transposed, int rows, int k, int bytes, Type t,
                 float* out, std::vector<uint32_t>& chunks) {
  int per = 16 / bytes;
  int lines = transposed ? k : rows, pieces = (transposed ? rows : k) / per;
  for (int line = 0; line < lines; line++)
    for (int piece = 0; piece < pieces; piece++) {
      uint32_t address = chunk_address(d, transposed, line, piece);
      const uint8_t* from = w.block.shared_at(w, 0, address, 16, 16);
      chunks.push_back(address);
      for (int e = 0; e < per; e++) {
        int row = transposed ? piece * per + e : line, col = transposed ? line : piece * per + e;
        out[row * k + col] = load_element(t, from + e * bytes);
      }
    }
}

std::vector<std::pair<uint32_t, uint32_t>> ranges_of(std::vector<uint32_t> chunks) {
  std::sort(chunks.begin(), chunks.end());
  chunks.erase(std::unique(chunks.begin(), chunks.end()), chunks.end());
  std::vector<std::pair<uint32_t, uint32_t>> ranges;
  for (uint32_t c : chunks) {
    if (!ranges.empty() && ranges.back().first + ranges.back().second == c)
      ranges.back().second += 16;
    else
      ranges.emplace_back(c, 16);
  }
  return ranges;
}

// What every thread of the warpgroup knows: the least of their rows. A component does not count
// for the lane that it belongs to.
Row common_row(const std::vector<Warp*>& warps) {
  struct Group {
    const Row* row;
    int lanes = 0;
    uint32_t owner = 0;
  };
  std::vector<Group> groups;
  for (Warp* w : warps)
    for (int l = 0; l < LANES; l++) {
      const Row* row = w->row[l].get();
      if (!groups.empty() && groups.back().row == row) {
        groups.back().lanes++;
        continue;
      }
      auto found =
          std::find_if(groups.begin(), groups.end(), [&](const Group& g) { return g.row == row; });
      if (found != groups.end())
        found->lanes++;
      else
        groups.push_back({row, 1, component(w->index, l)});
    }
  Row out;
  auto least = [&](std::vector<uint32_t> Row::* part) {
    size_t size = 0;
    for (const Group& g : groups)
      if (g.row) size = std::max(size, (g.row->*part).size());
    std::vector<uint32_t> clocks(size, 0xffffffff);
    for (const Group& g : groups)
      for (size_t c = 0; c < size; c++) {
        if (g.lanes == 1 && g.owner == c) continue;
        uint32_t clock = g.row && c < (g.row->*part).size() ? (g.row->*part)[c] : 0;
        clocks[c] = std::min(clocks[c], clock);
      }
    return clocks;
  };
  out.known = least(&Row::known);
  out.fenced = least(&Row::fenced);
  for (Warp* w : warps)  // wgmma is ordered with the warpgroup's own
    if (component(w->index, LANES + 1) < out.known.size())
      out.known[component(w->index, LANES + 1)] = w->wgmma.complete;
  return out;
}

// ---- mma_async ----

struct Operands {
  std::vector<Ref> d, a;
  std::vector<uint32_t> d_registers, a_registers;
  Ref a_descriptor, b_descriptor, scale_d;
  bool from_registers, negate_a, negate_b, transpose_a, transpose_b;
};

void check_registers(Warp& w, const Operands& o) {
  WgmmaState& s = w.wgmma;
  if (!w.block.launch.checks()) return;
  const std::vector<Register>& names = w.program.function.registers;
  if (!s.fenced) w.fault(0, "wgmma without a wgmma.fence before it");
  for (const auto* list : {&o.d_registers, &o.a_registers})
    for (uint32_t r : *list)
      if (s.dirty[r])
        w.fault(0, format("wgmma without wgmma.fence since register %s was last accessed",
                          names[r].name.c_str()));
  for (uint32_t r : o.a_registers)
    if (s.result[r] > s.complete)
      w.fault(0, format("wgmma reads register %s, which a wgmma in flight still writes",
                        names[r].name.c_str()));
}

void mark_registers(Warp& w, const Operands& o) {
  WgmmaState& s = w.wgmma;
  for (uint32_t r : o.d_registers) s.result[r] = s.committed + 1;
  for (uint32_t r : o.a_registers) s.input[r] = s.committed + 1;
  s.in_flight = true;
}

void multiply(const float* a, const float* b, int k, int n, float* c) {  // b: [N, K]
  std::vector<float> turned(size_t(k) * n);
  for (int j = 0; j < n; j++)
    for (int i = 0; i < k; i++) turned[size_t(i) * n + j] = b[size_t(j) * k + i];
  for (int row = 0; row < 64; row++)
    for (int i = 0; i < k; i++) {
      float x = a[row * k + i];
      const float* from = &turned[size_t(i) * n];
      float* to = c + size_t(row) * n;
      for (int j = 0; j < n; j += 8)
        for (int lane = 0; lane < 8; lane++) to[j + lane] += x * from[j + lane];
    }
}

void load_fragments(const std::vector<Warp*>& warps, const Operands& o, const Shape& s, float* a) {
  int per = 4 / s.bytes;
  for (int i = 0; i < 128; i++) {
    Warp& w = *warps[i / 32];
    int l = i % 32;
    for (size_t r = 0; r < o.a.size(); r++)
      for (int e = 0; e < per; e++) {
        int row = i / 32 * 16 + l / 4 + 8 * int(r & 1);
        int col = l % 4 * per + e + 4 * per * int(r >> 1);
        const uint8_t* from = reinterpret_cast<const uint8_t*>(&w.at<uint32_t>(o.a[r].offset)[l]);
        a[row * s.k + col] = load_element(s.a, from + e * s.bytes);
      }
  }
}

template <class F>
void for_results(const std::vector<Warp*>& warps, const Operands& o, const Shape& s, F&& f) {
  int halves = s.d == Type::F16 ? 2 : 1;
  for (int i = 0; i < 128; i++)
    for (size_t r = 0; r < o.d.size(); r++)
      for (int h = 0; h < halves; h++) {
        int element = int(r) * halves + h, l = i % 32;
        int row = i / 32 * 16 + l / 4 + 8 * (element >> 1 & 1);
        int col = element / 4 * 8 + l % 4 * 2 + (element & 1);
        f(warps[i / 32]->at<uint32_t>(o.d[r].offset)[l], h, row, col);
      }
}

void perform(const std::vector<Warp*>& warps, const Operands& o, const Shape& s) {
  Warp& w = *warps[0];
  Block& block = w.block;
  block.launch.stats->wgmma++;
  for (Warp* one : warps) check_registers(*one, o);
  for (Warp* one : warps)
    if (one->wgmma.committed != w.wgmma.committed)
      one->fault(0, "divergent collective: the warps of the warpgroup committed unequal groups");
  auto uniform = [&](Ref r) {
    uint64_t value = w.at<uint64_t>(r.offset)[0];
    for (Warp* one : warps)
      for (int l = 0; l < LANES; l++)
        if (one->at<uint64_t>(r.offset)[l] != value)
          one->fault(l, "the lanes of the warpgroup give different descriptors");
    return value;
  };
  std::vector<float> a(size_t(64) * s.k), b(size_t(s.n) * s.k), c(size_t(64) * s.n);
  std::vector<uint32_t> chunks;
  if (o.from_registers)
    load_fragments(warps, o, s, a.data());
  else
    load_shared(w, read_descriptor(w, uniform(o.a_descriptor)), o.transpose_a, 64, s.k, s.bytes,
                s.a, a.data(), chunks);
  load_shared(w, read_descriptor(w, uniform(o.b_descriptor)), o.transpose_b, s.n, s.k, s.bytes, s.b,
              b.data(), chunks);
  if (block.launch.checks()) {
    Row common = common_row(warps);
    Shadow::Access access{w, 0, true};
    access.async = true;
    access.common = &common;
    auto& reads = block.warpgroups[w.index / 4].reads[w.wgmma.committed + 1];
    for (auto [address, bytes] : ranges_of(std::move(chunks))) {
      block.shadow.begin_read(access, address, bytes);
      reads.emplace_back(address, bytes);
    }
  }
  if (o.negate_a)
    for (float& x : a) x = -x;
  if (o.negate_b)
    for (float& x : b) x = -x;
  Mask keep = predicate_value(w, o.scale_d);
  for (Warp* one : warps)
    if (Mask p = predicate_value(*one, o.scale_d); p != (keep & 1 ? ALL : 0))
      one->fault(0, "the lanes of the warpgroup give different scale-d");
  if (keep)
    for_results(warps, o, s, [&](uint32_t& bits, int h, int row, int col) {
      c[size_t(row) * s.n + col] = s.d == Type::F32   ? bits_as<float>(bits)
                                   : s.d == Type::F16 ? half_to_float(uint16_t(bits >> 16 * h))
                                                      : float(int32_t(bits));
    });
  multiply(a.data(), b.data(), s.k, s.n, c.data());
  for_results(warps, o, s, [&](uint32_t& bits, int h, int row, int col) {
    float x = c[size_t(row) * s.n + col];
    if (s.d == Type::F32)
      bits = bits_as<uint32_t>(x);
    else if (h == 0)
      bits = float_to_half(x);
    else
      bits |= uint32_t(float_to_half(x)) << 16;
  });
  for (Warp* one : warps) mark_registers(*one, o);
}

Step mma_async(Decoder& d) {
  if (!d.mod("sync") || !d.mod("aligned")) d.reject("expected .sync.aligned");
  std::optional<std::string> shape = d.starting("m64n");
  if (!shape) d.reject("expected a shape, .m64nNkK");
  Shape s;
  if (std::sscanf(shape->c_str(), "m64n%dk%d", &s.n, &s.k) != 2 || s.n % 8 || s.n < 8 || s.n > 256)
    d.reject("N must be a multiple of 8 in 8..256");
  s.d = d.type();
  s.a = d.type();
  s.b = d.type();
  s.bytes = s.a == Type::TF32 ? 4 : size_of(s.a);
  bool half = s.a == Type::F16 || s.a == Type::BF16;
  bool fp8 = s.a == Type::E4M3 || s.a == Type::E5M2;
  if ((!half && !fp8 && s.a != Type::TF32) || (!fp8 && s.a != s.b) ||
      (fp8 && s.b != Type::E4M3 && s.b != Type::E5M2) ||
      (s.d != Type::F32 && (s.d != Type::F16 || s.a == Type::BF16 || s.a == Type::TF32)))
    d.reject("this combination of types is not known");
  if (s.k * s.bytes != 32) d.reject("K must be 32 bytes");
  Operands o;
  o.from_registers = d.is_vector(1);
  size_t most = 6 + (half ? (o.from_registers ? 1 : 2) : 0);
  d.count_is(most);
  Type element = s.d == Type::F32 ? Type::F32 : Type::B32;
  size_t results = size_t(s.d == Type::F32 ? s.n / 2 : s.n / 4);
  o.d = d.outs(0, element, results);
  o.d_registers = d.op().writes;
  d.ins(0, element, results);
  size_t before = d.op().reads.size();
  if (o.from_registers) {
    o.a = d.ins(1, Type::B32, 4);
    o.a_registers.assign(d.op().reads.begin() + before, d.op().reads.end());
  } else {
    o.a_descriptor = d.in(1, Type::B64);
  }
  o.b_descriptor = d.in(2, Type::B64);
  o.scale_d = d.raw(3).kind == Operand::Kind::Integer ? d.literal(d.raw(3).bits != 0, 0)
                                                      : d.in(3, Type::Pred);
  auto sign = [&](size_t i) {
    int32_t scale = int32_t(d.constant(i));
    if (scale != 1 && scale != -1) d.reject("the scales must be 1 or -1");
    return scale < 0;
  };
  o.negate_a = sign(4);
  o.negate_b = sign(5);
  o.transpose_a = half && !o.from_registers && d.constant(6);
  o.transpose_b = half && d.constant(o.from_registers ? 6 : 7);
  d.op().wgmma = true;
  return [=](Warp& w, Mask m) {
    std::vector<Warp*> warps = gather_warpgroup(w, m);
    if (!warps.empty()) perform(warps, o, s);
  };
}

// ---- groups ----

Step fence(Decoder& d) {
  if (!d.mod("sync") || !d.mod("aligned")) d.reject("expected .sync.aligned");
  d.count_is(0);
  return [](Warp& w, Mask m) {
    if (!w.gather_all(m)) return;
    w.wgmma.fenced = true;
    std::fill(w.wgmma.dirty.begin(), w.wgmma.dirty.end(), 0);
  };
}

Step commit(Decoder& d) {
  if (!d.mod("sync") || !d.mod("aligned")) d.reject("expected .sync.aligned");
  d.count_is(0);
  return [](Warp& w, Mask m) {
    if (w.gather_all(m)) w.wgmma.committed++;
  };
}

// The group's last warp to see it complete ends its reads.
void end_reads(Warp& w) {
  Block& block = w.block;
  size_t g = size_t(w.index) / 4;
  if (block.warpgroups.size() <= g) return;
  uint32_t complete = 0xffffffff;
  for (size_t i = 4 * g; i < 4 * g + 4; i++)
    complete = std::min(complete, block.warps[i]->wgmma.complete);
  auto& reads = block.warpgroups[g].reads;
  while (!reads.empty() && reads.begin()->first <= complete) {
    Event e;
    e.block = block.serial;
    e.kind = Event::Kind::Warpgroup;
    e.warp = uint16_t(4 * g);
    e.clock = reads.begin()->first;
    e.op = uint32_t(w.op - w.program.ops.data());
    for (auto [address, bytes] : reads.begin()->second)
      block.shadow.end_read({w, 0, true}, address, bytes, &e);
    reads.erase(reads.begin());
  }
}

Step wait(Decoder& d) {
  if (!d.mod("sync") || !d.mod("aligned")) d.reject("expected .sync.aligned");
  d.count_is(1);
  uint32_t keep = d.constant(0);
  return [=](Warp& w, Mask m) {
    if (!w.gather_all(m)) return;
    WgmmaState& s = w.wgmma;
    uint32_t complete = s.committed > keep ? s.committed - keep : 0;
    if (complete <= s.complete) return;
    s.complete = complete;
    s.in_flight = false;
    for (size_t r = 0; r < s.result.size(); r++)
      s.in_flight |= s.result[r] > complete || s.input[r] > complete;
    end_reads(w);
  };
}

Step wgmma(Decoder& d) {
  switch (d.one_of({"fence", "commit_group", "wait_group", "mma_async"})) {
    case 0:
      return fence(d);
    case 1:
      return commit(d);
    case 2:
      return wait(d);
    default:
      return mma_async(d);
  }
}

}  // namespace

DecodeFunction find_wgmma(const std::string& opcode) { return opcode == "wgmma" ? wgmma : nullptr; }

}  // namespace emu
