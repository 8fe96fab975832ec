// mbarrier: phases, arrivals and expected bytes.
#include "mbarrier.h"

#include "decode.h"

namespace emu {

namespace {

constexpr int64_t MAX_COUNT = (1 << 20) - 1;

void complete_if_ready(Block& block, uint32_t address, Mbarrier& b) {
  if (b.pending || b.bytes) return;
  b.phase++;
  b.pending = b.count;
  if (RowRef row = b.sync.take()) {
    if (b.released) {
      auto both = std::make_shared<Row>(*b.released);
      join(*both, *row);
      b.released = both;
    } else {
      b.released = row;
    }
  }
  block.launch.stats->mbarrier_phases++;
  block.launch.progress++;
  for (auto& warp : block.warps)
    for_lanes(warp->blocked, [&](int l) {
      Wait& wait = warp->wait[l];
      if (wait.kind != Wait::Kind::Mbarrier || wait.id != address) return;
      wait = Wait{};
      warp->blocked &= ~(Mask(1) << l);
    });
}

void check_sees_init(Warp& w, int lane, uint32_t address, const Mbarrier& b) {
  if (!w.block.launch.checks() || (b.init_warp == w.index && b.init_lane == lane)) return;
  const Row* row = w.row[lane].get();
  uint32_t c = component(b.init_warp, b.init_lane);
  if (!row || row->known.size() <= c || row->known[c] < b.init_clock)
    w.fault(lane, format("mbarrier 0x%x: used without a barrier after its mbarrier.init by "
                         "thread %d",
                         address, b.init_warp * LANES + b.init_lane));
}

}  // namespace

Mbarrier& mbarrier_at(Warp& w, int lane, uint32_t address) {
  w.block.shared_at(w, lane, address, 8, 8);
  auto found = w.block.mbarriers.find(address);
  if (found == w.block.mbarriers.end())
    w.fault(lane, format("mbarrier 0x%x: never initialised, or invalidated", address));
  check_sees_init(w, lane, address, found->second);
  return found->second;
}

void mbarrier_arrive(Warp& w, int lane, uint32_t address, uint32_t count) {
  Mbarrier& b = mbarrier_at(w, lane, address);
  if (count == 0 || count > b.pending)
    w.fault(lane, format("mbarrier 0x%x: arrival past its count (%u arrive, %u of %u pending)",
                         address, count, b.pending, b.count));
  if (w.block.launch.checks()) b.sync.release(w, Mask(1) << lane);
  b.pending -= count;
  complete_if_ready(w.block, address, b);
}

void mbarrier_expect(Warp& w, int lane, uint32_t address, int64_t bytes) {
  Mbarrier& b = mbarrier_at(w, lane, address);
  b.bytes += bytes;
  if (b.bytes > MAX_COUNT || b.bytes < -MAX_COUNT)
    w.fault(lane, format("mbarrier 0x%x: %lld bytes expected, the limit is %lld", address,
                         (long long)b.bytes, (long long)MAX_COUNT));
}

void mbarrier_complete_bytes(Block& block, uint32_t address, int64_t bytes) {
  auto found = block.mbarriers.find(address);
  if (found == block.mbarriers.end())
    throw Fault(format("mbarrier 0x%x: gone while a copy into its bytes was in flight", address));
  found->second.bytes -= bytes;
  if (found->second.bytes < -MAX_COUNT)
    throw Fault(format("mbarrier 0x%x: more bytes came than it can count", address));
  complete_if_ready(block, address, found->second);
}

Event mbarrier_async_event(Block& block, Mbarrier& b) {
  Event e;
  e.block = block.serial;
  e.kind = Event::Kind::Async;
  e.warp = uint16_t(b.component);
  e.clock = ++b.clock;
  b.sync.add(b.component, e.clock);
  return e;
}

namespace {

// The optional ".shared::cta" and the scopes and semantics that mbarrier instructions carry.
void take_qualifiers(Decoder& d) {
  if (!d.mod("shared::cta") && !d.mod("shared::cluster")) d.mod("shared");
  d.one_of({"release", "acquire", "relaxed"}, true);
  d.one_of({"cta", "cluster"}, true);
  d.type_is(Type::B64);
}

uint32_t address_of(const Address& a, Warp& w, int lane) {
  return uint32_t(a.of(w, lane));  // a generic address's low half is the shared one
}

uint64_t state_token(const Mbarrier& b) { return uint64_t(b.phase) << 32 | b.pending; }

Step init(Decoder& d) {
  take_qualifiers(d);
  d.count_is(2);
  Address a = d.address(0, Space::Shared);
  Ref count = d.in(1, Type::U32);
  return [=](Warp& w, Mask m) {
    for_lanes(m, [&](int l) {
      uint32_t address = address_of(a, w, l), n = w.at<uint32_t>(count.offset)[l];
      Block& block = w.block;
      block.shared_at(w, l, address, 8, 8);
      if (n == 0 || n > MAX_COUNT) w.fault(l, format("mbarrier.init: count %u", n));
      if (block.mbarriers.count(address))
        w.fault(l, format("mbarrier 0x%x: initialised twice", address));
      if (block.launch.checks()) {
        block.shadow.write({w, l}, address, 8, nullptr, nullptr);
        block.shadow.mark_barrier(address, true);
      }
      Mbarrier b;
      b.count = b.pending = n;
      auto [known, added] = block.async_components.try_emplace(address, 0u, 0u);
      if (added) known->second.first = block.components++;
      b.component = known->second.first;
      b.clock = known->second.second;
      b.init_warp = w.index;
      b.init_lane = l;
      b.init_clock = w.clock;
      block.mbarriers[address] = std::move(b);
    });
  };
}

Step inval(Decoder& d) {
  take_qualifiers(d);
  d.count_is(1);
  Address a = d.address(0, Space::Shared);
  return [=](Warp& w, Mask m) {
    for_lanes(m, [&](int l) {
      uint32_t address = address_of(a, w, l);
      Mbarrier& b = mbarrier_at(w, l, address);
      for (auto& warp : w.block.warps)
        for_lanes(warp->blocked, [&](int other) {
          const Wait& wait = warp->wait[other];
          if (wait.kind == Wait::Kind::Mbarrier && wait.id == address)
            w.fault(l, format("mbarrier 0x%x: invalidated while thread %d waits", address,
                              warp->thread(other)));
        });
      if (b.bytes)
        w.fault(l, format("mbarrier 0x%x: invalidated with %lld bytes outstanding", address,
                          (long long)b.bytes));
      w.block.async_components[address].second = b.clock;
      w.block.mbarriers.erase(address);
      if (w.block.launch.checks()) w.block.shadow.mark_barrier(address, false);
    });
  };
}

Step arrive(Decoder& d, bool drop) {
  bool expect = d.mod("expect_tx"), no_complete = d.mod("noComplete");
  take_qualifiers(d);
  d.count_is(1, 3);
  // [state,] [address] [, count or bytes]
  size_t at = d.is_address(0) ? 0 : 1;
  Ref state = at ? d.out(0, Type::B64) : Ref{};
  Address a = d.address(at, Space::Shared);
  bool counted = d.count() > at + 1;
  if ((expect || no_complete) && !counted) d.reject("expected a count");
  Ref count = counted ? d.in(at + 1, Type::U32) : Ref{};
  return [=](Warp& w, Mask m) {
    for_lanes(m, [&](int l) {
      uint32_t address = address_of(a, w, l);
      uint32_t n = counted ? w.at<uint32_t>(count.offset)[l] : 1;
      Mbarrier& b = mbarrier_at(w, l, address);
      if (at) put(w, state, l, state_token(b));
      if (expect) mbarrier_expect(w, l, address, n);
      if (no_complete && n >= b.pending)
        w.fault(l, format("mbarrier 0x%x: .noComplete would complete the phase", address));
      if (drop) {
        uint32_t gone = expect ? 1 : n;
        if (gone > b.count) w.fault(l, format("mbarrier 0x%x: drop past its count", address));
        b.count -= gone;
      }
      mbarrier_arrive(w, l, address, expect ? 1 : n);
    });
  };
}

Step transactions(Decoder& d, bool expect) {  // expect_tx, complete_tx
  take_qualifiers(d);
  d.count_is(2);
  Address a = d.address(0, Space::Shared);
  Ref bytes = d.in(1, Type::U32);
  return [=](Warp& w, Mask m) {
    for_lanes(m, [&](int l) {
      uint32_t address = address_of(a, w, l), n = w.at<uint32_t>(bytes.offset)[l];
      mbarrier_at(w, l, address);
      if (expect)
        mbarrier_expect(w, l, address, n);
      else
        mbarrier_complete_bytes(w.block, address, n);
    });
  };
}

Step wait(Decoder& d, bool may_block) {
  bool parity = d.mod("parity");
  take_qualifiers(d);
  d.count_is(3, may_block ? 4 : 3);
  Ref to = d.out(0, Type::Pred);
  Address a = d.address(1, Space::Shared);
  Ref value = d.in(2, parity ? Type::B32 : Type::B64);
  if (d.count() == 4) d.in(3, Type::U32);  // a time limit: it may give up any time anyhow
  return [=](Warp& w, Mask m) {
    Mask ready = 0, not_ready = 0;
    for_lanes(m, [&](int l) {
      Mbarrier& b = mbarrier_at(w, l, address_of(a, w, l));
      bool done = parity ? (b.phase & 1) != (w.at<uint32_t>(value.offset)[l] & 1)
                         : b.phase > uint32_t(w.at<uint64_t>(value.offset)[l] >> 32);
      (done ? ready : not_ready) |= Mask(1) << l;
      if (!done || !w.block.launch.checks()) return;
      acquire(w, Mask(1) << l, b.released);
    });
    if (not_ready) w.yield = true;
    // try_wait suspends the thread for a while, and may come back without the phase
    Launch& launch = w.block.launch;
    bool gives_up = launch.config.async != EMU_ASYNC_EARLY && launch.random() % 2;
    if (may_block && not_ready && !gives_up) {
      for_lanes(not_ready, [&](int l) {
        uint32_t parity_value = parity ? w.at<uint32_t>(value.offset)[l] & 1
                                       : uint32_t(w.at<uint64_t>(value.offset)[l] >> 32) & 1;
        w.block_lanes(Mask(1) << l, {Wait::Kind::Mbarrier, address_of(a, w, l), parity_value},
                      false);
      });
      m &= ~not_ready;
    }
    w.set_predicate(to.offset, m, ready);
  };
}

Step pending_count(Decoder& d) {
  d.type_is(Type::B64);
  d.count_is(2);
  return unary<uint32_t, uint64_t>(d.out(0, Type::U32), d.in(1, Type::B64),
                                   [](uint64_t state) { return uint32_t(state & 0xfffff); });
}

Step mbarrier(Decoder& d) {
  switch (d.one_of({"init", "inval", "arrive", "arrive_drop", "expect_tx", "complete_tx",
                    "test_wait", "try_wait", "pending_count"})) {
    case 0:
      return init(d);
    case 1:
      return inval(d);
    case 2:
      return arrive(d, false);
    case 3:
      return arrive(d, true);
    case 4:
      return transactions(d, true);
    case 5:
      return transactions(d, false);
    case 6:
      return wait(d, false);
    case 7:
      return wait(d, true);
    default:
      return pending_count(d);
  }
}

}  // namespace

DecodeFunction find_mbarrier(const std::string& opcode) {
  return opcode == "mbarrier" ? mbarrier : nullptr;
}

}  // namespace emu
