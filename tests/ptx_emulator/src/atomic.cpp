// atom and red, fences.
#include "atomic.h"

#include <algorithm>

#include "memory.h"

namespace emu {

namespace {

template <class T>
T as(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
uint64_t back(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T, Rmw OP>
uint64_t integer(uint64_t old, uint64_t b, uint64_t compare) {
  T x = as<T>(old), y = as<T>(b);
  switch (OP) {
    case Rmw::And:
      return back(T(x & y));
    case Rmw::Or:
      return back(T(x | y));
    case Rmw::Xor:
      return back(T(x ^ y));
    case Rmw::Exchange:
      return back(y);
    case Rmw::Add:
      return back(T(std::make_unsigned_t<T>(x) + std::make_unsigned_t<T>(y)));
    case Rmw::Inc:
      return back(T(x >= y ? 0 : x + 1));
    case Rmw::Dec:
      return back(T(x == 0 || x > y ? y : x - 1));
    case Rmw::Min:
      return back(std::min(x, y));
    case Rmw::Max:
      return back(std::max(x, y));
    case Rmw::Cas:
      return back(x == as<T>(compare) ? y : x);
  }
  return old;
}

template <class T>
Update integer_update(Rmw op) {
  static constexpr Update table[] = {
      integer<T, Rmw::And>, integer<T, Rmw::Or>,  integer<T, Rmw::Xor>, integer<T, Rmw::Exchange>,
      integer<T, Rmw::Add>, integer<T, Rmw::Inc>, integer<T, Rmw::Dec>, integer<T, Rmw::Min>,
      integer<T, Rmw::Max>, integer<T, Rmw::Cas>};
  return table[int(op)];
}

uint64_t add_f32(uint64_t a, uint64_t b, uint64_t) {
  float sum = as<float>(a) + as<float>(b);
  return back(sum != sum ? canonical_nan() : sum);
}
uint64_t add_f64(uint64_t a, uint64_t b, uint64_t) { return back(as<double>(a) + as<double>(b)); }

template <bool BF, int WHAT>  // 0 add, 1 min, 2 max
uint16_t half_update(uint16_t a, uint16_t b) {
  float x = BF ? bfloat_to_float(a) : half_to_float(a),
        y = BF ? bfloat_to_float(b) : half_to_float(b);
  float r = WHAT == 0 ? x + y : WHAT == 1 ? std::fmin(x, y) : std::fmax(x, y);
  return BF ? float_to_bfloat(r) : float_to_half(r);
}
template <bool BF, int WHAT>
uint64_t update_half(uint64_t a, uint64_t b, uint64_t) {
  return half_update<BF, WHAT>(uint16_t(a), uint16_t(b));
}
template <bool BF, int WHAT>
uint64_t update_pair(uint64_t a, uint64_t b, uint64_t) {
  return half_update<BF, WHAT>(uint16_t(a), uint16_t(b)) |
         uint64_t(half_update<BF, WHAT>(uint16_t(a >> 16), uint16_t(b >> 16))) << 16;
}

}  // namespace

Update find_update(Rmw op, Type t, bool half_extrema) {
  int what = op == Rmw::Add ? 0 : op == Rmw::Min ? 1 : op == Rmw::Max ? 2 : -1;
  static constexpr Update halves[2][2][3] = {
      {{update_half<false, 0>, update_half<false, 1>, update_half<false, 2>},
       {update_half<true, 0>, update_half<true, 1>, update_half<true, 2>}},
      {{update_pair<false, 0>, update_pair<false, 1>, update_pair<false, 2>},
       {update_pair<true, 0>, update_pair<true, 1>, update_pair<true, 2>}}};
  switch (t) {
    case Type::F16:
    case Type::BF16:
    case Type::F16x2:
    case Type::BF16x2:
      if (what < 0 || (what && !half_extrema)) return nullptr;
      return halves[size_of(t) == 4][t == Type::BF16 || t == Type::BF16x2][what];
    case Type::F32:
      return op == Rmw::Add ? add_f32 : nullptr;
    case Type::F64:
      return op == Rmw::Add ? add_f64 : nullptr;
    case Type::B16:
      return op == Rmw::Cas ? integer_update<uint16_t>(op) : nullptr;
    case Type::B32:
    case Type::U32:
      return integer_update<uint32_t>(op);
    case Type::S32:
      return integer_update<int32_t>(op);
    case Type::B64:
    case Type::U64:
      return integer_update<uint64_t>(op);
    case Type::S64:
      return integer_update<int64_t>(op);
    default:
      return nullptr;
  }
}

namespace {

Step read_modify_write(Decoder& d) {
  bool reduce = d.source().opcode == "red";
  if (d.peek("async")) d.reject("red.async is not supported");
  Sem sem = take_semantics(d);
  if (sem == Sem::Weak) sem = Sem::Relaxed;  // the default
  Space space = take_space(d);
  static constexpr Rmw kinds[] = {Rmw::And, Rmw::Or,  Rmw::Xor, Rmw::Exchange, Rmw::Add,
                                  Rmw::Inc, Rmw::Dec, Rmw::Min, Rmw::Max,      Rmw::Cas};
  Rmw op = kinds[d.one_of({"and", "or", "xor", "exch", "add", "inc", "dec", "min", "max", "cas"})];
  d.mod("noftz");
  d.round();
  bool policy = d.mod("L2::cache_hint");
  int vector = d.one_of({"v2", "v4", "v8"}, true);
  size_t n = vector < 0 ? 1 : size_t(2) << vector;
  Type t = d.type();
  Update update = find_update(op, t, n > 1);
  if (!update) d.reject(format("the type .%s is not for this operation", name_of(t)));
  int size = size_of(t);
  size_t at = reduce ? 0 : 1, wanted = at + 2 + (op == Rmw::Cas) + policy;
  d.count_is(wanted);
  if (policy) d.in(wanted - 1, Type::B64);
  std::vector<Ref> to = reduce ? std::vector<Ref>() : d.outs(0, t, n);
  if (space == Space::Generic && d.space_of(d.raw(at)) != Space::Generic)
    space = d.space_of(d.raw(at));
  Address address = d.address(at, space);
  std::vector<Ref> from = d.ins(op == Rmw::Cas ? at + 2 : at + 1, t, n);
  std::vector<Ref> compare = op == Rmw::Cas ? d.ins(at + 1, t, n) : from;
  uint32_t bytes = uint32_t(size * n);
  return [=](Warp& w, Mask m) {
    w.yield = true;  // it may be the wait of a spin loop
    w.block.launch.stats->atomics += std::popcount(m);
    for_lanes(m, [&](int l) {
      Place p = locate(w, l, space, address.of(w, l), bytes, bytes);
      acquire_at(w, l, p, sem);
      release_at(w, l, p, sem, true);
      uint8_t before[32], after[32];
      std::memcpy(before, p.host, bytes);
      for (size_t i = 0; i < n; i++) {
        uint64_t old = 0, operand = 0, expected = 0;
        std::memcpy(&old, before + i * size, size);
        std::memcpy(&operand, w.file + from[i].offset + l * size, size);
        std::memcpy(&expected, w.file + compare[i].offset + l * size, size);
        uint64_t result = update(old, operand, expected);
        std::memcpy(after + i * size, &result, size);
      }
      note_read(w, l, p, bytes, true);
      note_write(w, l, p, bytes, nullptr, true);
      if (std::memcmp(before, after, bytes)) w.block.launch.progress++;
      std::memcpy(p.host, after, bytes);
      for (size_t i = 0; i < to.size(); i++) {
        uint64_t old = 0;
        std::memcpy(&old, before + i * size, size);
        put(w, to[i], l, old);
      }
    });
  };
}

Step fence(Decoder& d) {
  if (d.mod("proxy")) {
    if (d.mod("tensormap::generic")) {
      d.one_of({"acquire", "release"});
      d.one_of({"cta", "cluster", "gpu", "sys"});
      if (d.count()) {
        d.count_is(2);
        d.address(0, Space::Generic);
      }
      return [](Warp& w, Mask m) { memory_fence(w, m); };
    }
    if (d.mod("alias")) return [](Warp& w, Mask m) { memory_fence(w, m); };
    if (d.mod("async::generic")) {  // one direction, of a sync that is restricted to one space
      d.one_of({"acquire", "release"});
      d.starting("sync_restrict::");
      d.mod("cluster");
    } else {
      if (!d.mod("async")) d.reject("expected .async");
      d.one_of({"global", "shared::cta", "shared::cluster"}, true);
    }
    d.count_is(0);
    return [](Warp& w, Mask m) { proxy_fence(w, m); };
  }
  d.count_is(0);
  if (d.mod("mbarrier_init")) {
    d.mod("release");
    d.mod("cluster");
    return [](Warp&, Mask) {};
  }
  d.one_of({"sc", "acq_rel", "acquire", "release"}, true);
  d.starting("sync_restrict::");
  d.one_of({"cta", "cluster", "gpu", "sys"}, true);
  return [](Warp& w, Mask m) { memory_fence(w, m); };
}

Step membar(Decoder& d) {
  int level = d.one_of({"cta", "gl", "sys", "proxy"});
  d.count_is(0);
  if (level == 3) {
    d.mod("alias");
    return [](Warp& w, Mask m) { memory_fence(w, m); };
  }
  return [](Warp& w, Mask m) { memory_fence(w, m); };
}

}  // namespace

DecodeFunction find_atomic(const std::string& opcode) {
  if (opcode == "atom" || opcode == "red") return read_modify_write;
  if (opcode == "fence") return fence;
  if (opcode == "membar") return membar;
  return nullptr;
}

}  // namespace emu
