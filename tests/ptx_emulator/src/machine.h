// The state of a launch: blocks, warps and lanes, and what a decoded instruction is.
#pragma once

#include <array>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <span>
#include <unordered_map>
#include <vector>

#include "emulator.h"
#include "parser.h"
#include "race.h"

namespace emu {

struct Warp;
struct Block;
struct Launch;

// Performs an instruction for the lanes of `mask`.
using Step = std::function<void(Warp&, Mask mask)>;

struct Op {
  enum class Kind : uint8_t { Plain, Branch, Exit };
  Step step;
  Kind kind = Kind::Plain;
  bool guarded = false, guard_not = false;
  bool wgmma = false;                   // wgmma.mma_async: it keeps account of its registers itself
  bool touches = false;                 // an operand of wgmma, or what is moved into one
  bool copies = false;                  // a mov: it may move a wgmma accumulator that is in flight
  uint32_t guard = 0;                   // offset of the predicate in the register file
  uint32_t target = 0;                  // of a branch
  std::vector<uint32_t> reads, writes;  // registers
  const Instruction* source = nullptr;
};

// A kernel, decoded. The register file of a warp holds LANES values of each register, then the
// constants and the special registers; predicates are masks.
struct Program {
  std::string name;
  Function function;  // with its calls in line
  std::vector<Op> ops;
  std::vector<uint8_t> image;                             // of the register file: poison, constants
  std::vector<uint32_t> register_offset;                  // of Function::registers
  uint32_t register_bytes = 0;                            // where the constants begin
  std::map<std::pair<uint64_t, int>, uint32_t> literals;  // bits, width -> offset
  struct Special {
    std::string name;
    uint32_t offset;
    bool wide;
  };
  std::vector<Special> specials;
  std::vector<std::pair<uint32_t, std::string>> symbols;  // offsets that hold addresses
  uint32_t local_bytes = 0;                               // of a lane
  uint32_t static_shared = 0;  // of the module: where dynamic shared memory starts
  uint32_t own_shared = 0;     // of it, what the kernel names and a GPU gives it
  bool wgmma = false;
  std::vector<uint8_t> wgmma_register;  // by register: an operand of wgmma, or moved into one
};

// Generic addresses: shared and local memory have windows that no host pointer falls into.
constexpr uint64_t SHARED_WINDOW = uint64_t(0x7fff) << 48, LOCAL_WINDOW = uint64_t(0x7ffe) << 48;
constexpr uint64_t WINDOW_MASK = uint64_t(0xffff) << 48;
constexpr uint32_t SHARED_BASE = 1024;  // so that 0 is no shared address

struct Wait {
  enum class Kind : uint8_t { None, Barrier, Mbarrier, Warpgroup } kind = Kind::None;
  uint32_t id = 0, parity = 0;
};

struct AsyncCopy {  // cp.async of one lane
  uint32_t to;
  const uint8_t* from;
  uint32_t bytes, read;  // the rest is zero
  bool landed;
};

struct BulkRead {                                     // a bulk copy out of shared memory
  std::vector<std::pair<uint32_t, uint32_t>> ranges;  // address, bytes
  std::function<void()> perform;
  bool landed = false, read_done = false;
};

struct LaneCopies {
  std::vector<AsyncCopy> open;
  std::deque<std::vector<AsyncCopy>> groups;
  std::vector<std::shared_ptr<BulkRead>> bulk_open;
  std::deque<std::vector<std::shared_ptr<BulkRead>>> bulk_groups;
};

struct WgmmaState {                     // of a warp
  std::vector<uint32_t> result, input;  // by register: the group that still writes, reads it
  std::vector<uint8_t> dirty;           // by register: accessed since the last wgmma.fence
  bool fenced = false, in_flight = false;
  uint32_t committed = 0, complete = 0;  // groups so far
};

struct Warp {
  Warp(Block& block, const Program& program, int index)
      : block(block), program(program), index(index) {}

  Block& block;
  const Program& program;
  int index;
  uint8_t* file = nullptr;
  std::vector<uint8_t> storage;
  std::array<uint32_t, LANES> pc{};
  Mask exists = 0, live = 0, parked = 0, blocked = 0;
  Mask stay = 0;       // set by a step: lanes that do not advance
  Mask rested = 0;     // lanes that yielded: others come first
  Mask jumped = 0;     // set by a step: lanes whose pc it has set
  bool yield = false;  // set by a step: others should run now

  Mask carry = 0;  // the condition code of add.cc and its like
  std::array<Wait, LANES> wait{};
  std::vector<uint8_t> local;  // LANES * program.local_bytes
  std::array<LaneCopies, LANES> copies;
  WgmmaState wgmma;
  std::array<RowRef, LANES> row;
  std::array<RowRef, LANES> to_acquire;  // seen by relaxed reads; the next fence acquires it
  std::array<uint32_t, LANES> fence_clock{}, flush_clock{};  // of the last proxy, memory fence
  uint32_t clock = 1;
  int max_registers = 0;              // by setmaxnreg; 0: not set
  const Op* registers_set = nullptr;  // that setmaxnreg
  const Op* op = nullptr;             // being executed

  template <class T>
  T* at(uint32_t offset) {
    return reinterpret_cast<T*>(file + offset);
  }
  Mask& predicate(uint32_t offset) { return *at<Mask>(offset); }
  void set_predicate(uint32_t offset, Mask lanes, Mask values) {
    Mask& p = predicate(offset);
    p = (p & ~lanes) | (values & lanes);
  }
  int thread(int lane) const { return index * LANES + lane; }

  // Lanes `here` reached an operation that all of `need` perform together: true when all are here;
  // else they wait, and the operation is tried again when more have come.
  bool gather(Mask here, Mask need);
  bool gather_all(Mask here) { return gather(here, exists); }
  void block_lanes(Mask lanes, Wait why, bool advance);
  [[noreturn]] void fault(int lane, const std::string& text);
};

struct NamedBarrier {
  uint32_t need = 0, arrived = 0;
  SyncPoint sync;
  struct Waiter {
    Warp* warp;
    Mask lanes;
    int64_t result;  // offset of the register or predicate of bar.red; -1: none
  };
  std::vector<Waiter> waiters;
  std::vector<std::pair<Warp*, Mask>> here;
  uint32_t votes = 0, voters = 0;
  int reduction = 0;  // 0 none, 1 popc, 2 and, 3 or
};

struct Mbarrier {
  uint32_t count = 0, pending = 0, phase = 0;
  int64_t bytes = 0;  // expected and not yet come
  uint32_t component = 0, clock = 0;
  int init_warp = 0, init_lane = 0;
  uint32_t init_clock = 0;
  SyncPoint sync;
  RowRef released;  // by the phases completed so far
};

struct AsyncOp {  // an asynchronous copy that the block's scheduler performs at some later moment
  std::function<void()> perform;
};

struct Block {
  Block(Launch& launch, uint32_t serial, std::array<uint32_t, 3> index)
      : launch(launch), serial(serial), index(index) {}

  Launch& launch;
  uint32_t serial;  // from 1
  std::array<uint32_t, 3> index;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<uint8_t> shared;
  Shadow shadow;
  std::map<uint32_t, NamedBarrier> barriers;
  std::map<uint32_t, Mbarrier> mbarriers;
  std::unordered_map<uint32_t, std::pair<uint32_t, uint32_t>> async_components;
  std::vector<AsyncOp> pending;
  struct Warpgroup {
    const Op* op = nullptr;  // that its warps are gathering for
    std::vector<Warp*> here;
    // shared memory that each group of wgmma reads: address, bytes
    std::map<uint32_t, std::vector<std::pair<uint32_t, uint32_t>>> reads;
  };
  std::vector<Warpgroup> warpgroups;
  uint32_t components = 0;

  uint8_t* shared_at(Warp& w, int lane, uint32_t address, uint32_t bytes, uint32_t align);
  bool done() const;
  std::string dump() const;
};

struct Launch {
  Launch(const Program& program, const EmuConfig& config) : program(program), config(config) {}

  const Program& program;
  EmuConfig config;
  std::array<uint32_t, 3> grid, block;
  uint32_t dynamic_shared = 0;
  std::vector<uint8_t> params;  // aligned to 64 bytes by param_base
  uint8_t* param_base = nullptr;
  std::vector<std::pair<uint64_t, uint64_t>> buffers;  // begin, end; sorted
  bool any_buffer = true;                              // no list was given
  size_t last_buffer = 0;
  EmuStats* stats = nullptr;
  std::mt19937_64 random;
  Shadow global;
  std::unordered_map<uint64_t, RowRef> released;  // by address: what atomics hand over
  std::unordered_map<std::string, uint64_t> variable_address;
  uint64_t progress = 0;  // changes whenever something happens that others may wait for

  bool checks() const { return config.checks != 0; }
  bool chance(uint32_t one_in) { return config.seed && random() % one_in == 0; }
  void check_global(Warp& w, int lane, uint64_t address, uint32_t bytes);
  void run();
};

struct CompiledModule {
  Module module;
  std::vector<std::unique_ptr<Program>> programs;
  std::unordered_map<std::string, uint64_t> addresses;  // of .global and .const variables
  std::vector<std::unique_ptr<uint8_t[]>> storage;
  std::vector<std::pair<uint64_t, uint64_t>> variables;  // begin, end

  explicit CompiledModule(const char* text);
  const Program* find(const std::string& kernel) const;
};

// "attn.cu:47 (inlined at attn.cu:101), PTX line 833 'st.shared.b32 ...'"
std::string place(const Op&);
// "shared 0x440", "global buffer 2 + 0x40"
std::string describe(const Warp&, bool shared, uint64_t address);

std::unique_ptr<Program> decode(const Module& module, const Function& function);

}  // namespace emu
