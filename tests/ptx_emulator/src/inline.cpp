// Calls: the code of the called function goes in their place.
#include <algorithm>

#include "decode.h"

namespace emu {

namespace {

// Puts the code of called functions in place of the calls. A call's .param variables are local
// arrays of the caller, and stand for the callee's parameters.
class Inliner {
 public:
  explicit Inliner(const Module& module) : module_(module) {}

  Function run(const Function& f) {
    Function out = f;
    out.code.clear();
    append(out, f, 0, {}, -1);
    return out;
  }

 private:
  static void rename(Operand& o, int registers, const std::map<std::string, std::string>& names) {
    if (o.kind == Operand::Kind::Register) o.reg += registers;
    if (auto found = names.find(o.text); found != names.end()) o.text = found->second;
    for (Operand& part : o.parts) rename(part, registers, names);
  }

  void append(Function& out, const Function& f, int registers,
              std::map<std::string, std::string> names, int depth) {
    if (std::find(stack_.begin(), stack_.end(), f.name) != stack_.end())
      throw Fault("recursive calls of " + f.name + " are not supported");
    stack_.push_back(f.name);
    std::vector<int> place(f.code.size() + 1);
    std::vector<size_t> jumps, returns;
    for (size_t i = 0; i < f.code.size(); i++) {
      place[i] = int(out.code.size());
      Instruction in = f.code[i];
      if (in.guard >= 0) in.guard += registers;
      for (Operand& o : in.operands) rename(o, registers, names);
      if (in.opcode == "call") {
        call(out, in, depth);
        continue;
      }
      if (in.target >= 0 || !in.targets.empty()) jumps.push_back(out.code.size());
      if (in.opcode == "ret" && depth >= 0) {
        in.opcode = "bra";
        in.modifiers.clear();
        in.operands.clear();
        returns.push_back(out.code.size());
      }
      out.code.push_back(std::move(in));
    }
    place[f.code.size()] = int(out.code.size());
    for (size_t j : jumps) {
      if (out.code[j].target >= 0) out.code[j].target = place[out.code[j].target];
      for (int& t : out.code[j].targets) t = place[t];
    }
    for (size_t j : returns) out.code[j].target = int(out.code.size());
    stack_.pop_back();
  }

  void call(Function& out, const Instruction& in, int depth) {
    auto reject = [&](const std::string& why) {
      throw Fault(
          format("PTX line %d: %s: '%s'", in.location->ptx_line, why.c_str(), in.text.c_str()));
    };
    size_t at = 0;
    std::vector<Operand> results, arguments;
    if (!in.operands.empty() && in.operands[0].kind == Operand::Kind::List)
      results = in.operands[at++].parts;
    if (at >= in.operands.size() || in.operands[at].kind != Operand::Kind::Symbol)
      reject("indirect calls are not supported");
    std::string name = in.operands[at++].text;
    if (at < in.operands.size() && in.operands[at].kind == Operand::Kind::List)
      arguments = in.operands[at++].parts;
    auto callee = module_.functions.find(name);
    if (name == "__assertfail") {  // extern: fails when it is reached
      Instruction trap = in;
      trap.opcode = "trap";
      trap.modifiers.clear();
      trap.operands.clear();
      out.code.push_back(std::move(trap));
      return;
    }
    if (callee == module_.functions.end() || !callee->second.defined)
      reject("the called function is not in this module");
    const Function& f = callee->second;
    if (f.params.size() != arguments.size() || f.results.size() != results.size())
      reject("the call does not fit the function");
    std::map<std::string, std::string> names;
    for (size_t i = 0; i < results.size(); i++) names[f.results[i].name] = results[i].text;
    for (size_t i = 0; i < arguments.size(); i++) {
      if (arguments[i].kind != Operand::Kind::Symbol)
        reject("expected .param variables as arguments");
      names[f.params[i].name] = arguments[i].text;
    }
    std::string suffix = "#" + std::to_string(calls_++);
    for (const auto& [local, variable] : f.locals) {
      names[local] = local + suffix;
      out.locals[local + suffix] = variable;
    }
    int registers = int(out.registers.size());
    out.registers.insert(out.registers.end(), f.registers.begin(), f.registers.end());
    if (in.guard >= 0) {  // a guarded call: jump over it
      Instruction skip = in;
      skip.opcode = "bra";
      skip.modifiers.clear();
      skip.operands.clear();
      skip.guard_not = !in.guard_not;
      size_t j = out.code.size();
      out.code.push_back(skip);
      append(out, f, registers, names, depth + 1);
      out.code[j].target = int(out.code.size());
    } else {
      append(out, f, registers, names, depth + 1);
    }
  }

  const Module& module_;
  std::vector<std::string> stack_;
  int calls_ = 0;
};

}  // namespace

Function with_calls_inline(const Module& module, const Function& function) {
  return Inliner(module).run(function);
}

}  // namespace emu
