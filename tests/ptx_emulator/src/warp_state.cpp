// What instructions ask of their warp, block and launch; how faults are worded.
#include <algorithm>

#include "machine.h"

namespace emu {

void Warp::fault(int lane, const std::string& text) {
  std::string where = format("block (%u,%u,%u) thread %d (warp %d lane %d)", block.index[0],
                             block.index[1], block.index[2], thread(lane), index, lane);
  if (op && op->source) where += " at " + place(*op);
  throw Fault(where + ": " + text);
}

bool Warp::gather(Mask here, Mask need) {
  if ((here & need) == need) return true;
  Mask gone = need & ~live;
  if (gone)
    fault(std::countr_zero(here),
          format("divergent collective: it waits for lane %d, which has exited",
                 std::countr_zero(gone)));
  parked |= here;
  stay |= here;
  return false;
}

void Warp::block_lanes(Mask lanes, Wait why, bool advance) {
  blocked |= lanes;
  if (!advance) stay |= lanes;
  for_lanes(lanes, [&](int l) { wait[l] = why; });
}

uint8_t* Block::shared_at(Warp& w, int lane, uint32_t address, uint32_t bytes, uint32_t align) {
  uint64_t end = SHARED_BASE + shared.size();
  if (address < SHARED_BASE || uint64_t(address) + bytes > end)
    w.fault(lane, format("out of bounds: shared 0x%x and %u bytes, the block has 0x%x to 0x%llx",
                         address, bytes, SHARED_BASE, (unsigned long long)end));
  if (address % align)
    w.fault(lane, format("misaligned: shared 0x%x is no multiple of %u", address, align));
  return &shared[address - SHARED_BASE];
}

bool Block::done() const {
  return std::all_of(warps.begin(), warps.end(), [](const auto& w) { return w->live == 0; });
}

std::string Block::dump() const {
  std::string text = format("\n block (%u,%u,%u):", index[0], index[1], index[2]);
  for (const auto& w : warps) {
    Mask left = w->live;
    if (!left) text += format("\n  warp %d: exited", w->index);
    while (left) {  // lanes that wait for the same at the same place, together
      int first = std::countr_zero(left);
      Mask same = 0;
      const Wait& wait = w->wait[first];
      for_lanes(left, [&](int l) {
        const Wait& other = w->wait[l];
        if (w->pc[l] == w->pc[first] && other.kind == wait.kind && other.id == wait.id)
          same |= Mask(1) << l;
      });
      left &= ~same;
      const char* why = wait.kind == Wait::Kind::Barrier     ? "barrier"
                        : wait.kind == Wait::Kind::Mbarrier  ? "mbarrier"
                        : wait.kind == Wait::Kind::Warpgroup ? "the rest of warpgroup"
                        : w->parked >> first & 1             ? "the other lanes"
                                                             : "nothing: they can run";
      text += format("\n  warp %d, %d lanes (from %d) wait for %s", w->index, std::popcount(same),
                     first, why);
      if (wait.kind == Wait::Kind::Mbarrier)
        text += format(" 0x%x phase parity %u", wait.id, wait.parity);
      else if (wait.kind != Wait::Kind::None)
        text += format(" %u", wait.id);
      // a barrier's waiters stand behind it already
      bool behind = wait.kind == Wait::Kind::Barrier || wait.kind == Wait::Kind::Warpgroup;
      uint32_t pc = w->pc[first] - (behind && w->pc[first] ? 1 : 0);
      text += " at " + place(w->program.ops[pc]);
    }
  }
  for (const auto& [id, b] : barriers)
    if (b.arrived)
      text += format("\n  barrier %u: %u of %u threads arrived", id, b.arrived, b.need);
  for (const auto& [address, b] : mbarriers)
    text += format("\n  mbarrier 0x%x: phase %u, %u of %u arrivals pending, %lld bytes expected",
                   address, b.phase, b.pending, b.count, (long long)b.bytes);
  return text;
}

void Launch::check_global(Warp& w, int lane, uint64_t address, uint32_t bytes) {
  if (any_buffer || !checks()) {
    if (address < 4096) w.fault(lane, "out of bounds: access through a null pointer");
    return;
  }
  auto inside = [&](size_t i) {
    return i < buffers.size() && address >= buffers[i].first &&
           address + bytes <= buffers[i].second;
  };
  if (inside(last_buffer)) return;
  auto after = std::upper_bound(buffers.begin(), buffers.end(), std::pair(address, ~uint64_t(0)));
  if (after != buffers.begin()) {
    last_buffer = size_t(after - buffers.begin()) - 1;
    if (inside(last_buffer)) return;
  }
  std::string near = "no buffer is near";
  if (address < 4096) {
    near = "a null pointer";
  } else if (after != buffers.begin()) {
    const auto& b = *(after - 1);
    near = format("%llu bytes past the end of the buffer at 0x%llx, which has %llu bytes",
                  (unsigned long long)(address - std::min(address, b.second)),
                  (unsigned long long)b.first, (unsigned long long)(b.second - b.first));
  }
  w.fault(lane, format("out of bounds: global 0x%llx and %u bytes: %s", (unsigned long long)address,
                       bytes, near.c_str()));
}

std::string describe(const Warp& w, bool shared, uint64_t address) {
  if (shared) return format("shared 0x%llx", (unsigned long long)address);
  const Launch& launch = w.block.launch;
  for (const auto& [begin, end] : launch.buffers)
    if (address >= begin && address < end)
      return format("global 0x%llx (byte %llu of the buffer at 0x%llx)",
                    (unsigned long long)address, (unsigned long long)(address - begin),
                    (unsigned long long)begin);
  return format("global 0x%llx", (unsigned long long)address);
}

}  // namespace emu
