// bar and barrier: the block's named barriers.
#include "decode.h"

namespace emu {

Step bar_warp(Decoder&);

namespace {

enum class Action { Sync, Arrive, Reduce };

// Threads that an arrival stands for: a warp's missing lanes count as arrived with its last ones.
uint32_t weight(Warp& w, Mask m) {
  uint32_t lanes = uint32_t(std::popcount(m));
  Mask last = w.exists & ~(w.exists >> 1);  // the highest lane of a partial warp
  return m & last ? lanes + LANES - uint32_t(std::popcount(w.exists)) : lanes;
}

void complete(Block& block, NamedBarrier& b) {
  RowRef row = b.sync.take();

  for (NamedBarrier::Waiter& waiter : b.waiters) {
    Warp& w = *waiter.warp;
    acquire(w, waiter.lanes, row);
    if (waiter.result >= 0) {
      uint32_t offset = uint32_t(waiter.result);
      if (b.reduction == 1)
        for_lanes(waiter.lanes, [&](int l) { w.at<uint32_t>(offset)[l] = b.votes; });
      else
        w.set_predicate(offset, waiter.lanes,
                        (b.reduction == 2 ? b.votes == b.voters : b.votes != 0) ? ALL : 0);
    }
    w.blocked &= ~waiter.lanes;
    for_lanes(waiter.lanes, [&](int l) { w.wait[l] = Wait{}; });
  }
  b = NamedBarrier{};
  block.launch.progress++;
}

void arrive(Warp& w, Mask m, uint32_t id, uint32_t need, Action action, int reduction, Mask votes,
            int64_t result) {
  Block& block = w.block;
  int lane = std::countr_zero(m);
  if (id > 15) w.fault(lane, format("barrier %u: there are 16", id));
  if (need % LANES)
    w.fault(lane, format("barrier %u: %u threads are no whole number of warps", id, need));
  if (need > block.warps.size() * LANES)
    w.fault(lane, format("barrier %u waits for %u threads, the block has %zu", id, need,
                         block.warps.size() * LANES));
  NamedBarrier& b = block.barriers[id];
  if (b.arrived && b.need != need)
    w.fault(lane, format("barrier %u: %u threads here, %u where others arrived", id, need, b.need));
  if (b.arrived && b.reduction != reduction)
    w.fault(lane, format("barrier %u: others arrived with another operation", id));
  for (auto& [warp, lanes] : b.here)
    if (warp == &w && (lanes & m))
      w.fault(lane, format("barrier %u: the thread arrived twice in one phase", id));
  b.need = need;
  b.reduction = reduction;
  b.here.emplace_back(&w, m);
  if (block.launch.checks()) b.sync.release(w, m);
  b.arrived += weight(w, m);
  b.votes += uint32_t(std::popcount(votes & m));
  b.voters += uint32_t(std::popcount(m));
  block.launch.stats->barriers++;
  if (b.arrived > need)
    w.fault(lane, format("barrier %u: %u threads arrived, it counts %u", id, b.arrived, need));
  if (action != Action::Arrive) {
    b.waiters.push_back({&w, m, result});
    w.block_lanes(m, Wait{Wait::Kind::Barrier, id, 0}, true);
  }
  if (b.arrived == need) complete(block, b);
}

Step bar(Decoder& d) {
  bool full_name = d.source().opcode == "barrier";
  if (!full_name && d.mod("warp")) return bar_warp(d);
  if (full_name && d.mod("cluster")) {  // a cluster is one block: arrive then wait is bar.sync
    int what = d.one_of({"arrive", "wait"});
    d.one_of({"release", "relaxed", "acquire"}, true);
    d.mod("aligned");
    d.count_is(0);
    if (what == 0) return [](Warp&, Mask) {};
    return [](Warp& w, Mask m) {
      if (!w.gather_all(m)) return;
      arrive(w, m, 15, uint32_t(w.block.warps.size() * LANES), Action::Sync, 0, 0, -1);
    };
  }
  d.mod("cta");
  static constexpr Action actions[] = {Action::Sync, Action::Arrive, Action::Reduce};
  Action action = actions[d.one_of({"sync", "arrive", "red"})];
  bool aligned = d.mod("aligned") || !full_name;
  int reduction = 0;
  size_t at = 0;
  Ref to, p;
  if (action == Action::Reduce) {
    reduction = 1 + d.one_of({"popc", "and", "or"});
    Type t = d.type();
    if (t != (reduction == 1 ? Type::U32 : Type::Pred)) d.reject("the result's type is wrong");
    d.count_is(3, 4);
    to = d.out(0, t);
    p = d.in(d.count() - 1, Type::Pred);
    at = 1;
  } else {
    d.count_is(1, 2);
  }
  Ref id = d.in(at, Type::B32);
  size_t operands = d.count() - at - (action == Action::Reduce);
  if (action == Action::Arrive && operands < 2) d.reject("expected the number of threads");
  bool counted = operands == 2;
  Ref threads = counted ? d.in(at + 1, Type::B32) : id;
  int64_t result = action == Action::Reduce ? int64_t(to.offset) : -1;
  return [=](Warp& w, Mask m) {
    if (aligned && !w.gather_all(m)) return;
    int lane = std::countr_zero(m);
    uint32_t which = w.at<uint32_t>(id.offset)[lane];
    uint32_t need =
        counted ? w.at<uint32_t>(threads.offset)[lane] : uint32_t(w.block.warps.size() * LANES);
    for_lanes(m, [&](int l) {
      if (w.at<uint32_t>(id.offset)[l] != which ||
          (counted && w.at<uint32_t>(threads.offset)[l] != need))
        w.fault(l, "divergent collective: the lanes name different barriers");
    });
    Mask votes = action == Action::Reduce ? predicate_value(w, p) : 0;
    arrive(w, m, which, need, action, reduction, votes, result);
  };
}

}  // namespace

DecodeFunction find_barrier(const std::string& opcode) {
  return opcode == "bar" || opcode == "barrier" ? bar : nullptr;
}

}  // namespace emu
