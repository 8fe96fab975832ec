// Runs a launch: which block, warp and lanes go on, and when asynchronous copies land.
//
// The lanes of a warp have their own program counters. Lanes at the same place run together; of
// several places the lowest comes first, which brings lanes together again after a branch.
#include <algorithm>

#include "machine.h"

namespace emu {

namespace {

constexpr uint32_t NEVER = 0xffffffff;
constexpr uint32_t PATIENCE = 200000;  // rounds without progress until a launch counts as stuck

class Scheduler {
 public:
  explicit Scheduler(Launch& launch) : launch_(launch) {}

  void run() {
    const auto& g = launch_.grid;
    uint64_t total = uint64_t(g[0]) * g[1] * g[2];
    size_t resident = size_t(std::max(launch_.config.resident_blocks, 1));
    while (next_ < total || !blocks_.empty()) {
      while (next_ < total && blocks_.size() < resident) start_block();
      round();
    }
  }

 private:
  // ---- blocks ----

  void start_block() {
    uint64_t i = next_++;
    const auto& g = launch_.grid;
    std::array<uint32_t, 3> index = {uint32_t(i % g[0]), uint32_t(i / g[0] % g[1]),
                                     uint32_t(i / g[0] / g[1])};
    auto block = std::make_unique<Block>(launch_, uint32_t(i + 1), index);
    const Program& program = launch_.program;
    uint32_t bytes = program.static_shared + launch_.dynamic_shared;
    block->shared.assign(bytes, 0xff);
    if (launch_.checks()) block->shadow.use_shared(SHARED_BASE, bytes);
    uint32_t threads = launch_.block[0] * launch_.block[1] * launch_.block[2];
    uint32_t warps = (threads + LANES - 1) / LANES;
    block->components = warps * COMPONENTS_PER_WARP;
    for (uint32_t w = 0; w < warps; w++) {
      auto warp = std::make_unique<Warp>(*block, program, int(w));
      uint32_t lanes = std::min<uint32_t>(threads - w * LANES, LANES);
      warp->exists = warp->live = lanes == LANES ? ALL : (Mask(1) << lanes) - 1;
      prepare(*warp);
      block->warps.push_back(std::move(warp));
    }
    launch_.stats->blocks++;
    blocks_.push_back(std::move(block));
  }

  void prepare(Warp& w) {
    const Program& p = w.program;
    if (files_.empty()) {
      w.storage.resize(p.image.size() + 64);
    } else {
      w.storage = std::move(files_.back());
      files_.pop_back();
    }
    uint64_t start = reinterpret_cast<uint64_t>(w.storage.data());
    w.file = w.storage.data() + (64 - start % 64) % 64;
    std::memcpy(w.file, p.image.data(), p.image.size());
    for (const auto& [offset, name] : p.symbols)
      for (int l = 0; l < LANES; l++) w.at<uint64_t>(offset)[l] += address_of(name);
    for (const Program::Special& s : p.specials)
      for (int l = 0; l < LANES; l++) {
        uint32_t value = special(w, s.name, l);
        if (s.wide)
          w.at<uint64_t>(s.offset)[l] = value;
        else
          w.at<uint32_t>(s.offset)[l] = value;
      }
    w.local.assign(size_t(p.local_bytes) * LANES, 0xff);
    if (p.wgmma) {
      w.wgmma.result.assign(p.function.registers.size(), 0);
      w.wgmma.input.assign(p.function.registers.size(), 0);
      w.wgmma.dirty.assign(p.function.registers.size(), 0);
    }
  }

  uint64_t address_of(const std::string& name) const {
    auto found = launch_.variable_address.find(name);
    if (found == launch_.variable_address.end()) throw Fault("nothing is known of " + name);
    return found->second;
  }

  uint32_t special(const Warp& w, const std::string& name, int lane) const {
    const auto &b = launch_.block, &g = launch_.grid;
    uint32_t t = uint32_t(w.thread(lane)), warps = (b[0] * b[1] * b[2] + LANES - 1) / LANES;
    int axis = name.back() - 'x';
    auto starts = [&](const char* prefix) { return name.starts_with(prefix); };
    if (starts("%tid."))
      return axis == 0 ? t % b[0] : axis == 1 ? t / b[0] % b[1] : t / (b[0] * b[1]);
    if (starts("%ntid.")) return b[axis];
    if (starts("%ctaid.") || starts("%clusterid.")) return w.block.index[axis];
    if (starts("%nctaid.") || starts("%nclusterid.")) return g[axis];
    if (starts("%cluster_nctaid.") || name == "%cluster_nctarank") return 1;
    if (starts("%cluster_cta")) return 0;
    uint32_t bit = uint32_t(1) << lane;
    if (name == "%laneid") return uint32_t(lane);
    if (name == "%warpid") return uint32_t(w.index);
    if (name == "%nwarpid") return warps;
    if (name == "%smid") return (w.block.serial - 1) % multiprocessors();
    if (name == "%nsmid") return multiprocessors();
    if (name == "%lanemask_eq") return bit;
    if (name == "%lanemask_lt") return bit - 1;
    if (name == "%lanemask_le") return (bit - 1) | bit;
    if (name == "%lanemask_gt") return ~((bit - 1) | bit);
    if (name == "%lanemask_ge") return ~(bit - 1);
    if (name == "%dynamic_smem_size") return launch_.dynamic_shared;
    if (name == "%total_smem_size") return launch_.dynamic_shared + w.program.static_shared;
    return 1;  // %gridid
  }

  uint32_t multiprocessors() const {
    return launch_.config.multiprocessors > 0 ? uint32_t(launch_.config.multiprocessors) : 132;
  }

  void finish_block(Block& block) {
    auto fail = [&](const std::string& text) {
      throw Fault(format("block (%u,%u,%u): ", block.index[0], block.index[1], block.index[2]) +
                  text);
    };
    while (!block.pending.empty()) perform(block, 0);
    uint32_t registers = 0, threads = uint32_t(block.warps.size()) * LANES;
    Warp* last_change = nullptr;  // of the greatest count

    for (auto& w : block.warps) {
      if (w->registers_set && (!last_change || w->max_registers >= last_change->max_registers))
        last_change = w.get();

      registers += LANES * (w->max_registers ? w->max_registers : 65536 / threads / 8 * 8);
      for (LaneCopies& c : w->copies) {
        auto end = [&](auto& ops) {
          for (auto& op : ops) {
            if (!op->read_done && launch_.checks())
              fail(
                  format("warp %d exited while a bulk copy still reads shared 0x%x: "
                         "cp.async.bulk.wait_group.read is missing",
                         w->index, op->ranges[0].first));
            if (!op->landed) op->perform();
          }
        };
        for (auto& group : c.bulk_groups) end(group);
        end(c.bulk_open);
      }
      files_.push_back(std::move(w->storage));
    }
    if (last_change && registers > 65536) {
      int lane = std::countr_zero(last_change->exists);
      last_change->op = last_change->registers_set;
      last_change->fault(
          lane, format("setmaxnreg: %u registers for the block, 65536 in the file", registers));
    }

    if (launch_.checks() && block.shadow.any_in_flight())
      fail("it ended with an asynchronous operation still in flight: a wait is missing");
  }

  // ---- rounds ----

  void round() {
    uint64_t before = launch_.progress;
    bool ran = false;
    size_t n = blocks_.size(), first = launch_.config.seed ? launch_.random() % n : 0;
    for (size_t i = 0; i < n; i++) ran |= visit(*blocks_[(first + i) % n]);
    for (size_t i = 0; i < blocks_.size();) {
      if (!blocks_[i]->done()) {
        i++;
        continue;
      }
      finish_block(*blocks_[i]);
      blocks_.erase(blocks_.begin() + i);
      launch_.progress++;
    }
    if (blocks_.empty()) return;
    idle_ = launch_.progress == before ? idle_ + 1 : 0;
    if (idle_ == 0 || (ran && idle_ < PATIENCE && idle_ % 64 != 63)) return;
    // nothing moves but what waits: the latest moment for a copy to land
    for (auto& block : blocks_)
      if (!block->pending.empty()) {
        perform(*block, launch_.config.seed ? launch_.random() % block->pending.size() : 0);
        return;
      }
    if (ran && idle_ < PATIENCE) return;
    std::string text = ran ? "no progress: the threads only spin" : "deadlock";
    for (auto& block : blocks_) text += block->dump();
    throw Fault(text);
  }

  bool visit(Block& block) {
    bool ran = false;
    size_t n = block.warps.size(), first = launch_.config.seed ? launch_.random() % n : 0;
    for (size_t i = 0; i < n; i++) {
      int budget = launch_.config.seed ? 1 + int(launch_.random() % 400) : 1000;
      ran |= run_warp(*block.warps[(first + i) % n], budget);
      if (launch_.config.async == EMU_ASYNC_RANDOM && !block.pending.empty() &&
          launch_.random() % 8 == 0)
        perform(block, launch_.random() % block.pending.size());
    }
    return ran;
  }

  void perform(Block& block, size_t i) {
    std::function<void()> f = std::move(block.pending[i].perform);
    block.pending.erase(block.pending.begin() + i);
    f();
    launch_.progress++;
  }

  // ---- a warp ----

  // Whom to run: lanes at one place. `limit`: where they must look for others again.
  Mask choose(Warp& w, uint32_t& pc, uint32_t& limit, int& budget) {
    Mask ready = w.live & ~w.blocked, candidates = ready & ~w.parked;
    if (!candidates) return 0;
    if (Mask rest = candidates & ~w.rested; rest) candidates = rest;
    w.rested = 0;
    pc = NEVER;
    for_lanes(candidates, [&](int l) { pc = std::min(pc, w.pc[l]); });
    Mask group = 0;
    limit = NEVER;
    for_lanes(ready, [&](int l) {
      if (w.pc[l] == pc)
        group |= Mask(1) << l;
      else if (w.pc[l] > pc)
        limit = std::min(limit, w.pc[l]);
    });
    if (launch_.chance(64) && (group & (group - 1))) {  // some lanes run ahead of the others
      Mask some = group & Mask(launch_.random());
      if (some && some != group && !w.parked) {
        group = some;
        limit = NEVER;
        budget = std::min<int>(budget, 1 + int(launch_.random() % 40));
      }
    }
    w.parked &= ~group;
    return group;
  }

  bool run_warp(Warp& w, int budget) {
    bool ran = false;
    const std::vector<Op>& ops = w.program.ops;
    while (budget > 0) {
      uint32_t pc, limit;
      Mask group = choose(w, pc, limit, budget);
      if (!group) {
        if (w.parked && !(w.live & w.blocked)) divergence(w);
        return ran;
      }
      ran = true;
      bool together = true;
      while (together) {
        const Op& op = ops[pc];
        budget--;
        launch_.stats->instructions++;
        Mask m = group;
        if (op.guarded) m &= op.guard_not ? ~w.predicate(op.guard) : w.predicate(op.guard);
        if (op.kind == Op::Kind::Branch) {
          if (m == group) {
            // a jump back may lead to lanes that wait below
            if (op.target <= pc && group != w.live) limit = 0;
            pc = op.target;
          } else if (m == 0) {
            pc++;
          } else {
            for_lanes(group, [&](int l) { w.pc[l] = m >> l & 1 ? op.target : pc + 1; });
            break;
          }
        } else if (op.kind == Op::Kind::Exit) {
          w.live &= ~m;
          group &= ~m;
          if (!group) break;
          pc++;
        } else if (m) {
          together = execute(w, op, m, group, pc);
          if (w.yield && !together) return true;
        } else {
          pc++;
        }
        if (!together) break;
        if (pc >= limit || budget <= 0) {
          for_lanes(group, [&](int l) { w.pc[l] = pc; });
          break;
        }
      }
    }
    return ran;
  }

  // Returns whether the group goes on as it is, at `pc`.
  bool execute(Warp& w, const Op& op, Mask m, Mask group, uint32_t& pc) {
    w.op = &op;
    w.stay = w.jumped = 0;
    w.yield = false;
    if (w.program.wgmma && !op.wgmma && (op.touches || w.wgmma.in_flight)) check_registers(w, op);
    op.step(w, m);
    if (!(w.stay | w.jumped | (w.blocked & group)) && !w.yield) {
      pc++;
      return true;
    }
    for_lanes(group & ~w.jumped, [&](int l) { w.pc[l] = w.stay >> l & 1 ? pc : pc + 1; });
    if (w.yield) w.rested = group;
    return false;
  }

  // The registers of a wgmma in flight may not be touched; a mov of an accumulator is only a new
  // name for it. Accesses ask for a wgmma.fence before the next wgmma on the register.
  void check_registers(Warp& w, const Op& op) {
    WgmmaState& s = w.wgmma;
    if (!launch_.checks()) return;
    const std::vector<Register>& names = w.program.function.registers;
    auto writing = [&](uint32_t r) { return s.result[r] > s.complete; };
    const std::vector<uint8_t>& operand = w.program.wgmma_register;
    bool moves = op.copies && !op.reads.empty() && writing(op.reads[0]);
    for (uint32_t r : op.reads) {
      if (writing(r) && !moves)
        w.fault(0, format("register %s is read before the wgmma.wait_group of the wgmma that "
                          "writes it",
                          names[r].name.c_str()));
      if (operand[r] && !(op.copies && operand[op.writes[0]])) s.dirty[r] = 1;
    }
    for (uint32_t r : op.writes) {
      if ((writing(r) && !moves) || s.input[r] > s.complete)
        w.fault(0, format("register %s is written while a wgmma in flight still uses it",
                          names[r].name.c_str()));
      s.result[r] = moves ? s.result[op.reads[0]] : 0;
      if (operand[r]) s.dirty[r] = !op.copies || (!op.reads.empty() && s.dirty[op.reads[0]]);
    }
  }

  [[noreturn]] void divergence(Warp& w) {
    int waiting = std::countr_zero(w.parked);
    Mask others = w.live & ~w.parked;
    w.op = &w.program.ops[w.pc[waiting]];
    for_lanes(w.parked, [&](int l) {
      if (w.pc[l] != w.pc[waiting]) others |= Mask(1) << l;
    });
    if (others) {
      int other = std::countr_zero(others);
      w.fault(waiting, format("divergent collective: lane %d is at ", other) +
                           place(w.program.ops[w.pc[other]]));
    }
    w.fault(waiting, format("divergent collective: it waits for lane %d, which has exited",
                            std::countr_zero(w.exists & ~w.live)));
  }

  Launch& launch_;
  uint64_t next_ = 0;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<std::vector<uint8_t>> files_;  // register files to use again
  uint32_t idle_ = 0;
};

}  // namespace

void Launch::run() { Scheduler(*this).run(); }

}  // namespace emu
