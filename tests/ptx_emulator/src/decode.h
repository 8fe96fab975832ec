// Turns an instruction of the text into a Step. Decoder is the one way to an instruction's parts:
// each modifier must be taken by name and each operand by position with its type, and finish()
// rejects what was not taken, so nothing is ever skipped.
#pragma once

#include <initializer_list>
#include <optional>

#include "machine.h"

namespace emu {

struct Ref {  // a value per lane in the register file
  uint32_t offset = 0;
  uint8_t width = 0;  // bytes of a lane's value; 0: a predicate
  bool sink = false;
  bool negated = false;  // of predicates
};

struct Address {
  Ref base;
  int64_t offset = 0;
  bool wide = true;  // 64-bit base
  uint64_t of(Warp& w, int lane) const {
    return uint64_t((wide ? int64_t(w.at<uint64_t>(base.offset)[lane])
                          : int64_t(w.at<uint32_t>(base.offset)[lane])) +
                    offset);
  }
};

class Decoder {
 public:
  Decoder(const Module& module, Program& program, const Instruction& instruction, Op& op)
      : module_(module),
        program_(program),
        in_(instruction),
        op_(op),
        taken_(instruction.modifiers.size()) {}

  [[noreturn]] void reject(const std::string& why) const;

  // ---- modifiers ----
  bool mod(std::string_view name);  // takes it if it is there
  // Takes the one of `names` that is there: its index; none: reject, or -1 if optional.
  int one_of(std::initializer_list<const char*> names, bool optional = false);
  bool peek(std::string_view name) const;
  Type type();           // takes the next modifier that names a type
  Type optional_type();  // Type::None if there is none
  void type_is(Type expected);
  Type peek_type() const;                                        // the next one, not taken
  std::optional<std::string> starting(std::string_view prefix);  // takes a modifier, L2::128B
  Round round(Round otherwise = Round::Nearest);                 // .rn .rz .rm .rp .rna
  void skip_cache_hints();  // .ca .cg L1::... L2::...: they change no result

  // ---- operands ----
  size_t count() const { return in_.operands.size(); }
  void count_is(size_t least, size_t most);
  void count_is(size_t n) { count_is(n, n); }
  const Operand& raw(size_t i) const;
  bool is_vector(size_t i) const { return raw(i).kind == Operand::Kind::Vector; }
  bool is_address(size_t i) const { return raw(i).kind == Operand::Kind::Address; }
  Ref in(size_t i, Type t) { return in(raw(i), t); }
  Ref out(size_t i, Type t) { return out(raw(i), t); }
  Ref in(const Operand&, Type);      // a register of the type's width, a constant, a special
  Ref out(const Operand&, Type);     // a register of the type's width, or _
  Ref in_any(const Operand&, Type);  // the register may be wider: ld, st and cvt allow it
  Ref out_any(const Operand&, Type);
  std::vector<Ref> ins(size_t i, Type t, size_t n = 0);  // {a, b, ...}; n: how many there must be
  std::vector<Ref> outs(size_t i, Type t, size_t n = 0);
  const Operand& part(size_t i, size_t p) const;
  uint32_t constant(size_t i);  // an integer literal
  // [register + offset], [symbol + offset]; parts: how many things the brackets hold
  Address address(size_t i, Space space, size_t parts = 1);
  Space space_of(const Operand& address) const;  // of a symbol; Generic otherwise

  const Instruction& source() const { return in_; }
  const Module& module() const { return module_; }
  Program& program() { return program_; }
  Op& op() { return op_; }
  void finish() const;  // rejects modifiers that nobody took

  Ref literal(uint64_t bits, int width);  // shared by all who ask for it: never written
  Ref scratch(int width);

 private:
  Ref reg(const Operand&, bool write);
  Ref special(const std::string& name);
  Ref symbol(const Operand&, int width);
  Ref named(const Operand&);

  const Module& module_;
  Program& program_;
  const Instruction& in_;
  Op& op_;
  std::vector<bool> taken_;
};

using DecodeFunction = Step (*)(Decoder&);
// The families; each returns nullptr for opcodes that are not its own.
DecodeFunction find_integer(const std::string& opcode);
DecodeFunction find_float(const std::string& opcode);
DecodeFunction find_logic(const std::string& opcode);
DecodeFunction find_compare(const std::string& opcode);
DecodeFunction find_convert(const std::string& opcode);
DecodeFunction find_memory(const std::string& opcode);
DecodeFunction find_atomic(const std::string& opcode);
DecodeFunction find_warp(const std::string& opcode);
DecodeFunction find_barrier(const std::string& opcode);
DecodeFunction find_mbarrier(const std::string& opcode);
DecodeFunction find_matrix(const std::string& opcode);
DecodeFunction find_mma(const std::string& opcode);
DecodeFunction find_copy(const std::string& opcode);
DecodeFunction find_wgmma(const std::string& opcode);
DecodeFunction find_control(const std::string& opcode);

Function with_calls_inline(const Module&, const Function&);  // inline.cpp

Step float_arithmetic(Decoder&);  // the float types of add, min, ...: float.cpp, half.cpp
Step half_arithmetic(Decoder&);

// ---- loops over the lanes ----

template <class D, class A, class F>
Step unary(Ref d, Ref a, F f) {
  return [d = d.offset, a = a.offset, f](Warp& w, Mask m) {
    D* out = w.at<D>(d);
    const A* x = w.at<A>(a);
    if (m == ALL) {
#pragma GCC ivdep
      for (int l = 0; l < LANES; l++) out[l] = f(x[l]);
    } else {
      for_lanes(m, [&](int l) { out[l] = f(x[l]); });
    }
  };
}

template <class D, class A, class B, class F>
Step binary(Ref d, Ref a, Ref b, F f) {
  return [d = d.offset, a = a.offset, b = b.offset, f](Warp& w, Mask m) {
    D* out = w.at<D>(d);
    const A* x = w.at<A>(a);
    const B* y = w.at<B>(b);
    if (m == ALL) {
#pragma GCC ivdep
      for (int l = 0; l < LANES; l++) out[l] = f(x[l], y[l]);
    } else {
      for_lanes(m, [&](int l) { out[l] = f(x[l], y[l]); });
    }
  };
}

template <class D, class A, class B, class C, class F>
Step ternary(Ref d, Ref a, Ref b, Ref c, F f) {
  return [d = d.offset, a = a.offset, b = b.offset, c = c.offset, f](Warp& w, Mask m) {
    D* out = w.at<D>(d);
    const A* x = w.at<A>(a);
    const B* y = w.at<B>(b);
    const C* z = w.at<C>(c);
    if (m == ALL) {
#pragma GCC ivdep
      for (int l = 0; l < LANES; l++) out[l] = f(x[l], y[l], z[l]);
    } else {
      for_lanes(m, [&](int l) { out[l] = f(x[l], y[l], z[l]); });
    }
  };
}

// The low bytes of a lane's register, whatever its width.
template <class T>
T low(Warp& w, Ref r, int lane) {
  T value;
  std::memcpy(&value, w.file + r.offset + size_t(lane) * r.width, sizeof value);
  return value;
}
// Stores `value` (at most 8 bytes) into a lane's register, cut or zero-extended to its width.
inline void put(Warp& w, Ref r, int lane, uint64_t value) {
  if (!r.sink) std::memcpy(w.file + r.offset + size_t(lane) * r.width, &value, r.width);
}

inline Mask predicate_value(Warp& w, Ref r) {
  Mask value = w.predicate(r.offset);
  return r.negated ? ~value : value;
}

}  // namespace emu
