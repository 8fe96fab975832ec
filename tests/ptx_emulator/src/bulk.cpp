#include "bulk.h"

#include <algorithm>

#include "atomic.h"
#include "mbarrier.h"
#include "memory.h"
#include "tensor_map.h"

namespace emu {

namespace {

// ---- into shared memory ----

// One contiguous piece of a copy: global address (0: fill), shared address, bytes.
struct Piece {
  uint64_t global;
  uint32_t shared, bytes;
};

// Everything that a copy of a box moves, row by row, swizzled.
std::vector<Piece> pieces(const TensorMap& map, uint32_t shared, const int32_t* at) {
  std::vector<Piece> out;
  uint32_t rows = 1, element = map.element(), inner = map.box[0] * element, span = map.span();
  for (int i = 1; i < map.rank; i++) rows *= map.box[i];
  for (uint32_t row = 0; row < rows; row++) {
    uint32_t rest = row;
    bool inside = true;
    uint64_t address = map.base;
    for (int i = 1; i < map.rank; i++) {
      int64_t x = int64_t(at[i]) + rest % map.box[i];
      rest /= map.box[i];
      inside &= x >= 0 && x < int64_t(map.dim[i]);
      address += uint64_t(x) * map.stride[i];
    }
    for (uint32_t byte = 0; byte < inner; byte += 16) {
      uint32_t to = swizzled(shared + row * inner + byte, span);
      int64_t first = int64_t(at[0]) + byte / element, last = first + 16 / element;
      int64_t from = std::clamp<int64_t>(first, 0, map.dim[0]);
      int64_t end = inside ? std::clamp<int64_t>(last, 0, map.dim[0]) : from;
      if (!inside || from >= end) {
        out.push_back({0, to, 16});
        continue;
      }
      uint32_t before = uint32_t(from - first) * element, have = uint32_t(end - from) * element;
      if (before) out.push_back({0, to, before});
      out.push_back({address + uint64_t(from) * element, to + before, have});
      if (before + have < 16) out.push_back({0, to + before + have, 16 - before - have});
    }
  }
  return out;
}

// Calls f(address, bytes) for runs of pieces that are contiguous in global memory.
template <class F>
void global_runs(const std::vector<Piece>& list, F&& f) {
  uint64_t begin = 0, end = 0;
  for (const Piece& p : list) {
    if (!p.global) continue;
    if (p.global != end) {
      if (end > begin) f(begin, uint32_t(end - begin));
      begin = p.global;
    }
    end = p.global + p.bytes;
  }
  if (end > begin) f(begin, uint32_t(end - begin));
}

void fill(uint8_t* to, uint32_t bytes, Type type, bool nan) {
  std::memset(to, 0, bytes);
  if (!nan) return;
  uint64_t bits = type == Type::F16 ? 0x7fff : type == Type::BF16 ? 0x7fff : NAN_F32;
  for (uint32_t i = 0; i < bytes; i += size_of(type)) std::memcpy(to + i, &bits, size_of(type));
}

void load(Warp& w, int lane, std::vector<Piece> list, uint32_t to, uint32_t bytes, uint32_t barrier,
          Type type, bool nan) {
  Block& block = w.block;
  Launch& launch = block.launch;
  mbarrier_at(w, lane, barrier);
  block.shared_at(w, lane, to, bytes, 16);
  global_runs(list, [&](uint64_t address, uint32_t n) {
    note_read(w, lane, locate(w, lane, Space::Global, address, n, 1), n);
  });
  Shadow::Access access{w, lane};
  access.async = true;
  if (launch.checks()) block.shadow.begin_write(access, to, bytes);
  launch.stats->bulk_bytes += bytes;
  defer(w, [&block, list = std::move(list), to, bytes, barrier, type, nan] {
    for (const Piece& p : list) {
      uint8_t* shared = &block.shared[p.shared - SHARED_BASE];
      if (p.global)
        std::memcpy(shared, reinterpret_cast<const uint8_t*>(p.global), p.bytes);
      else
        fill(shared, p.bytes, type, nan);
    }
    auto b = block.mbarriers.find(barrier);
    if (b == block.mbarriers.end())
      throw Fault(format("mbarrier 0x%x: invalidated while a copy was in flight", barrier));
    if (block.launch.checks())
      block.shadow.end_write(to, bytes, mbarrier_async_event(block, b->second), false);
    mbarrier_complete_bytes(block, barrier, bytes);
  });
}

// ---- out of shared memory ----

void store(Warp& w, int lane, const std::vector<Piece>& list, uint32_t from, uint32_t bytes,
           Update update, Type type) {
  Block& block = w.block;
  Launch& launch = block.launch;
  block.shared_at(w, lane, from, bytes, 16);
  Shadow::Access access{w, lane};
  access.async = true;
  auto op = std::make_shared<BulkRead>();
  op->ranges = {{from, bytes}};
  if (launch.checks()) block.shadow.begin_read(access, from, bytes);
  launch.stats->bulk_bytes += bytes;
  struct Written {
    uint64_t address;
    std::vector<uint8_t> data;
  };
  std::vector<Written> writes;
  for (const Piece& p : list) {
    if (!p.global) continue;
    const uint8_t* data = &block.shared[p.shared - SHARED_BASE];
    Place place = locate(w, lane, Space::Global, p.global, p.bytes, 1);
    note_write(w, lane, place, p.bytes, update ? nullptr : data, update != nullptr);
    writes.push_back({p.global, std::vector<uint8_t>(data, data + p.bytes)});
  }
  uint32_t size = uint32_t(size_of(type));
  op->perform = [writes = std::move(writes), update, size, &launch] {
    for (const Written& one : writes) {
      uint8_t* to = reinterpret_cast<uint8_t*>(one.address);
      if (!update) {
        std::memcpy(to, one.data.data(), one.data.size());
        continue;
      }
      for (size_t i = 0; i < one.data.size(); i += size) {
        uint64_t old = 0, operand = 0;
        std::memcpy(&old, to + i, size);
        std::memcpy(&operand, &one.data[i], size);
        uint64_t result = update(old, operand, 0);
        std::memcpy(to + i, &result, size);
      }
    }
    launch.progress++;
  };
  if (launch.config.async == EMU_ASYNC_EARLY ||
      (launch.config.async == EMU_ASYNC_RANDOM && launch.random() % 2)) {
    op->perform();
    op->landed = true;
  }
  w.copies[lane].bulk_open.push_back(op);
}

void finish_read(Warp& w, int lane, BulkRead& op) {
  if (op.read_done) return;
  op.read_done = true;
  if (!w.block.launch.checks()) return;
  for (auto [address, bytes] : op.ranges) w.block.shadow.end_read({w, lane}, address, bytes);
}

// ---- decoding ----

Rmw take_reduction(Decoder& d) {
  static constexpr Rmw kinds[] = {Rmw::Add, Rmw::Min, Rmw::Max, Rmw::Inc,
                                  Rmw::Dec, Rmw::And, Rmw::Or,  Rmw::Xor};
  return kinds[d.one_of({"add", "min", "max", "inc", "dec", "and", "or", "xor"})];
}

bool take_shared(Decoder& d) {
  return d.mod("shared::cluster") || d.mod("shared::cta") || d.mod("shared");
}

// The direction: the order of the state spaces in the name.
bool into_shared(Decoder& d) {
  const std::vector<std::string>& m = d.source().modifiers;
  auto global = std::find(m.begin(), m.end(), "global");
  auto shared = std::find_if(m.begin(), m.end(),
                             [](const std::string& s) { return s.starts_with("shared"); });
  if (global == m.end() || shared == m.end()) d.reject("expected .global and .shared");
  d.mod("global");
  take_shared(d);
  return shared < global;
}

void take_completion(Decoder& d, bool load) {
  if (!d.mod(load ? "mbarrier::complete_tx::bytes" : "bulk_group"))
    d.reject(load ? "expected .mbarrier::complete_tx::bytes" : "expected .bulk_group");
}

const TensorMap& map_of(Warp& w, int lane, uint64_t address, int rank) {
  if (address % 64)
    w.fault(lane, format("misaligned: the tensor map at 0x%llx is not aligned to 64 bytes",
                         (unsigned long long)address));
  w.block.launch.check_global(w, lane, address, sizeof(TensorMap));
  const TensorMap& map = *reinterpret_cast<const TensorMap*>(address);
  if (map.magic != TensorMap::MAGIC) w.fault(lane, "there is no tensor map at this address");
  if (map.rank != rank)
    w.fault(lane, format("the tensor map has rank %d, the instruction %d", map.rank, rank));
  return map;
}

Step tensor(Decoder& d, bool reduce, bool prefetch) {
  int rank = 1 + d.one_of({"1d", "2d", "3d", "4d", "5d"});
  d.mod("tile");
  bool in = prefetch || into_shared(d);
  Rmw kind = reduce ? take_reduction(d) : Rmw::Add;
  if (prefetch) {
    if (!d.mod("L2") || !d.mod("global")) d.reject("expected .L2.global");
  } else {
    take_completion(d, in);
  }
  bool policy = d.mod("L2::cache_hint");
  size_t operands = (prefetch ? 1 : in ? 3 : 2) + policy;
  d.count_is(operands);
  if (policy) d.in(operands - 1, Type::B64);
  if (reduce && in) d.reject("a reduction goes to global memory");
  size_t at = in && !prefetch ? 1 : 0;
  Address map_address = d.address(at, Space::Generic, 2);
  const Operand& coordinates = d.part(at, 1);
  std::vector<Ref> where;
  if (coordinates.kind == Operand::Kind::Vector)
    for (const Operand& o : coordinates.parts) where.push_back(d.in(o, Type::B32));
  else
    where.push_back(d.in(coordinates, Type::B32));
  if (where.size() != size_t(rank))
    d.reject(format("expected %d coordinates, got %zu", rank, where.size()));
  if (prefetch) return [](Warp&, Mask) {};
  Address shared = d.address(in ? 0 : 1, Space::Shared);
  Address barrier = in ? d.address(2, Space::Shared) : shared;
  return [=](Warp& w, Mask m) {
    for_lanes(m, [&](int l) {
      const TensorMap& map = map_of(w, l, map_address.of(w, l), rank);
      uint32_t address = uint32_t(shared.of(w, l)), bytes = map.box_bytes();
      // what a swizzle repeats must begin on a boundary of its own
      uint32_t align = 128;
      if (address % align)
        w.fault(l, format("misaligned: shared address 0x%x of a tensor copy is no multiple of %u",
                          address, align));
      w.block.shared_at(w, l, address, bytes, 16);
      int32_t coordinate[5] = {};
      for (int i = 0; i < rank; i++) coordinate[i] = w.at<int32_t>(where[i].offset)[l];
      std::vector<Piece> list = pieces(map, address, coordinate);
      if (in) {
        load(w, l, std::move(list), address, bytes, uint32_t(barrier.of(w, l)), map.type(),
             map.fill_nan);
        return;
      }
      Update update = reduce ? find_update(kind, map.type(), true) : nullptr;
      if (reduce && !update) w.fault(l, "this reduction is not for the tensor map's type");
      store(w, l, list, address, bytes, update, map.type());
    });
  };
}

Step linear(Decoder& d, bool reduce, bool prefetch) {
  bool in = prefetch || into_shared(d);
  Rmw kind = reduce ? take_reduction(d) : Rmw::Add;
  if (prefetch) {
    if (!d.mod("L2") || !d.mod("global")) d.reject("expected .L2.global");
  } else {
    take_completion(d, in);
  }
  bool policy = d.mod("L2::cache_hint");
  d.mod("noftz");
  Type type = reduce ? d.type() : Type::B8;
  Update update = reduce ? find_update(kind, type, true) : nullptr;
  if (reduce && (in || !update)) d.reject("this reduction is not known");
  size_t operands = (prefetch ? 2 : in ? 4 : 3) + policy;
  d.count_is(operands);
  if (policy) d.in(operands - 1, Type::B64);
  if (prefetch) {
    d.address(0, Space::Global);
    d.in(1, Type::U32);
    return [](Warp&, Mask) {};
  }
  Address to = d.address(0, in ? Space::Shared : Space::Global);
  Address from = d.address(1, in ? Space::Global : Space::Shared);
  Ref size = d.in(2, Type::U32);
  Address barrier = in ? d.address(3, Space::Shared) : to;
  return [=](Warp& w, Mask m) {
    for_lanes(m, [&](int l) {
      uint32_t bytes = w.at<uint32_t>(size.offset)[l];
      uint64_t global = (in ? from : to).of(w, l);
      uint32_t shared = uint32_t((in ? to : from).of(w, l));
      if (bytes == 0 || bytes % 16 || global % 16 || shared % 16)
        w.fault(l, format("misaligned: a bulk copy of %u bytes, global 0x%llx, shared 0x%x: all "
                          "must be multiples of 16",
                          bytes, (unsigned long long)global, shared));
      w.block.shared_at(w, l, shared, bytes, 16);
      std::vector<Piece> list = {{global, shared, bytes}};
      if (in)
        load(w, l, list, shared, bytes, uint32_t(barrier.of(w, l)), Type::B8, false);
      else
        store(w, l, list, shared, bytes, update, type);
    });
  };
}

Step commit(Decoder& d) {
  d.count_is(0);
  return [](Warp& w, Mask m) {
    for_lanes(m, [&](int l) {
      LaneCopies& c = w.copies[l];
      c.bulk_groups.push_back(std::move(c.bulk_open));
      c.bulk_open.clear();
    });
  };
}

Step wait(Decoder& d) {
  bool read_only = d.mod("read");
  d.count_is(1);
  uint32_t keep = d.constant(0);
  return [=](Warp& w, Mask m) {
    for_lanes(m, [&](int l) {
      auto& groups = w.copies[l].bulk_groups;
      size_t done = groups.size() > keep ? groups.size() - keep : 0;
      for (size_t i = 0; i < done; i++)
        for (auto& op : groups[i]) {
          finish_read(w, l, *op);
          if (!read_only && !op->landed) op->perform(), op->landed = true;
        }
      if (!read_only)
        for (size_t i = 0; i < done; i++) groups.pop_front();
    });
  };
}

}  // namespace

Step bulk_copy(Decoder& d) {
  bool reduce = d.mod("reduce");
  if (!d.mod("async") || !d.mod("bulk")) d.reject("expected .async.bulk");
  if (d.mod("commit_group")) return commit(d);
  if (d.mod("wait_group")) return wait(d);
  bool prefetch = d.mod("prefetch");
  return d.mod("tensor") ? tensor(d, reduce, prefetch) : linear(d, reduce, prefetch);
}

}  // namespace emu
