// ld, st and the address instructions.
#include "memory.h"

#include <algorithm>

namespace emu {

// ---- places ----

Place locate(Warp& w, int lane, Space space, uint64_t address, uint32_t bytes, uint32_t align) {
  if (space == Space::Generic) {
    uint64_t window = address & WINDOW_MASK;
    space = window == SHARED_WINDOW  ? Space::Shared
            : window == LOCAL_WINDOW ? Space::Local
                                     : Space::Global;
    if (space != Space::Global) address &= ~WINDOW_MASK;
  }
  if (address % align)
    w.fault(lane, format("misaligned: %s address 0x%llx is no multiple of %u", name_of(space),
                         (unsigned long long)address, align));
  switch (space) {
    case Space::Shared:
      address = uint32_t(address);
      return {space, address, w.block.shared_at(w, lane, uint32_t(address), bytes, 1)};
    case Space::Local: {
      uint32_t size = w.program.local_bytes;
      if (address + bytes > size || address > size)
        w.fault(lane, format("out of bounds: local address 0x%llx, the thread has %u bytes",
                             (unsigned long long)address, size));
      return {space, address, w.local.data() + size_t(lane) * size + address};
    }
    default:
      w.block.launch.check_global(w, lane, address, bytes);
      return {space, address, reinterpret_cast<uint8_t*>(address)};
  }
}

void note_read(Warp& w, int lane, const Place& p, uint32_t bytes, bool atomic) {
  if (!w.block.launch.checks()) return;
  Shadow::Access access{w, lane, false, atomic};
  if (p.space == Space::Shared)
    w.block.shadow.read(access, p.address, bytes);
  else if (p.space == Space::Global)
    w.block.launch.global.read(access, p.address, bytes);
}

void note_write(Warp& w, int lane, const Place& p, uint32_t bytes, const uint8_t* incoming,
                bool atomic) {
  if (!w.block.launch.checks()) return;
  Shadow::Access access{w, lane, false, atomic};
  if (p.space == Space::Shared)
    w.block.shadow.write(access, p.address, bytes, p.host, incoming);
  else if (p.space == Space::Global)
    w.block.launch.global.write(access, p.address, bytes, p.host, incoming);
}

uint64_t sync_key(Warp& w, const Place& p) {
  if (p.space != Space::Shared) return p.address;
  return SHARED_WINDOW | uint64_t(w.block.serial) << 20 | p.address;
}

void acquire_at(Warp& w, int lane, const Place& p, Sem sem) {
  Launch& launch = w.block.launch;
  if (!launch.checks() || sem == Sem::Weak) return;
  auto found = launch.released.find(sync_key(w, p));
  if (found == launch.released.end() || !found->second) return;
  if (sem == Sem::Acquire || sem == Sem::AcquireRelease) {
    take_over(w, lane, found->second);
    return;
  }
  RowRef& pending = w.to_acquire[lane];
  if (pending == found->second) return;
  if (!pending) {
    pending = found->second;
    return;
  }
  auto both = std::make_shared<Row>(*pending);
  join(*both, *found->second);
  pending = both;
}

void release_at(Warp& w, int lane, const Place& p, Sem sem, bool keep) {
  Launch& launch = w.block.launch;
  if (!launch.checks()) return;
  bool release = sem == Sem::Release || sem == Sem::AcquireRelease;
  RowRef handed = sem == Sem::Weak ? nullptr : hand_over(w, lane, !release);
  if (!handed && launch.released.empty()) return;
  RowRef& there = launch.released[sync_key(w, p)];
  if (!keep || !there) {
    there = handed;
  } else if (handed) {
    auto both = std::make_shared<Row>(*there);
    join(*both, *handed);
    there = both;
  }
}

Space take_space(Decoder& d) {
  if (d.mod("global")) return Space::Global;
  if (d.mod("shared") || d.mod("shared::cta")) return Space::Shared;
  if (d.mod("local")) return Space::Local;
  if (d.mod("const")) return Space::Const;
  if (d.mod("param") || d.mod("param::entry") || d.mod("param::func")) return Space::Param;
  if (d.mod("shared::cluster")) return Space::Shared;  // a cluster is one block here
  return Space::Generic;
}

Sem take_semantics(Decoder& d) {
  static constexpr Sem kinds[] = {Sem::Weak, Sem::Relaxed, Sem::Acquire, Sem::Release,
                                  Sem::AcquireRelease};
  if (d.mod("volatile")) return Sem::Relaxed;
  int kind = d.one_of({"weak", "relaxed", "acquire", "release", "acq_rel"}, true);
  int scope = d.one_of({"cta", "cluster", "gpu", "sys"}, true);
  if (kind < 0) return scope < 0 ? Sem::Weak : Sem::Relaxed;
  return kinds[kind];
}

Wavefronts wavefronts(const uint32_t* addresses, Mask lanes, uint32_t bytes) {
  uint32_t needed = 0, words = 0;
  int per_phase = bytes <= 4 ? 32 : int(128 / bytes);
  uint32_t seen[32][32];
  uint8_t count[32];
  for (int first = 0; first < LANES; first += per_phase) {
    Mask phase = lanes & (per_phase == 32 ? ALL : ((Mask(1) << per_phase) - 1) << first);
    if (!phase) continue;
    std::fill(std::begin(count), std::end(count), 0);
    uint32_t most = 1;
    for_lanes(phase, [&](int l) {
      for (uint32_t b = 0; b < bytes; b += 4) {
        uint32_t word = (addresses[l] + b) / 4, bank = word % 32, i = 0;
        while (i < count[bank] && seen[bank][i] != word) i++;
        if (i < count[bank]) continue;
        seen[bank][count[bank]++] = word;
        words++;
        most = std::max<uint32_t>(most, count[bank]);
      }
    });
    needed += most;
  }
  return {needed, std::max(1u, (words + 31) / 32)};
}

namespace {

uint32_t sectors(const uint64_t* addresses, Mask lanes, uint32_t bytes) {
  uint64_t list[64];
  int n = 0;
  for_lanes(lanes, [&](int l) {
    for (uint64_t s = addresses[l] / 32; s <= (addresses[l] + bytes - 1) / 32; s++) {
      int i = n;
      while (i > 0 && list[i - 1] != s) i--;
      if (i == 0 && n < 64) list[n++] = s;
    }
  });
  return uint32_t(n);
}

void count_access(Warp& w, Mask m, Space space, const uint64_t* addresses, uint32_t bytes,
                  bool store) {
  EmuStats& s = *w.block.launch.stats;
  if (space == Space::Shared) {
    uint32_t low[LANES];
    for (int l = 0; l < LANES; l++) low[l] = uint32_t(addresses[l]);
    Wavefronts waves = wavefronts(low, m, bytes);
    (store ? s.shared_stores : s.shared_loads)++;
    (store ? s.shared_store_wavefronts : s.shared_load_wavefronts) += waves.needed;
    (store ? s.shared_store_ideal : s.shared_load_ideal) += waves.ideal;
  } else if (space == Space::Global) {
    (store ? s.global_stores : s.global_loads)++;
    (store ? s.global_store_sectors : s.global_load_sectors) += sectors(addresses, m, bytes);
  } else if (space == Space::Local) {
    s.local_accesses++;
  }
}

// The parts that ld and st share: [address] and the registers of one value or a vector.
struct Access {
  Space space;
  Sem sem;
  Address address;
  std::vector<Ref> registers;
  int size;  // bytes of one element
  bool extend_sign;
  uint32_t bytes() const { return uint32_t(size * registers.size()); }
};

Access decode_access(Decoder& d, bool load) {
  Access a;
  a.sem = take_semantics(d);
  a.space = take_space(d);
  if (load) d.mod("nc");
  bool unified = d.mod("unified");
  if (unified) d.reject("no unified addresses");
  bool policy = d.mod("L2::cache_hint");
  d.skip_cache_hints();
  int vector = d.one_of({"v2", "v4", "v8"}, true);
  Type t = d.type();
  size_t n = vector < 0 ? 1 : size_t(2) << vector;
  if (t == Type::B128) d.reject("the type .b128 is not supported");
  d.count_is(policy ? 3 : 2);
  if (policy) d.in(2, Type::B64);
  size_t address = load ? 1 : 0, value = load ? 0 : 1;
  if (a.space == Space::Generic && d.space_of(d.raw(address)) != Space::Generic)
    a.space = d.space_of(d.raw(address));
  if (a.space == Space::Param && d.space_of(d.raw(address)) == Space::Local)
    a.space = Space::Local;  // the .param variables of calls
  if (!load && (a.space == Space::Const || a.space == Space::Param))
    d.reject("this space cannot be written");
  a.address = d.address(address, a.space);
  a.size = size_of(t);
  a.extend_sign = is_signed(t);
  const Operand& o = d.raw(value);
  if ((o.kind == Operand::Kind::Vector ? o.parts.size() : 1) != n)
    d.reject(format("expected %zu registers", n));
  for (size_t i = 0; i < n; i++) {
    const Operand& part = o.kind == Operand::Kind::Vector ? o.parts[i] : o;
    a.registers.push_back(load ? d.out_any(part, t) : d.in_any(part, t));
  }
  return a;
}

uint64_t extended(const Access& a, const uint8_t* from) {
  uint64_t value = 0;
  std::memcpy(&value, from, a.size);
  int shift = 64 - 8 * a.size;
  return a.extend_sign ? uint64_t(int64_t(value << shift) >> shift) : value;
}

Step load_param(const Access& a) {  // the same for all lanes of all blocks
  return [=](Warp& w, Mask m) {
    for_lanes(m, [&](int l) {
      uint64_t at = a.address.of(w, l), end = w.program.function.param_bytes;
      if (at > end || at + a.bytes() > end)
        w.fault(l, format("out of bounds: parameter byte %llu of %llu", (unsigned long long)at,
                          (unsigned long long)end));
      const uint8_t* from = w.block.launch.param_base + at;
      for (size_t i = 0; i < a.registers.size(); i++)
        put(w, a.registers[i], l, extended(a, from + i * a.size));
    });
  };
}

Step ld(Decoder& d) {
  Access a = decode_access(d, true);
  if (a.space == Space::Param) return load_param(a);
  bool strong = a.sem != Sem::Weak;
  if (a.sem == Sem::Release || a.sem == Sem::AcquireRelease) d.reject("a load cannot release");
  uint32_t bytes = a.bytes();
  return [=](Warp& w, Mask m) {
    uint64_t addresses[LANES];
    Space seen = a.space;
    if (strong) w.yield = true;  // it may be the wait of a spin loop
    for_lanes(m, [&](int l) {
      Place p = locate(w, l, a.space, a.address.of(w, l), bytes, bytes);
      addresses[l] = p.address;
      seen = p.space;
      note_read(w, l, p, bytes, strong);
      acquire_at(w, l, p, a.sem);
      if (a.size == 4 && a.registers.size() == 4 && a.registers[0].width == 4) {
        for (int i = 0; i < 4; i++)
          std::memcpy(w.file + a.registers[i].offset + 4 * l, p.host + 4 * i, 4);
        return;
      }
      for (size_t i = 0; i < a.registers.size(); i++)
        put(w, a.registers[i], l, extended(a, p.host + i * a.size));
    });
    count_access(w, m, seen, addresses, bytes, false);
  };
}

Step st(Decoder& d) {
  Access a = decode_access(d, false);
  bool strong = a.sem != Sem::Weak;
  if (a.sem == Sem::Acquire || a.sem == Sem::AcquireRelease) d.reject("a store cannot acquire");
  uint32_t bytes = a.bytes();
  return [=](Warp& w, Mask m) {
    uint64_t addresses[LANES];
    Space seen = a.space;
    for_lanes(m, [&](int l) {
      Place p = locate(w, l, a.space, a.address.of(w, l), bytes, bytes);
      addresses[l] = p.address;
      seen = p.space;
      uint8_t data[64];
      for (size_t i = 0; i < a.registers.size(); i++)
        std::memcpy(data + i * a.size,
                    w.file + a.registers[i].offset + size_t(l) * a.registers[i].width, a.size);
      note_write(w, l, p, bytes, data, strong);
      if (strong || !w.block.launch.released.empty()) release_at(w, l, p, a.sem, false);
      std::memcpy(p.host, data, bytes);
    });
    w.block.launch.progress++;
    count_access(w, m, seen, addresses, bytes, true);
  };
}

// ---- addresses ----

uint64_t window_of(Decoder& d, Space space) {
  switch (space) {
    case Space::Shared:
      return SHARED_WINDOW;
    case Space::Local:
      return LOCAL_WINDOW;
    case Space::Generic:
      d.reject("expected a state space");
    default:
      return 0;
  }
}

Step cvta(Decoder& d) {
  bool to_space = d.mod("to");
  Space space = take_space(d);
  uint64_t window = window_of(d, space);
  Type t = d.type();
  if (size_of(t) != 8) d.reject("the type must be .u64");
  d.count_is(2);
  Ref to = d.out(0, t), from = d.in(1, t);
  if (space == Space::Param)  // addresses of parameters count from the first one
    return [=](Warp& w, Mask m) {
      uint64_t base = reinterpret_cast<uint64_t>(w.block.launch.param_base);
      for_lanes(m, [&](int l) {
        uint64_t address = w.at<uint64_t>(from.offset)[l];
        w.at<uint64_t>(to.offset)[l] = to_space ? address - base : address + base;
      });
    };
  if (to_space)
    return unary<uint64_t, uint64_t>(
        to, from, [window](uint64_t x) { return window ? x & ~WINDOW_MASK : x; });
  return unary<uint64_t, uint64_t>(to, from, [window](uint64_t x) { return x | window; });
}

Step isspacep(Decoder& d) {
  Space space = take_space(d);
  uint64_t window = window_of(d, space);
  d.count_is(2);
  Ref to = d.out(0, Type::Pred), a = d.in(1, Type::B64);
  return [=](Warp& w, Mask m) {
    Mask yes = 0;
    for_lanes(m, [&](int l) {
      uint64_t of = w.at<uint64_t>(a.offset)[l] & WINDOW_MASK;
      bool is = window ? of == window : of != SHARED_WINDOW && of != LOCAL_WINDOW;
      yes |= Mask(is) << l;
    });
    w.set_predicate(to.offset, m, yes);
  };
}

// Instructions that only advise the caches.
Step prefetch(Decoder& d) {
  Space space = take_space(d);
  bool tensor_map = d.mod("tensormap");
  while (d.one_of({"L1", "L2"}, true) >= 0 || d.starting("L1::") || d.starting("L2::")) continue;
  d.count_is(1, 2);
  d.address(0, space);
  if (tensor_map) d.count_is(1);
  return [](Warp&, Mask) {};
}

Step createpolicy(Decoder& d) {
  d.one_of({"fractional", "range", "cvt"});
  d.mod("global");
  while (d.starting("L2::")) continue;
  d.type_is(Type::B64);
  Ref to = d.out(0, Type::B64);
  for (size_t i = 1; i < d.count(); i++)
    if (d.raw(i).kind == Operand::Kind::Register) d.in_any(d.raw(i), Type::B32);
  return unary<uint64_t, uint64_t>(to, d.literal(0, 8), [](uint64_t x) { return x; });
}

Step mapa(Decoder& d) {  // the address in another block of the cluster: a cluster is one block
  d.mod("shared::cluster");

  Type t = d.type();
  d.count_is(3);
  Ref to = d.out(0, t), a = d.in(1, t), rank = d.in(2, Type::U32);
  int size = size_of(t);
  return [=](Warp& w, Mask m) {
    for_lanes(m, [&](int l) {
      if (w.at<uint32_t>(rank.offset)[l] != 0) w.fault(l, "mapa: the cluster has one block");
      uint64_t value = 0;
      std::memcpy(&value, w.file + a.offset + l * size, size);
      put(w, to, l, value);
    });
  };
}

}  // namespace

DecodeFunction find_memory(const std::string& opcode) {
  static const std::map<std::string, DecodeFunction> table = {
      {"ld", ld},
      {"ldu", ld},
      {"st", st},
      {"cvta", cvta},
      {"isspacep", isspacep},
      {"prefetch", prefetch},
      {"prefetchu", prefetch},
      {"applypriority", prefetch},
      {"createpolicy", createpolicy},
      {"mapa", mapa},
  };
  auto found = table.find(opcode);
  return found == table.end() ? nullptr : found->second;
}

}  // namespace emu
