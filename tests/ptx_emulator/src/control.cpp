// Branches, exits, and instructions about the execution itself.
#include "decode.h"

namespace emu {

namespace {

Step bra(Decoder& d) {
  d.mod("uni");
  d.op().kind = Op::Kind::Branch;
  d.op().target = uint32_t(d.source().target);
  return nullptr;
}

Step brx(Decoder& d) {  // lanes that go elsewhere than the next instruction set their own pc
  if (!d.mod("idx")) d.reject("expected .idx");
  d.mod("uni");
  Ref index = d.in(0, Type::B32);
  std::vector<int> targets = d.source().targets;
  return [=](Warp& w, Mask m) {
    for_lanes(m, [&](int l) {
      uint32_t i = w.at<uint32_t>(index.offset)[l];
      if (i >= targets.size()) w.fault(l, format("brx.idx: %u of %zu", i, targets.size()));
      w.pc[l] = uint32_t(targets[i]);
    });
    w.jumped |= m;
  };
}

Step exit_instruction(Decoder& d) {
  d.mod("uni");
  d.count_is(0);
  d.op().kind = Op::Kind::Exit;
  return nullptr;
}

Step trap(Decoder& d) {
  bool assertion = d.source().text.find("__assertfail") != std::string::npos;
  return [assertion](Warp& w, Mask m) {
    w.fault(std::countr_zero(m), assertion ? "an assertion of the kernel failed" : "trap");
  };
}

Step nothing(Decoder& d) {
  const std::string& op = d.source().opcode;
  if (op == "griddepcontrol") {
    d.one_of({"launch_dependents", "wait"});
  } else {  // nanosleep.u32
    d.type_is(Type::U32);
    d.in(0, Type::U32);
  }
  return [](Warp& w, Mask) { w.yield = true; };
}

Step setmaxnreg(Decoder& d) {
  bool more = d.one_of({"inc", "dec"}) == 0;
  if (!d.mod("sync") || !d.mod("aligned")) d.reject("expected .sync.aligned");
  d.type_is(Type::U32);
  d.count_is(1);
  uint32_t n = d.constant(0);
  if (n < 24 || n > 256 || n % 8) d.reject("the count must be a multiple of 8 in 24..256");
  return [=](Warp& w, Mask m) {
    if (!w.gather_all(m)) return;
    if (w.max_registers && more && int(n) < w.max_registers)
      w.fault(0, format("setmaxnreg.inc to %u from %d", n, w.max_registers));
    if (w.max_registers && !more && int(n) > w.max_registers)
      w.fault(0, format("setmaxnreg.dec to %u from %d", n, w.max_registers));
    w.max_registers = int(n);
    w.registers_set = w.op;
  };
}

}  // namespace

DecodeFunction find_control(const std::string& opcode) {
  static const std::map<std::string, DecodeFunction> table = {
      {"bra", bra},
      {"brx", brx},
      {"ret", exit_instruction},
      {"exit", exit_instruction},
      {"trap", trap},
      {"nanosleep", nothing},
      {"griddepcontrol", nothing},
      {"setmaxnreg", setmaxnreg},
  };
  auto found = table.find(opcode);
  return found == table.end() ? nullptr : found->second;
}

}  // namespace emu
