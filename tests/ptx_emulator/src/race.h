// Happens-before race detection: vector clocks for threads, shadow cells for memory.
//
// A warp has one clock; its lanes are components, one more stands for what the warp does as one
// (ldmatrix), and one counts its complete wgmma groups. What a lane knows of others is a Row,
// shared copy-on-write by the lanes that know the same. A lane always knows its own past and its
// warp's.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "values.h"

namespace emu {

struct Row;
using RowRef = std::shared_ptr<const Row>;

struct Row {
  std::vector<uint32_t> known;    // component -> clock up to which its accesses are ordered before
  std::vector<uint32_t> fenced;   // the same, of accesses that a proxy fence orders as well
  std::vector<uint32_t> flushed;  // the same, of accesses that a memory fence orders as well
  std::vector<std::pair<uint32_t, RowRef>> others;  // the same, of other blocks
};

constexpr int COMPONENTS_PER_WARP = LANES + 2;
inline uint32_t component(int warp, int lane) { return warp * COMPONENTS_PER_WARP + lane; }

void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from);
void join(Row& into, const Row& from);
void join_other(Row& into, uint32_t block, const RowRef& row);

struct Warp;

// Something that threads release to and acquire from: a barrier, an mbarrier's phase.
class SyncPoint {
 public:
  void release(Warp& w, Mask lanes);  // what these lanes know and did so far
  void add(uint32_t component, uint32_t clock);
  RowRef take();  // everything released since the last take
 private:
  std::shared_ptr<Row> row_;
  RowRef last_;
};

void acquire(Warp& w, Mask lanes, const RowRef& row);
void proxy_fence(Warp& w, Mask lanes);

// Between blocks. What a release at a global or shared location hands over, all this lane knows or
// only what a fence flushed; nullptr: nothing.
RowRef hand_over(Warp& w, int lane, bool flushed_only);
void take_over(Warp& w, int lane, const RowRef& handed);
void memory_fence(Warp& w, Mask lanes);

struct Event {
  enum class Kind : uint8_t { None, Lanes, Collective, Warpgroup, Async };
  uint32_t block = 0, clock = 0;
  Mask lanes = 0;
  uint32_t op = 0;    // index of the instruction
  uint16_t warp = 0;  // of Async: the component
  Kind kind = Kind::None;
  bool atomic = false;
};

struct Cell {  // of 4 bytes, or of one byte once the word was accessed in part
  Event write, read;
  int32_t more_reads = -1, split = -1;
  uint16_t reading = 0;  // asynchronous operations that still read it
  uint8_t writing = 0;   // asynchronous operations that still write it
  bool written = false, generic = true, barrier = false;
};

class Shadow {
 public:
  // One flat range of shared memory from `base`; without it: global memory, pages on demand.
  void use_shared(uint64_t base, uint64_t bytes);

  struct Access {
    Warp& warp;
    int lane;
    bool collective = false;  // by the warp as one
    bool atomic = false;
    bool async = false;           // by the async proxy
    const Row* common = nullptr;  // what all threads of a warpgroup know, if they act as one
  };
  void read(const Access&, uint64_t address, uint32_t bytes);
  // now, incoming: if both are given, writing what is there already is no race
  void write(const Access&, uint64_t address, uint32_t bytes, const uint8_t* now,
             const uint8_t* incoming);

  void begin_write(const Access&, uint64_t address, uint32_t bytes);
  void end_write(uint64_t address, uint32_t bytes, const Event& by, bool generic);
  void begin_read(const Access&, uint64_t address, uint32_t bytes);
  void end_read(const Access& by, uint64_t address, uint32_t bytes, const Event* event = nullptr);
  void mark_barrier(uint64_t address, bool on);  // 8 bytes that hold an mbarrier
  bool any_in_flight() const { return in_flight_ != 0; }

 private:
  using Page = std::vector<Cell>;
  Cell& word(uint64_t address);
  template <class F>
  void visit(uint64_t address, uint32_t bytes, F&& f);  // f(cell, address, bytes)
  void check_read(const Access&, Cell&, uint64_t address);
  void note_read(Cell&, const Event&, const Access&);
  void check_write(const Access&, Cell&, uint64_t address, bool same);
  void drop_reads(Cell&);
  std::vector<Event>& list_of(Cell&);
  [[noreturn]] void fault(const Access&, uint64_t address, const char* what, const Event* other);

  bool shared_ = false;
  uint64_t base_ = 0;
  std::vector<Cell> flat_;
  std::unordered_map<uint64_t, Page> pages_;
  uint64_t last_page_ = ~uint64_t(0);
  Page* last_ = nullptr;
  std::vector<std::vector<Cell>> splits_;
  std::vector<std::vector<Event>> lists_;
  std::vector<int32_t> free_lists_;
  int64_t in_flight_ = 0;
};

}  // namespace emu
