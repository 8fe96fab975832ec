#include "race.h"

#include <algorithm>

#include "machine.h"

namespace emu {

// ---- vector clocks ----

void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
  if (into.size() < from.size()) into.resize(from.size());
  uint32_t* a = into.data();
  const uint32_t* b = from.data();
  for (size_t i = 0; i < from.size(); i++) a[i] = std::max(a[i], b[i]);
}

void join_other(Row& into, uint32_t block, const RowRef& row) {
  for (auto& [other, known] : into.others) {
    if (other != block) continue;
    if (known == row) return;
    auto both = std::make_shared<Row>(*known);
    join(*both, *row);
    known = both;
    return;
  }
  into.others.emplace_back(block, row);
}

void join(Row& into, const Row& from) {
  join(into.known, from.known);
  join(into.fenced, from.fenced);
  join(into.flushed, from.flushed);
  for (const auto& [block, row] : from.others) join_other(into, block, row);
}

namespace {

void raise(std::vector<uint32_t>& clocks, uint32_t component, uint32_t clock) {
  if (clocks.size() <= component) clocks.resize(component + 1);
  clocks[component] = std::max(clocks[component], clock);
}

uint32_t clock_of(const std::vector<uint32_t>& clocks, uint32_t component) {
  return component < clocks.size() ? clocks[component] : 0;
}

bool covers(const std::vector<uint32_t>& a, const std::vector<uint32_t>& b) {
  if (a.size() < b.size()) return false;
  bool all = true;
  for (size_t i = 0; i < b.size(); i++) all &= a[i] >= b[i];
  return all;
}
bool covers(const Row& a, const Row& b) {
  if (!covers(a.known, b.known) || !covers(a.fenced, b.fenced) || !covers(a.flushed, b.flushed))
    return false;
  if (b.others.empty() || a.others == b.others) return true;
  return false;
}

}  // namespace

void SyncPoint::release(Warp& w, Mask lanes) {
  if (!row_) row_ = std::make_shared<Row>();
  for_lanes(lanes, [&](int lane) {
    if (w.row[lane] && w.row[lane] != last_) join(*row_, *(last_ = w.row[lane]));
    raise(row_->known, component(w.index, lane), w.clock);
    if (w.fence_clock[lane]) raise(row_->fenced, component(w.index, lane), w.fence_clock[lane]);
    if (w.flush_clock[lane]) raise(row_->flushed, component(w.index, lane), w.flush_clock[lane]);
  });
  raise(row_->known, component(w.index, LANES), w.clock);
  if (w.wgmma.complete) raise(row_->known, component(w.index, LANES + 1), w.wgmma.complete);
  w.clock++;
}

void SyncPoint::add(uint32_t component, uint32_t clock) {
  if (!row_) row_ = std::make_shared<Row>();
  raise(row_->known, component, clock);
}

RowRef SyncPoint::take() {
  last_.reset();
  return std::move(row_);
}

void acquire(Warp& w, Mask lanes, const RowRef& row) {
  if (!row) return;
  RowRef before, after;
  for_lanes(lanes, [&](int lane) {
    RowRef& mine = w.row[lane];
    if (mine == row) return;
    if (!after || mine != before) {
      before = mine;
      if (!mine || covers(*row, *mine)) {
        after = row;
      } else if (covers(*mine, *row)) {
        after = mine;
      } else {
        auto both = std::make_shared<Row>(*mine);
        join(*both, *row);
        after = both;
      }
    }
    mine = after;
  });
}

void proxy_fence(Warp& w, Mask lanes) {
  RowRef before, after;
  for_lanes(lanes, [&](int lane) {
    w.fence_clock[lane] = w.clock;
    RowRef& mine = w.row[lane];
    if (!mine || mine->known == mine->fenced) return;
    if (mine != before) {
      before = mine;
      auto fenced = std::make_shared<Row>(*mine);
      fenced->fenced = fenced->known;
      after = fenced;
    }
    mine = after;
  });
  w.clock++;
}

RowRef hand_over(Warp& w, int lane, bool flushed_only) {
  SyncPoint point;
  point.release(w, Mask(1) << lane);
  auto all = std::make_shared<Row>(*point.take());
  if (flushed_only) {
    if (all->flushed.empty()) return nullptr;
    all->known = all->flushed;
    all->fenced.clear();
  }
  auto handed = std::make_shared<Row>();
  handed->others = std::move(all->others);
  join_other(*handed, w.block.serial, all);
  return handed;
}

void take_over(Warp& w, int lane, const RowRef& handed) {
  if (!handed) return;
  auto mine = w.row[lane] ? std::make_shared<Row>(*w.row[lane]) : std::make_shared<Row>();
  for (const auto& [block, row] : handed->others) {
    if (block == w.block.serial)
      join(*mine, *row);
    else
      join_other(*mine, block, row);
  }
  w.row[lane] = mine;
}

void memory_fence(Warp& w, Mask lanes) {
  RowRef before, after;
  for_lanes(lanes, [&](int lane) {
    take_over(w, lane, w.to_acquire[lane]);
    w.to_acquire[lane].reset();
    w.flush_clock[lane] = w.clock;
    RowRef& mine = w.row[lane];
    if (!mine || mine->known == mine->flushed) return;
    if (mine != before) {
      before = mine;
      auto flushed = std::make_shared<Row>(*mine);
      flushed->flushed = flushed->known;
      after = flushed;
    }
    mine = after;
  });
  w.clock++;
}

// ---- shadow memory ----

namespace {

// Whether `e` happens before what this lane does now; `fenced`: with a proxy fence on the way.
bool ordered(const Shadow::Access& a, const Event& e, bool fenced = false) {
  if (e.kind == Event::Kind::None) return true;
  const Row* row = a.warp.row[a.lane].get();
  Mask lanes = e.lanes;
  if (a.common && e.block == a.warp.block.serial) {
    row = a.common;
  } else if (e.block != a.warp.block.serial) {
    const Row* known = nullptr;
    if (row)
      for (const auto& [block, other] : row->others)
        if (block == e.block) known = other.get();
    row = known;
  } else if (e.warp == a.warp.index && e.kind <= Event::Kind::Collective) {
    if (e.kind == Event::Kind::Collective) return true;
    Mask self = Mask(1) << a.lane;
    if ((lanes & self) && fenced && a.warp.fence_clock[a.lane] < e.clock) return false;
    lanes &= ~self;
    if (!lanes) return true;
  }
  if (!row) return false;
  const std::vector<uint32_t>& clocks = fenced ? row->fenced : row->known;
  if (e.kind == Event::Kind::Async) return clock_of(clocks, e.warp) >= e.clock;
  if (e.kind == Event::Kind::Collective)
    return clock_of(clocks, component(e.warp, LANES)) >= e.clock;
  if (e.kind == Event::Kind::Warpgroup) {
    for (int i = e.warp; i < e.warp + 4; i++) {
      bool own = i == a.warp.index && !a.common && a.warp.wgmma.complete >= e.clock;
      if (!own && clock_of(clocks, component(i, LANES + 1)) < e.clock) return false;
    }
    return true;
  }
  for (; lanes; lanes &= lanes - 1)
    if (clock_of(clocks, component(e.warp, std::countr_zero(lanes))) < e.clock) return false;
  return true;
}

Event event_of(const Shadow::Access& a) {
  Event e;
  e.block = a.warp.block.serial;
  e.clock = a.warp.clock;
  e.lanes = Mask(1) << a.lane;
  e.warp = uint16_t(a.warp.index);
  e.kind = a.collective ? Event::Kind::Collective : Event::Kind::Lanes;
  e.atomic = a.atomic;
  e.op = a.warp.op ? uint32_t(a.warp.op - a.warp.program.ops.data()) : 0;
  return e;
}

bool merge(Event& into, const Event& e) {
  if (into.block != e.block || into.warp != e.warp || into.clock != e.clock ||
      into.kind != e.kind || into.atomic != e.atomic)
    return false;
  into.lanes |= e.lanes;
  return true;
}

constexpr uint64_t PAGE_BYTES = 4096;

}  // namespace

void Shadow::use_shared(uint64_t base, uint64_t bytes) {
  shared_ = true;
  base_ = base;
  flat_.assign((bytes + 3) / 4, Cell{});
}

Cell& Shadow::word(uint64_t address) {
  if (shared_) return flat_[(address - base_) / 4];
  uint64_t page = address / PAGE_BYTES;
  if (page != last_page_) {
    last_ = &pages_[page];
    last_page_ = page;
    if (last_->empty()) last_->resize(PAGE_BYTES / 4);
  }
  return (*last_)[address % PAGE_BYTES / 4];
}

template <class F>
void Shadow::visit(uint64_t address, uint32_t bytes, F&& f) {
  uint64_t end = address + bytes;
  while (address < end) {
    Cell& cell = word(address);
    uint64_t word_end = (address & ~uint64_t(3)) + 4;
    if (cell.split < 0) {
      if (address + 4 == word_end && word_end <= end) {
        f(cell, address, 4u);
        address = word_end;
        continue;
      }
      std::vector<Cell> bytes_of_word(4, cell);
      for (Cell& one : bytes_of_word)
        if (cell.more_reads >= 0) {
          one.more_reads = -1;
          list_of(one) = std::vector<Event>(lists_[cell.more_reads]);
        }
      cell.split = int32_t(splits_.size());
      splits_.push_back(std::move(bytes_of_word));
    }
    for (; address < std::min(word_end, end); address++)
      f(splits_[cell.split][address & 3], address, 1u);
  }
}

std::vector<Event>& Shadow::list_of(Cell& cell) {
  if (cell.more_reads < 0) {
    if (free_lists_.empty()) {
      cell.more_reads = int32_t(lists_.size());
      lists_.emplace_back();
    } else {
      cell.more_reads = free_lists_.back();
      free_lists_.pop_back();
    }
  }
  return lists_[cell.more_reads];
}

void Shadow::drop_reads(Cell& cell) {
  cell.read.kind = Event::Kind::None;
  if (cell.more_reads < 0) return;
  lists_[cell.more_reads].clear();
  free_lists_.push_back(cell.more_reads);
  cell.more_reads = -1;
}

void Shadow::fault(const Access& a, uint64_t address, const char* what, const Event* other) {
  std::string text = format(what, describe(a.warp, shared_, address).c_str());
  if (other) {
    text += " by ";
    if (other->kind == Event::Kind::Async)
      text += "an asynchronous copy";
    else if (other->kind == Event::Kind::Collective)
      text += format("warp %d", other->warp);
    else if (other->kind == Event::Kind::Warpgroup)
      text += format("wgmma of warps %d to %d", other->warp, other->warp + 3);
    else
      text += format("thread %d", other->warp * LANES + std::countr_zero(other->lanes));
    if (other->block != a.warp.block.serial) text += format(" of block %u", other->block - 1);
    if (other->kind != Event::Kind::Async) text += " at " + place(a.warp.program.ops[other->op]);
  }
  a.warp.fault(a.lane, text);
}

void Shadow::check_read(const Access& a, Cell& c, uint64_t address) {
  if (c.writing) fault(a, address, "read of %s while an asynchronous copy into it is in flight", 0);
  if (c.barrier) fault(a, address, "read of %s, which holds an mbarrier", nullptr);
  if (shared_ && !c.written) fault(a, address, "read of %s, which was never written", nullptr);
  if (a.atomic && c.write.atomic) return;
  if (!ordered(a, c.write))
    fault(a, address, "race: read of %s not ordered after the write", &c.write);
  if (a.async && c.generic && !ordered(a, c.write, true))
    fault(a, address,
          "missing fence.proxy.async: the asynchronous proxy reads %s after the generic write",
          &c.write);
}

void Shadow::note_read(Cell& c, const Event& e, const Access& a) {
  if (c.read.kind == Event::Kind::None || merge(c.read, e)) {
    if (c.read.kind == Event::Kind::None) c.read = e;
    return;
  }
  if (c.read.atomic == e.atomic && ordered(a, c.read)) {
    c.read = e;
    return;
  }
  std::vector<Event>& list = list_of(c);
  size_t kept = 0;
  bool merged = false;
  for (Event& old : list) {
    if (merge(old, e)) merged = true;
    if (merged || old.atomic != e.atomic || !ordered(a, old)) list[kept++] = old;
  }
  list.resize(kept);
  if (merged) return;
  // of global memory only the latest readers are kept: any block may read it
  if (!shared_ && list.size() >= 4) list.erase(list.begin());
  list.push_back(e);
}

void Shadow::check_write(const Access& a, Cell& c, uint64_t address, bool same) {
  if (c.writing)
    fault(a, address, "write to %s while an asynchronous copy into it is in flight", nullptr);
  if (c.reading)
    fault(a, address, "write to %s while an asynchronous operation in flight still reads it",
          nullptr);
  if (c.barrier) fault(a, address, "write to %s, which holds an mbarrier", nullptr);
  if (!same && !(a.atomic && c.write.atomic) && !ordered(a, c.write))
    fault(a, address, "race: write to %s not ordered after the write", &c.write);
  if (a.async && c.generic && c.written && !ordered(a, c.write, true))
    fault(a, address,
          "missing fence.proxy.async: the asynchronous proxy writes %s after the generic write",
          &c.write);
  auto check = [&](const Event& e) {
    if (!(a.atomic && e.atomic) && !ordered(a, e))
      fault(a, address, "race: write to %s not ordered after the read", &e);
  };
  check(c.read);
  if (c.more_reads >= 0)
    for (const Event& e : lists_[c.more_reads]) check(e);
}

void Shadow::read(const Access& a, uint64_t address, uint32_t bytes) {
  Event e = event_of(a);
  visit(address, bytes, [&](Cell& c, uint64_t at, uint32_t) {
    check_read(a, c, at);
    note_read(c, e, a);
  });
}

void Shadow::write(const Access& a, uint64_t address, uint32_t bytes, const uint8_t* now,
                   const uint8_t* incoming) {
  Event e = event_of(a);
  visit(address, bytes, [&](Cell& c, uint64_t at, uint32_t size) {
    bool same = incoming && !std::memcmp(now + (at - address), incoming + (at - address), size);
    check_write(a, c, at, same);
    drop_reads(c);
    c.write = e;
    c.written = true;
    c.generic = !a.async;
  });
}

void Shadow::begin_write(const Access& a, uint64_t address, uint32_t bytes) {
  Event e = event_of(a);
  visit(address, bytes, [&](Cell& c, uint64_t at, uint32_t) {
    check_write(a, c, at, false);
    drop_reads(c);
    c.write = e;
    c.writing++;
  });
  in_flight_++;
}

void Shadow::end_write(uint64_t address, uint32_t bytes, const Event& by, bool generic) {
  visit(address, bytes, [&](Cell& c, uint64_t, uint32_t) {
    c.writing--;
    c.write = by;
    c.written = true;
    c.generic = generic;
  });
  in_flight_--;
}

void Shadow::begin_read(const Access& a, uint64_t address, uint32_t bytes) {
  visit(address, bytes, [&](Cell& c, uint64_t at, uint32_t) {
    check_read(a, c, at);
    c.reading++;
  });
  in_flight_++;
}

void Shadow::end_read(const Access& by, uint64_t address, uint32_t bytes, const Event* event) {
  Event e = event ? *event : event_of(by);
  visit(address, bytes, [&](Cell& c, uint64_t, uint32_t) {
    c.reading--;
    note_read(c, e, by);
  });
  in_flight_--;
}

void Shadow::mark_barrier(uint64_t address, bool on) {
  visit(address, 8, [&](Cell& c, uint64_t, uint32_t) {
    c.barrier = on;
    c.written = false;
    c.write.kind = Event::Kind::None;
    drop_reads(c);
  });
}

}  // namespace emu
