#include "decode.h"

#include <algorithm>
#include <set>

namespace emu {

namespace {

uint32_t allocate(Program& program, uint32_t bytes) {
  uint32_t offset = uint32_t(program.image.size());
  offset = (offset + 31) / 32 * 32;
  program.image.resize(offset + bytes, 0);
  return offset;
}

}  // namespace

void Decoder::reject(const std::string& why) const {
  throw Fault(
      format("PTX line %d: %s: '%s'", in_.location->ptx_line, why.c_str(), in_.text.c_str()));
}

// ---- modifiers ----

bool Decoder::peek(std::string_view name) const {
  for (size_t i = 0; i < taken_.size(); i++)
    if (!taken_[i] && in_.modifiers[i] == name) return true;
  return false;
}

bool Decoder::mod(std::string_view name) {
  for (size_t i = 0; i < taken_.size(); i++)
    if (!taken_[i] && in_.modifiers[i] == name) return taken_[i] = true;
  return false;
}

int Decoder::one_of(std::initializer_list<const char*> names, bool optional) {
  int index = 0;
  for (const char* name : names) {
    if (mod(name)) return index;
    index++;
  }
  if (optional) return -1;
  std::string list;
  for (const char* name : names) list += std::string(list.empty() ? "" : ", ") + "." + name;
  reject("expected one of " + list);
}

Type Decoder::optional_type() {
  for (size_t i = 0; i < taken_.size(); i++) {
    Type t = taken_[i] ? Type::None : type_of(in_.modifiers[i]);
    if (t == Type::None) continue;
    taken_[i] = true;
    return t;
  }
  return Type::None;
}

Type Decoder::peek_type() const {
  for (size_t i = 0; i < taken_.size(); i++)
    if (!taken_[i] && type_of(in_.modifiers[i]) != Type::None) return type_of(in_.modifiers[i]);
  return Type::None;
}

Type Decoder::type() {
  Type t = optional_type();
  if (t == Type::None) reject("expected a type");
  return t;
}

void Decoder::type_is(Type expected) {
  if (type() != expected) reject(format("expected the type .%s", name_of(expected)));
}

std::optional<std::string> Decoder::starting(std::string_view prefix) {
  for (size_t i = 0; i < taken_.size(); i++) {
    if (taken_[i] || !std::string_view(in_.modifiers[i]).starts_with(prefix)) continue;
    taken_[i] = true;
    return in_.modifiers[i];
  }
  return std::nullopt;
}

Round Decoder::round(Round otherwise) {
  static constexpr Round rounds[] = {Round::Nearest, Round::Zero, Round::Down, Round::Up,
                                     Round::Away};
  int index = one_of({"rn", "rz", "rm", "rp", "rna"}, true);
  return index < 0 ? otherwise : rounds[index];
}

void Decoder::skip_cache_hints() {
  one_of({"ca", "cg", "cs", "lu", "cv", "wb", "wt"}, true);
  while (starting("L1::") || starting("L2::")) continue;
}

void Decoder::finish() const {
  for (size_t i = 0; i < taken_.size(); i++)
    if (!taken_[i]) reject("unknown modifier ." + in_.modifiers[i]);
}

// ---- operands ----

void Decoder::count_is(size_t least, size_t most) {
  if (count() < least || count() > most)
    reject(least == most ? format("expected %zu operands, got %zu", least, count())
                         : format("expected %zu to %zu operands, got %zu", least, most, count()));
}

const Operand& Decoder::raw(size_t i) const {
  if (i >= count()) reject(format("operand %zu is missing", i + 1));
  return in_.operands[i];
}

Ref Decoder::scratch(int width) {
  uint32_t offset = allocate(program_, width ? LANES * width : sizeof(Mask));
  return {offset, uint8_t(width), false, false};
}

Ref Decoder::literal(uint64_t bits, int width) {
  auto [known, added] = program_.literals.try_emplace({bits, width}, 0);
  if (added) {
    known->second = scratch(width).offset;
    uint8_t* to = &program_.image[known->second];
    if (width == 0) {
      Mask value = bits & 1 ? ALL : 0;
      std::memcpy(to, &value, sizeof value);
    }
    for (int l = 0; l < LANES; l++) std::memcpy(to + l * width, &bits, width);
  }
  return {known->second, uint8_t(width), false, false};
}

Ref Decoder::reg(const Operand& o, bool write) {
  const Register& r = program_.function.registers[o.reg];
  (write ? op_.writes : op_.reads).push_back(uint32_t(o.reg));
  return {program_.register_offset[o.reg], uint8_t(size_of(r.type)), false, o.negated};
}

Ref Decoder::special(const std::string& name) {
  static const std::set<std::string> narrow = {
      "%tid.x",
      "%tid.y",
      "%tid.z",
      "%ntid.x",
      "%ntid.y",
      "%ntid.z",
      "%ctaid.x",
      "%ctaid.y",
      "%ctaid.z",
      "%nctaid.x",
      "%nctaid.y",
      "%nctaid.z",
      "%laneid",
      "%warpid",
      "%nwarpid",
      "%smid",
      "%nsmid",
      "%lanemask_eq",
      "%lanemask_le",
      "%lanemask_lt",
      "%lanemask_ge",
      "%lanemask_gt",
      "%dynamic_smem_size",
      "%total_smem_size",
      "%clusterid.x",
      "%clusterid.y",
      "%clusterid.z",
      "%nclusterid.x",
      "%nclusterid.y",
      "%nclusterid.z",
      "%cluster_ctaid.x",
      "%cluster_ctaid.y",
      "%cluster_ctaid.z",
      "%cluster_nctaid.x",
      "%cluster_nctaid.y",
      "%cluster_nctaid.z",
      "%cluster_ctarank",
      "%cluster_nctarank",
  };
  bool wide = name == "%gridid";
  if (name == "%clock" || name == "%clock64" || name == "%clock_hi" || name == "%globaltimer" ||
      name == "%globaltimer_lo" || name == "%globaltimer_hi")
    reject(name + " is refused: a run must not depend on time");
  if (!wide && !narrow.count(name)) reject("unknown register " + name);
  for (const Program::Special& s : program_.specials)
    if (s.name == name) return {s.offset, uint8_t(wide ? 8 : 4), false, false};
  uint32_t offset = allocate(program_, LANES * (wide ? 8 : 4));
  program_.specials.push_back({name, offset, wide});
  return {offset, uint8_t(wide ? 8 : 4), false, false};
}

// An address that is known when the kernel is launched.
Ref Decoder::named(const Operand& o) {
  Ref r = scratch(8);
  for (int l = 0; l < LANES; l++)
    std::memcpy(&program_.image[r.offset + 8 * l], &o.offset, sizeof o.offset);
  program_.symbols.push_back({r.offset, o.text});
  return r;
}

Ref Decoder::symbol(const Operand& o, int width) {
  if (width != 4 && width != 8) reject("an address needs a 32-bit or 64-bit register");
  auto local = program_.function.locals.find(o.text);
  if (local != program_.function.locals.end())
    return literal(local->second.address + uint64_t(o.offset), width);
  for (const Parameter& p : program_.function.params)
    if (p.name == o.text) return literal(p.offset + uint64_t(o.offset), width);
  auto variable = module_.variables.find(o.text);
  if (variable == module_.variables.end()) reject("unknown name " + o.text);
  if (variable->second.space == Space::Shared) {
    uint64_t address = SHARED_BASE + variable->second.address + uint64_t(o.offset);
    return literal(address, width);
  }
  if (width != 8) reject("the address of a variable needs a 64-bit register");
  return named(o);
}

Ref Decoder::in_any(const Operand& o, Type t) {
  int width = t == Type::Pred ? 0 : size_of(t);
  switch (o.kind) {
    case Operand::Kind::Register: {
      Ref r = reg(o, false);
      if (r.width < width || (width == 0) != (r.width == 0))
        reject(format("%s does not hold a .%s", o.text.c_str(), name_of(t)));
      if (o.offset) reject("an offset is only for addresses");
      return r;
    }
    case Operand::Kind::Integer:
      if (t == Type::F32 || t == Type::F64)
        reject(format("expected a .%s, got an integer", name_of(t)));
      return literal(o.bits, width);
    case Operand::Kind::Float:
      if (width != 4 && width != 8) reject(format("expected a .%s, got a float", name_of(t)));
      if (o.type == Type::F64 && width == 4)
        return literal(bits_as<uint32_t>(float(bits_as<double>(o.bits))), 4);
      if (o.type == Type::F32 && width == 8)
        return literal(bits_as<uint64_t>(double(bits_as<float>(uint32_t(o.bits)))), 8);
      return literal(o.bits, width);
    case Operand::Kind::Special: {
      if (o.text == "%WARP_SZ" || o.text == "WARP_SZ") return literal(LANES, width);
      Ref r = special(o.text);
      if (r.width < width) reject(format("%s does not hold a .%s", o.text.c_str(), name_of(t)));
      return r;
    }
    case Operand::Kind::Symbol:
      if (o.text == "WARP_SZ") return literal(LANES, width);
      return symbol(o, width);
    case Operand::Kind::Sink:
      reject("'_' cannot be read");
    default:
      reject("expected a single value");
  }
}

Ref Decoder::in(const Operand& o, Type t) {
  Ref r = in_any(o, t);
  if (t != Type::Pred && r.width != size_of(t) && o.kind != Operand::Kind::Special)
    reject(format("%s does not hold a .%s", o.text.c_str(), name_of(t)));
  return r;
}

Ref Decoder::out_any(const Operand& o, Type t) {
  if (o.kind == Operand::Kind::Sink) {  // a place that nobody reads
    Ref r = scratch(t == Type::Pred ? 0 : std::max(size_of(t), 4));
    r.sink = true;
    return r;
  }
  if (o.kind != Operand::Kind::Register) reject("expected a register to write");
  Ref r = reg(o, true);
  int width = t == Type::Pred ? 0 : size_of(t);
  if (r.width < width || (width == 0) != (r.width == 0))
    reject(format("%s does not hold a .%s", o.text.c_str(), name_of(t)));
  return r;
}

Ref Decoder::out(const Operand& o, Type t) {
  Ref r = out_any(o, t);
  if (r.sink && t != Type::Pred) r.width = uint8_t(size_of(t));
  if (t != Type::Pred && r.width != size_of(t))
    reject(format("%s does not hold a .%s", o.text.c_str(), name_of(t)));
  return r;
}

std::vector<Ref> Decoder::ins(size_t i, Type t, size_t n) {
  const Operand& o = raw(i);
  std::vector<Ref> refs;
  if (o.kind != Operand::Kind::Vector) {
    refs.push_back(in(o, t));
  } else {
    for (const Operand& part : o.parts) refs.push_back(in(part, t));
  }
  if (n && refs.size() != n)
    reject(format("operand %zu has %zu registers, expected %zu", i + 1, refs.size(), n));
  return refs;
}

std::vector<Ref> Decoder::outs(size_t i, Type t, size_t n) {
  const Operand& o = raw(i);
  std::vector<Ref> refs;
  if (o.kind != Operand::Kind::Vector) {
    refs.push_back(out(o, t));
  } else {
    for (const Operand& part : o.parts) refs.push_back(out(part, t));
  }
  if (n && refs.size() != n)
    reject(format("operand %zu has %zu registers, expected %zu", i + 1, refs.size(), n));
  return refs;
}

const Operand& Decoder::part(size_t i, size_t p) const {
  if (p >= raw(i).parts.size()) reject(format("operand %zu is incomplete", i + 1));
  return raw(i).parts[p];
}

uint32_t Decoder::constant(size_t i) {
  if (raw(i).kind != Operand::Kind::Integer)
    reject(format("operand %zu must be an integer constant", i + 1));
  return uint32_t(raw(i).bits);
}

Space Decoder::space_of(const Operand& o) const {
  if (o.kind != Operand::Kind::Address || o.parts[0].kind != Operand::Kind::Symbol)
    return Space::Generic;
  const std::string& name = o.parts[0].text;
  if (program_.function.locals.count(name)) return Space::Local;
  auto variable = module_.variables.find(name);
  if (variable != module_.variables.end()) return variable->second.space;
  return Space::Param;
}

Address Decoder::address(size_t i, Space space, size_t parts) {
  const Operand& o = raw(i);
  if (o.kind != Operand::Kind::Address) reject(format("operand %zu must be an address", i + 1));
  if (parts && o.parts.size() != parts)
    reject(format("the brackets of operand %zu hold %zu parts, expected %zu", i + 1, o.parts.size(),
                  parts));
  const Operand& base = o.parts[0];
  Address a;
  a.offset = o.offset;
  if (base.kind == Operand::Kind::Symbol) {
    Space of = space_of(o);
    if (of != space && space != Space::Generic)
      reject(format("%s is in .%s, not in .%s", base.text.c_str(), name_of(of), name_of(space)));
    a.base = symbol(base, 8);
    if (space == Space::Generic && of != Space::Global && of != Space::Const &&
        of != Space::Generic)
      reject("a generic access needs the generic address of " + base.text);
  } else if (base.kind == Operand::Kind::Integer) {
    a.base = literal(base.bits, 8);
  } else if (base.kind == Operand::Kind::Register) {
    a.base = reg(base, false);
    if (a.base.width != 4 && a.base.width != 8) reject(base.text + " does not hold an address");
    a.wide = a.base.width == 8;
    if (!a.wide && space != Space::Shared && space != Space::Local)
      reject(format("a .%s address needs a 64-bit register", name_of(space)));
  } else {
    reject(format("operand %zu is no address", i + 1));
  }
  return a;
}

// ---- programs ----

namespace {

DecodeFunction find(const std::string& opcode) {
  for (auto family : {find_integer, find_float, find_logic, find_compare, find_convert, find_memory,
                      find_atomic, find_warp, find_barrier, find_mbarrier, find_matrix, find_mma,
                      find_copy, find_wgmma, find_control})
    if (DecodeFunction f = family(opcode)) return f;
  return nullptr;
}

}  // namespace

std::string place(const Op& op) {
  const Location& at = *op.source->location;
  std::string text;
  if (at.line) {
    text = format("%s:%d", at.file.c_str(), at.line);
    if (at.inlined_line)
      text += format(" (inlined at %s:%d)", at.inlined_file.c_str(), at.inlined_line);
    text += ", ";
  }
  return text + format("PTX line %d '%.120s'", at.ptx_line, op.source->text.c_str());
}

// The operands of wgmma, and whatever is moved into one.
void find_wgmma_registers(Program& p) {
  std::vector<uint8_t>& operand = p.wgmma_register;
  operand.assign(p.function.registers.size(), 0);
  for (const Op& op : p.ops)
    if (op.wgmma)
      for (const auto* list : {&op.reads, &op.writes})
        for (uint32_t r : *list) operand[r] = 1;
  for (bool more = true; more;) {
    more = false;
    for (const Op& op : p.ops)
      if (op.copies && !op.reads.empty() && operand[op.writes[0]] && !operand[op.reads[0]])
        more = (operand[op.reads[0]] = 1);
  }
  for (Op& op : p.ops)
    for (const auto* list : {&op.reads, &op.writes})
      for (uint32_t r : *list) op.touches |= operand[r] != 0;
}

// The static shared variables among a function's operands.
void find_shared(const Module& module, const std::vector<Operand>& operands,
                 std::set<const Variable*>& found) {
  for (const Operand& operand : operands) {
    auto named = module.variables.find(operand.text);
    if (operand.kind == Operand::Kind::Symbol && named != module.variables.end()) {
      const Variable& v = named->second;
      if (v.space == Space::Shared && !v.external) found.insert(&v);
    }
    find_shared(module, operand.parts, found);
  }
}

uint32_t shared_of(const Module& module, const Function& function) {
  std::set<const Variable*> found;
  for (const Instruction& in : function.code) find_shared(module, in.operands, found);
  uint64_t bytes = 0;
  for (const Variable* v : found) bytes = (bytes + v->align - 1) / v->align * v->align + v->size;
  return uint32_t(bytes);
}

std::unique_ptr<Program> decode(const Module& module, const Function& function) {
  auto program = std::make_unique<Program>();
  program->name = function.name;
  program->function = with_calls_inline(module, function);
  program->static_shared = module.static_shared;
  program->own_shared = shared_of(module, program->function);
  Function& f = program->function;
  for (auto& [name, v] : f.locals) {
    program->local_bytes = uint32_t((program->local_bytes + v.align - 1) / v.align * v.align);
    v.address = program->local_bytes;
    program->local_bytes += uint32_t(v.size);
  }
  program->local_bytes = (program->local_bytes + 15) / 16 * 16;
  for (const Register& r : f.registers) {
    uint32_t bytes = r.type == Type::Pred ? 4 : LANES * size_of(r.type);
    program->register_offset.push_back(allocate(*program, bytes));
  }
  program->register_bytes = uint32_t(program->image.size());
  std::fill(program->image.begin(), program->image.end(), 0xff);  // NaN, if it is ever read
  program->ops.resize(f.code.size() + 1);
  for (size_t i = 0; i < f.code.size(); i++) {
    const Instruction& in = f.code[i];
    Op& op = program->ops[i];
    op.source = &in;
    Decoder d(module, *program, in, op);
    DecodeFunction family = find(in.opcode);
    if (!family) d.reject("unknown instruction " + in.opcode);
    op.step = family(d);
    d.finish();
    op.copies &= op.reads.size() <= 1 && op.writes.size() == 1;
    if (in.guard >= 0) {
      op.guarded = true;
      op.guard_not = in.guard_not;
      op.guard = program->register_offset[in.guard];
      op.reads.push_back(uint32_t(in.guard));
    }
    if (in.opcode == "wgmma") program->wgmma = true;
  }
  program->ops.back().kind = Op::Kind::Exit;  // running off the end
  program->ops.back().source = f.code.empty() ? nullptr : &f.code.back();
  if (program->wgmma) find_wgmma_registers(*program);
  return program;
}

}  // namespace emu
