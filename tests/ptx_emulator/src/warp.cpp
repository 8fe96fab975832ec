// Instructions of a warp as a whole: shuffles, votes, reductions, election, bar.warp.
#include "decode.h"

namespace emu {

namespace {

// The lanes of membermask, the same in all of `m`; they must include the executing ones. Returns 0
// while some have not come yet.
Mask gather_members(Warp& w, Mask m, Ref membermask) {
  int first = std::countr_zero(m);
  Mask members = w.at<uint32_t>(membermask.offset)[first];
  Mask missing = 0;
  for_lanes(m, [&](int l) {
    Mask mine = w.at<uint32_t>(membermask.offset)[l];
    if (!(mine >> l & 1))
      w.fault(l, format("divergent collective: the member mask 0x%x leaves out lane %d itself",
                        mine, l));
    if (mine != members) missing |= Mask(1) << l;
  });
  Mask same = m & ~missing;
  if (missing) w.stay |= missing;  // other groups of lanes come after this one
  return w.gather(same, members & w.exists) ? same : 0;
}

Step shfl(Decoder& d) {
  if (!d.mod("sync")) d.reject("expected .sync");
  int mode = d.one_of({"up", "down", "bfly", "idx"});
  Type t = d.type();
  if (size_of(t) != 4) d.reject("the type must have 32 bits");
  d.count_is(5);
  Ref to, p;
  bool pair = d.raw(0).kind == Operand::Kind::Pair;
  if (pair) {
    to = d.out(d.part(0, 0), t);
    p = d.out(d.part(0, 1), Type::Pred);
  } else {
    to = d.out(0, t);
  }
  Ref a = d.in(1, t), b = d.in(2, Type::B32), c = d.in(3, Type::B32), mask = d.in(4, Type::B32);
  return [=](Warp& w, Mask arrived) {
    Mask m = gather_members(w, arrived, mask);
    if (!m) return;
    w.block.launch.stats->shuffles++;
    uint32_t value[LANES];
    std::memcpy(value, w.at<uint32_t>(a.offset), sizeof value);
    Mask inside = 0;
    for_lanes(m, [&](int l) {
      int step = int(w.at<uint32_t>(b.offset)[l] & 31);
      uint32_t control = w.at<uint32_t>(c.offset)[l];
      int clamp = int(control & 31), segment = int(control >> 8 & 31);
      int most = (l & segment) | (clamp & ~segment), least = l & segment;
      int from = 0;
      bool ok = false;
      switch (mode) {
        case 0:
          from = l - step;
          ok = from >= most;
          break;
        case 1:
          from = l + step;
          ok = from <= most;
          break;
        case 2:
          from = l ^ step;
          ok = from <= most;
          break;
        default:
          from = least | (step & ~segment);
          ok = from <= most;
      }
      if (!ok) from = l;
      if (!(m >> from & 1))
        w.fault(l, format("shuffle from lane %d, which does not take part", from));
      put(w, to, l, value[from]);
      inside |= Mask(ok) << l;
    });
    if (pair) w.set_predicate(p.offset, m, inside);
  };
}

Step vote(Decoder& d) {
  if (!d.mod("sync")) d.reject("expected .sync");
  int mode = d.one_of({"all", "any", "uni", "ballot"});
  d.type_is(mode == 3 ? Type::B32 : Type::Pred);
  d.count_is(3);
  Ref to = d.out(0, mode == 3 ? Type::B32 : Type::Pred), a = d.in(1, Type::Pred);
  Ref mask = d.in(2, Type::B32);
  return [=](Warp& w, Mask arrived) {
    Mask m = gather_members(w, arrived, mask);
    if (!m) return;
    Mask votes = predicate_value(w, a) & m;
    if (mode == 3) {
      for_lanes(m, [&](int l) { put(w, to, l, votes); });
      return;
    }
    bool result = mode == 0 ? votes == m : mode == 1 ? votes != 0 : votes == m || votes == 0;
    w.set_predicate(to.offset, m, result ? ALL : 0);
  };
}

Step match(Decoder& d) {
  bool all = d.one_of({"any", "all"}) == 1;
  if (!d.mod("sync")) d.reject("expected .sync");
  Type t = d.type();
  d.count_is(3);
  Ref to, p;
  bool pair = d.raw(0).kind == Operand::Kind::Pair;
  if (pair) {
    to = d.out(d.part(0, 0), Type::B32);
    p = d.out(d.part(0, 1), Type::Pred);
  } else {
    to = d.out(0, Type::B32);
  }
  Ref a = d.in(1, t), mask = d.in(2, Type::B32);
  bool wide = size_of(t) == 8;
  return [=](Warp& w, Mask arrived) {
    Mask m = gather_members(w, arrived, mask);
    if (!m) return;
    auto value = [&](int l) {
      return wide ? w.at<uint64_t>(a.offset)[l] : w.at<uint32_t>(a.offset)[l];
    };
    Mask every = ALL;
    for_lanes(m, [&](int l) {
      Mask same = 0;
      for_lanes(m, [&](int k) { same |= Mask(value(k) == value(l)) << k; });
      if (all && same != m) same = 0, every = 0;
      put(w, to, l, same);
    });
    if (pair) w.set_predicate(p.offset, m, every);
  };
}

Step redux(Decoder& d) {
  if (!d.mod("sync")) d.reject("expected .sync");
  int op = d.one_of({"add", "min", "max", "and", "or", "xor"});
  bool absolute = d.mod("abs"), nan = d.mod("NaN");
  Type t = d.type();
  d.count_is(3);
  if (size_of(t) != 4 || (t == Type::F32 && op != 1 && op != 2) || (t == Type::B32 && op < 3) ||
      (t != Type::F32 && (absolute || nan)))
    d.reject("this type does not go with this operation");
  Ref to = d.out(0, t), a = d.in(1, t), mask = d.in(2, Type::B32);
  return [=](Warp& w, Mask arrived) {
    Mask m = gather_members(w, arrived, mask);
    if (!m) return;
    bool first = true;
    uint32_t result = 0;
    for_lanes(m, [&](int l) {
      uint32_t x = w.at<uint32_t>(a.offset)[l];
      if (absolute) x &= 0x7fffffff;
      if (first) {
        result = x;
        first = false;
        return;
      }
      if (t == Type::F32) {
        float u = bits_as<float>(result), v = bits_as<float>(x);
        float r = op == 1 ? std::fmin(u, v) : std::fmax(u, v);
        result = nan && (u != u || v != v) ? NAN_F32 : bits_as<uint32_t>(r);
        return;
      }
      bool less = t == Type::S32 ? int32_t(x) < int32_t(result) : x < result;
      switch (op) {
        case 0:
          result += x;
          break;
        case 1:
          result = less ? x : result;
          break;
        case 2:
          result = less ? result : x;
          break;
        case 3:
          result &= x;
          break;
        case 4:
          result |= x;
          break;
        default:
          result ^= x;
      }
    });
    for_lanes(m, [&](int l) { put(w, to, l, result); });
  };
}

Step elect(Decoder& d) {
  if (!d.mod("sync")) d.reject("expected .sync");
  d.count_is(2);
  if (d.raw(0).kind != Operand::Kind::Pair) d.reject("expected d|p");
  Ref to = d.out(d.part(0, 0), Type::B32), p = d.out(d.part(0, 1), Type::Pred);
  Ref mask = d.in(1, Type::B32);
  return [=](Warp& w, Mask arrived) {
    Mask m = gather_members(w, arrived, mask);
    if (!m) return;
    int leader = std::countr_zero(m);  // the documentation leaves open which
    for_lanes(m, [&](int l) { put(w, to, l, uint32_t(leader)); });
    w.set_predicate(p.offset, m, Mask(1) << leader);
  };
}

Step activemask(Decoder& d) {
  d.type_is(Type::B32);
  d.count_is(1);
  Ref to = d.out(0, Type::B32);
  return [=](Warp& w, Mask m) { for_lanes(m, [&](int l) { put(w, to, l, m); }); };
}

}  // namespace

Step bar_warp(Decoder& d) {
  if (!d.mod("sync")) d.reject("expected .sync");
  d.count_is(1);
  Ref mask = d.in(0, Type::B32);
  return [=](Warp& w, Mask arrived) {
    Mask m = gather_members(w, arrived, mask);
    if (!m) return;
    w.block.launch.stats->barriers++;
    if (!w.block.launch.checks()) return;
    SyncPoint point;
    point.release(w, m);
    acquire(w, m, point.take());
  };
}

DecodeFunction find_warp(const std::string& opcode) {
  static const std::map<std::string, DecodeFunction> table = {
      {"shfl", shfl},   {"vote", vote},   {"match", match},
      {"redux", redux}, {"elect", elect}, {"activemask", activemask},
  };
  auto found = table.find(opcode);
  return found == table.end() ? nullptr : found->second;
}

}  // namespace emu
