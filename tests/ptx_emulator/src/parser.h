// PTX text -> functions made of instructions. Names of registers and labels are resolved here, as
// they follow the scopes of the text; what an instruction means is decided in decode.cpp.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "values.h"

namespace emu {

// Where an instruction comes from: its PTX line and, from .loc, its line of CUDA or Triton source.
struct Location {
  int ptx_line = 0, line = 0, inlined_line = 0;
  std::string file, inlined_file;  // without folders; empty: no .loc
};

struct Operand {
  enum class Kind {
    Register,
    Integer,
    Float,    // bits of an f32 (0f...) or f64 (0d..., 1.5) literal, told apart by `type`
    Special,  // %tid.x
    Symbol,   // a variable, parameter, function or label
    Address,  // [parts[0] + offset, parts[1], ...]
    Vector,   // {parts}
    Pair,     // parts[0] | parts[1]
    List,     // (parts), of a call
    Sink,     // _
  };
  Kind kind = Kind::Sink;
  int reg = -1;  // index into Function::registers
  uint64_t bits = 0;
  Type type = Type::None;
  bool negated = false;  // !p
  int64_t offset = 0;
  std::string text;  // of specials and symbols
  std::vector<Operand> parts;
};

struct Instruction {
  std::string opcode;                  // the part before the first dot
  std::vector<std::string> modifiers;  // the parts after it
  std::vector<Operand> operands;
  int guard = -1;  // predicate register
  bool guard_not = false;
  int target = -1;           // bra: index of an instruction
  std::vector<int> targets;  // brx.idx
  int scope = 0;
  std::string text;
  std::shared_ptr<const Location> location;
};

struct Register {
  std::string name;
  Type type;
};

enum class Space : uint8_t { Generic, Global, Shared, Local, Const, Param };
const char* name_of(Space);

struct Variable {
  std::string name;
  Space space = Space::Global;
  uint64_t size = 0, align = 1, address = 0;  // address: within its space
  bool external = false;
  std::vector<uint8_t> init;
  std::vector<std::pair<uint64_t, std::string>> pointers;  // offset in init, symbol
};

struct Parameter {
  std::string name;
  uint32_t offset, size, align;
};

struct Function {
  std::string name;
  bool entry = false, defined = false;
  std::vector<Parameter> params, results;
  uint32_t param_bytes = 0;
  std::vector<Register> registers;
  std::vector<Instruction> code;
  std::map<std::string, Variable> locals;  // .local variables and .param variables of calls
  uint32_t max_threads = 0;                // .maxntid or .reqntid; 0: not given
  uint32_t max_registers = 0;              // .maxnreg
};

struct Module {
  std::string target;  // sm_90a
  std::map<std::string, Function> functions;
  std::vector<std::string> order;  // of the functions
  std::map<std::string, Variable> variables;
  uint32_t static_shared = 0;  // bytes; dynamic shared memory follows
};

Module parse(const char* text);

}  // namespace emu
