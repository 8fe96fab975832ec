// cp.async of threads: groups, and arrival on an mbarrier.
#include "bulk.h"
#include "mbarrier.h"
#include "memory.h"

namespace emu {

namespace {

bool lands_now(Launch& launch) {
  return launch.config.async == EMU_ASYNC_EARLY ||
         (launch.config.async == EMU_ASYNC_RANDOM && launch.random() % 2);
}

void land(Warp& w, AsyncCopy& c) {
  if (c.landed) return;
  c.landed = true;
  uint8_t* to = &w.block.shared[c.to - SHARED_BASE];
  std::memset(to, 0, c.bytes);
  if (c.read) std::memcpy(to, c.from, c.read);
}

Event event_of_lane(Warp& w, int lane) {
  Event e;
  e.block = w.block.serial;
  e.clock = w.clock;
  e.lanes = Mask(1) << lane;
  e.warp = uint16_t(w.index);
  e.kind = Event::Kind::Lanes;
  e.op = uint32_t(w.op - w.program.ops.data());
  return e;
}

void finish(Warp& w, int lane, std::vector<AsyncCopy>& group) {
  for (AsyncCopy& c : group) {
    land(w, c);
    if (w.block.launch.checks())
      w.block.shadow.end_write(c.to, c.bytes, event_of_lane(w, lane), true);
  }
  group.clear();
}

Step copy(Decoder& d) {
  bool all_levels = d.one_of({"ca", "cg"}) == 0;
  if (!d.mod("shared") && !d.mod("shared::cta")) d.reject("expected .shared");
  if (!d.mod("global")) d.reject("expected .global");
  bool policy = d.mod("L2::cache_hint");
  d.skip_cache_hints();
  d.count_is(policy ? 4 : 3, policy ? 5 : 4);
  Address to = d.address(0, Space::Shared), from = d.address(1, Space::Global);
  uint32_t bytes = d.constant(2);
  if (bytes != 16 && (!all_levels || (bytes != 4 && bytes != 8)))
    d.reject("the size must be 4, 8 or 16; .cg takes 16");
  if (policy) d.in(d.count() - 1, Type::B64);
  // the source size, or a predicate that asks to ignore the source
  bool sized = d.count() - policy == 4, ignore = false;
  Ref size;
  if (sized) {
    const Operand& o = d.raw(3);
    ignore = o.kind == Operand::Kind::Register &&
             d.program().function.registers[o.reg].type == Type::Pred;
    size = d.in(o, ignore ? Type::Pred : Type::B32);
  }
  return [=](Warp& w, Mask m) {
    Launch& launch = w.block.launch;
    for_lanes(m, [&](int l) {
      uint32_t read = bytes;
      if (ignore) read = predicate_value(w, size) >> l & 1 ? 0 : bytes;
      if (sized && !ignore) read = w.at<uint32_t>(size.offset)[l];
      if (read > bytes) w.fault(l, format("cp.async: source size %u of %u", read, bytes));
      Place p = locate(w, l, Space::Shared, to.of(w, l), bytes, bytes);
      uint64_t source = from.of(w, l);
      if (read) {
        Place g = locate(w, l, Space::Global, source, read, 1);
        if (source % bytes)
          w.fault(l, format("misaligned: cp.async source 0x%llx is no multiple of %u",
                            (unsigned long long)source, bytes));
        note_read(w, l, g, read);
      }
      if (launch.checks()) w.block.shadow.begin_write({w, l}, p.address, bytes);
      AsyncCopy c{uint32_t(p.address), reinterpret_cast<const uint8_t*>(source), bytes, read,
                  false};
      launch.stats->cp_async_bytes += read;
      if (lands_now(launch)) land(w, c);
      w.copies[l].open.push_back(c);
    });
  };
}

Step commit(Decoder& d) {
  d.count_is(0);
  return [](Warp& w, Mask m) {
    for_lanes(m, [&](int l) {
      LaneCopies& c = w.copies[l];
      c.groups.push_back(std::move(c.open));
      c.open.clear();
    });
  };
}

Step wait(Decoder& d, bool all) {
  d.count_is(all ? 0 : 1);
  uint32_t keep = all ? 0 : d.constant(0);
  return [=](Warp& w, Mask m) {
    for_lanes(m, [&](int l) {
      LaneCopies& c = w.copies[l];
      for (; c.groups.size() > keep; c.groups.pop_front()) finish(w, l, c.groups.front());
      if (all) finish(w, l, c.open);
    });
  };
}

// The barrier's arrival is triggered once the lane's copies so far have landed.
Step arrive(Decoder& d) {
  if (!d.mod("arrive")) d.reject("expected .arrive");
  bool counted = d.mod("noinc");  // the arrival is part of the barrier's count
  if (!d.mod("shared::cta")) d.mod("shared");
  d.type_is(Type::B64);
  d.count_is(1);
  Address a = d.address(0, Space::Shared);
  return [=](Warp& w, Mask m) {
    for_lanes(m, [&](int l) {
      uint32_t address = uint32_t(a.of(w, l));
      Mbarrier& b = mbarrier_at(w, l, address);
      if (!counted) b.pending++;
      LaneCopies& c = w.copies[l];
      auto landing = std::make_shared<std::vector<AsyncCopy>>();
      auto take = [&](std::vector<AsyncCopy>& from) {
        landing->insert(landing->end(), from.begin(), from.end());
        from.clear();
      };
      for (auto& group : c.groups) take(group);
      take(c.open);
      const Op* op = w.op;
      defer(w, [&w, l, address, landing, op] {
        w.op = op;
        finish(w, l, *landing);
        mbarrier_arrive(w, l, address, 1);
      });
    });
  };
}

Step cp(Decoder& d) {
  if (d.peek("bulk")) return bulk_copy(d);
  if (d.mod("reduce")) d.reject("expected .bulk");
  if (!d.mod("async")) d.reject("expected .async");
  if (d.mod("commit_group")) return commit(d);
  if (d.mod("wait_group")) return wait(d, false);
  if (d.mod("wait_all")) return wait(d, true);
  if (d.mod("mbarrier")) return arrive(d);
  return copy(d);
}

}  // namespace

void defer(Warp& w, std::function<void()> perform) {
  Launch& launch = w.block.launch;
  if (launch.config.async == EMU_ASYNC_EARLY) {
    perform();
    return;
  }
  w.block.pending.push_back({std::move(perform)});
}

DecodeFunction find_copy(const std::string& opcode) { return opcode == "cp" ? cp : nullptr; }

}  // namespace emu
