"""Arithmetic and logic: each operation on edge values, against C++ that a compiler translates.

An operation is an Op: its PTX name, the types of result and operands, and the same in C++ of a, b
and c. C++ has no contraction here and wraps signed integers; what it lacks is in
kernels/arithmetic.h.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import re
from pathlib import Path

import torch

from . import build, micro

PRELUDE = Path(__file__).parent / "kernels" / "arithmetic.h"
WIDTHS = {"pred": 4} | {f"{kind}{n}": n // 8 for kind in "sub" for n in (8, 16, 32, 64)}
WIDTHS |= {"f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4}


@dataclasses.dataclass(frozen=True)
class Op:
    """instruction: as PTX spells it, with {d}, {a}, {b}, {c} where more than a list is needed.
    error: what an approximation may be off, relative to each result."""

    instruction: str
    result: str
    operands: tuple[str, ...]
    cxx: str
    arch: int = 80
    error: float = 0.0
    tame: bool = False  # ordinary numbers only

    @property
    def name(self) -> str:
        table = re.search(r"0x\w+", self.instruction)
        return self.instruction.split()[0] + (f" {table[0]}" if table else "")


def made() -> list[Op]:
    ops: list[Op] = []

    def add(instruction, result, operands, cxx, **options):
        ops.append(Op(instruction, result, tuple(operands.split()), cxx, **options))

    for bits in (16, 32, 64):
        for sign in "su":
            t, both = f"{sign}{bits}", f"{sign}{bits} {sign}{bits}"
            three = f"{both} {t}"
            add(f"add.{t}", t, both, "a + b")
            add(f"sub.{t}", t, both, "a - b")
            add(f"mul.lo.{t}", t, both, "u64(a) * u64(b)")
            add(f"mul.hi.{t}", t, both, f"({sign}128(a) * {sign}128(b)) >> {bits}")
            add(f"mad.lo.{t}", t, three, "u64(a) * u64(b) + u64(c)")
            add(f"mad.hi.{t}", t, three, f"(({sign}128(a) * {sign}128(b)) >> {bits}) + c")
            if bits < 64:
                wide = f"{sign}{2 * bits}"
                add(f"mul.wide.{t}", wide, both, f"{wide}(a) * {wide}(b)")
                add(f"mad.wide.{t}", wide, f"{both} {wide}", f"u64({wide}(a) * {wide}(b)) + u64(c)")
            # division by 0 and of the least by -1 are unspecified
            divisor = f"{t}(b == 0 || b == {t}(-1) ? 3 : b)"
            safe = "setp.eq.{t} %z, {b}, 0; @%z mov.b{n} {b}, 3; setp.eq.{t} %z, {b}, -1;"
            if sign == "u":
                safe = safe.replace("{b}, -1", f"{{b}}, {2**bits - 1}")
            safe = safe.replace("{t}", t).replace("{n}", str(bits)) + f" @%z mov.b{bits} {{b}}, 3;"
            add(f"div.{t} {{d}}, {{a}}, {{b}};{safe}", t, both, f"a / {divisor}")
            add(f"rem.{t} {{d}}, {{a}}, {{b}};{safe}", t, both, f"a % {divisor}")
            add(f"min.{t}", t, both, "std::min(a, b)")
            add(f"max.{t}", t, both, "std::max(a, b)")
            add(f"shr.{t}", t, f"{t} u32", f"shifted_right<{t}>(a, b)")
            for compare, sym in zip(
                ("eq", "ne", "lt", "le", "gt", "ge"), ["==", "!=", "<", "<=", ">", ">="]
            ):
                add(f"setp.{compare}.{t}", "pred", both, f"a {sym} b")
            if sign == "s":
                add(f"neg.{t}", t, t, "-u64(a)")
                add(f"abs.{t}", t, t, "a < 0 ? -u64(a) : u64(a)")
        t, both = f"b{bits}", f"b{bits} b{bits}"
        add(f"and.{t}", t, both, "a & b")
        add(f"or.{t}", t, both, "a | b")
        add(f"xor.{t}", t, both, "a ^ b")
        add(f"not.{t}", t, t, "~a")
        add(f"cnot.{t}", t, t, "a == 0")
        add(f"shl.{t}", t, f"{t} u32", f"shifted_left<{t}>(a, b)")
        add(f"selp.{t} {{d}}, {{a}}, {{b}}, %p;setp.lt.s32 %p, {{c}}, 0;", t, f"{both} s32",
            "c < 0 ? a : b")  # fmt: skip
    for compare, sym in (("lo", "<"), ("ls", "<="), ("hi", ">"), ("hs", ">=")):
        add(f"setp.{compare}.u32", "pred", "u32 u32", f"a {sym} b")
    for bits in (32, 64):
        t = f"b{bits}"
        add(f"popc.{t}", "u32", t, "__builtin_popcountll(a)")
        add(f"clz.{t}", "u32", t, f"a ? __builtin_clzll(a) - {64 - bits} : {bits}")
        add(f"brev.{t}", t, t, f"reversed<{t}>(a)")
        add(f"bfi.{t}", t, f"{t} {t} u32 u32", f"inserted<{t}>(a, b, c, e)")
        for sign in "su":
            add(f"bfe.{sign}{bits}", f"{sign}{bits}", f"{sign}{bits} u32 u32",
                f"extracted<{sign}{bits}>(a, b, c)")  # fmt: skip
            add(f"bfind.{sign}{bits}", "u32", f"{sign}{bits}", f"highest<{sign}{bits}>(a)")
    add("bfind.shiftamt.u32", "u32", "u32", "a ? 31 - highest<u32>(a) : 0xffffffff")
    add("sad.s32", "u32", "s32 s32 u32", "c + u32(a < b ? s64(b) - a : s64(a) - b)")
    add("sad.u32", "u32", "u32 u32 u32", "c + (a < b ? b - a : a - b)")
    add("add.sat.s32", "s32", "s32 s32", "clamped<s32>(s64(a) + b)")
    add("sub.sat.s32", "s32", "s32 s32", "clamped<s32>(s64(a) - b)")
    add("mul24.lo.s32", "s32", "s32 s32", "u64((s64(a << 8) >> 8) * (s64(b << 8) >> 8))")
    add("mul24.lo.u32", "u32", "u32 u32", "u64(a & 0xffffff) * (b & 0xffffff)")
    add("prmt.b32", "b32", "b32 b32 b32", "permuted(a, b, c)")
    for table in (0x96, 0xE8, 0xCA, 0x80, 0xFE, 0x1B):
        add(f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table:#x};", "b32", "b32 b32 b32",
            f"logic(a, b, c, {table})")  # fmt: skip
    for way, function in (("l", "funnel_left"), ("r", "funnel_right")):
        add(f"shf.{way}.wrap.b32", "b32", "b32 b32 u32", f"{function}(a, b, c & 31)")
        clamped = "c < 32 ? {f}(a, b, c) : {e}".replace("{f}", function)
        add(f"shf.{way}.clamp.b32", "b32", "b32 b32 u32",
            clamped.replace("{e}", "a" if way == "l" else "b"))  # fmt: skip
    add("slct.s32.s32", "s32", "s32 s32 s32", "c >= 0 ? a : b")
    add("dp4a.s32.s32", "s32", "s32 s32 s32",
        "[&] { u32 sum = c; for (int i = 0; i < 4; i++) sum += s8(a >> 8 * i) * s8(b >> 8 * i);"
        " return sum; }()")  # fmt: skip
    carry = "add.cc.u32 %r0, {a}, {b}; addc.u32 {d}, {a}, 0;"
    add(carry, "u32", "u32 u32", "a + (u32(a + b) < a)")
    borrow = "sub.cc.u32 %r0, {a}, {b}; subc.u32 {d}, {b}, 0;"
    add(borrow, "u32", "u32 u32", "b - (a < b)")

    for t, z in (("f32", ""), ("f32", ".ftz"), ("f64", "")):
        both = f"{t} {t}"
        f = "ftz" if z else ""
        for name, sym in (("add", "+"), ("sub", "-"), ("mul", "*")):
            add(f"{name}.rn{z}.{t}", t, both, f"{f}({f}(a) {sym} {f}(b))")
        add(f"fma.rn{z}.{t}", t, f"{both} {t}", f"{f}(std::fma({f}(a), {f}(b), {f}(c)))")
        add(f"min{z}.{t}", t, both, f"{'least' if t == 'f32' else 'std::fmin'}({f}(a), {f}(b))",
            tame=t == "f64")  # fmt: skip
        add(f"max{z}.{t}", t, both, f"{'most' if t == 'f32' else 'std::fmax'}({f}(a), {f}(b))",
            tame=t == "f64")  # fmt: skip
        add(f"neg{z}.{t}", t, t, f"{f}(-a)")
        add(f"abs{z}.{t}", t, t, f"{f}(std::fabs(a))")
        for compare, sym in zip(("eq", "lt", "le", "gt", "ge"), ["==", "<", "<=", ">", ">="]):
            add(f"setp.{compare}{z}.{t}", "pred", both, f"{f}(a) {sym} {f}(b)")
            add(f"setp.{compare}u{z}.{t}", "pred", both,
                f"std::isnan(a) || std::isnan(b) || {f}(a) {sym} {f}(b)")  # fmt: skip
        number = "!std::isnan(a) && !std::isnan(b)"
        add(f"setp.ne{z}.{t}", "pred", both, f"{number} && {f}(a) != {f}(b)")
        add(f"setp.neu{z}.{t}", "pred", both, f"!({number}) || {f}(a) != {f}(b)")
        add(f"setp.num{z}.{t}", "pred", both, number)
        add(f"setp.nan{z}.{t}", "pred", both, f"!({number})")
        add(f"div.rn{z}.{t}", t, both, f"{f}({f}(a) / {f}(b))")
        add(f"rcp.rn{z}.{t}", t, t, f"{f}(1 / {f}(a))")
        add(f"sqrt.rn{z}.{t}", t, t, f"{f}(std::sqrt({f}(a)))")
        add(f"copysign.{t}", t, both, "std::copysign(b, a)") if not z else None
    add("min.NaN.f32", "f32", "f32 f32", "std::isnan(a) || std::isnan(b) ? NAN : least(a, b)")
    add("max.NaN.f32", "f32", "f32 f32", "std::isnan(a) || std::isnan(b) ? NAN : most(a, b)")
    add("add.sat.f32", "f32", "f32 f32", "saturated(a + b)")
    add("fma.rn.sat.f32", "f32", "f32 f32 f32", "saturated(std::fma(a, b, c))")
    add("mul.rz.f32", "f32", "f32 f32", "towards_zero(double(a) * double(b))", tame=True)
    add("selp.f32 {d}, {a}, {b}, %p;setp.lt.f32 %p, {c}, 0f00000000;", "f32", "f32 f32 f32",
        "c < 0 ? a : b")  # fmt: skip
    add("testp.infinite.f32 %p, {a};selp.u32 {d}, 1, 0, %p;", "u32", "f32", "std::isinf(a)")
    add("testp.notanumber.f32 %p, {a};selp.u32 {d}, 1, 0, %p;", "u32", "f32", "std::isnan(a)")

    # approximations: the largest errors that the PTX documentation states, rounded up
    for z in ("", ".ftz"):
        f = "ftz" if z else ""
        add(f"ex2.approx{z}.f32", "f32", "f32", f"{f}(std::exp2({f}(a)))", error=2.5e-7)
        add(f"lg2.approx{z}.f32", "f32", "f32", f"std::log2({f}(a))", error=5e-7, tame=True)
        add(f"rcp.approx{z}.f32", "f32", "f32", f"{f}(1 / {f}(a))", error=1.5e-7, tame=True)
        add(f"sqrt.approx{z}.f32", "f32", "f32", f"std::sqrt({f}(a))", error=2.5e-7, tame=True)
        add(f"rsqrt.approx{z}.f32", "f32", "f32", f"1 / std::sqrt({f}(a))", error=2.5e-7, tame=True)
        add(f"div.approx{z}.f32", "f32", "f32 f32", f"{f}(a) / {f}(b)", error=2.5e-7, tame=True)
        add(f"div.full{z}.f32", "f32", "f32 f32", f"{f}(a) / {f}(b)", error=2.5e-7, tame=True)
    add("tanh.approx.f32", "f32", "f32", "std::tanh(a)", error=5e-4)  # 2**-11

    for t, both in (("f16", "f16 f16"), ("bf16", "bf16 bf16")):
        arch = 80 if t == "f16" else 90
        x, y, z = (f"float({v})" for v in "abc")
        for name, sym in (("add", "+"), ("sub", "-"), ("mul", "*")):
            add(f"{name}.rn.{t}" if t == "f16" else f"{name}.{t}", t, both, f"{t}({x} {sym} {y})",
                arch=arch)  # fmt: skip
        add(f"fma.rn.{t}", t, f"{both} {t}", f"{t}(to_odd(std::fma({x}, {y}, double({z}))))",
            tame=True)  # fmt: skip
        add(f"min.{t}", t, both, "least(a, b)")
        add(f"max.{t}", t, both, "most(a, b)")
        add(f"neg.{t}", t, t, f"{t}(-{x})")
        add(f"abs.{t}", t, t, f"{t}(std::fabs({x}))")
        for compare, sym in (("lt", "<"), ("ge", ">="), ("eq", "==")):
            add(f"setp.{compare}.{t}", "pred", both, f"{x} {sym} {y}", arch=arch)
        u, lanes = f"{t}x2", f"pair(raw({t}({{0}})), raw({t}({{1}})))"
        halves = [(f"float(low<{t}>({v}))", f"float(high<{t}>({v}))") for v in "abc"]
        for name, sym in (("add", "+"), ("sub", "-"), ("mul", "*")):
            parts = [f"{halves[0][i]} {sym} {halves[1][i]}" for i in (0, 1)]
            add(f"{name}.rn.{u}" if t == "f16" else f"{name}.{u}", u, f"{u} {u}",
                lanes.format(*parts), arch=arch)  # fmt: skip
        fused = "to_odd(std::fma({}, {}, double({})))"
        parts = [fused.format(*(half[i] for half in halves)) for i in (0, 1)]
        add(f"fma.rn.{u}", u, f"{u} {u} {u}", lanes.format(*parts), tame=True)
        for name, function in (("min", "least"), ("max", "most")):
            parts = [f"{function}({halves[0][i]}, {halves[1][i]})" for i in (0, 1)]
            add(f"{name}.{u}", u, f"{u} {u}", lanes.format(*parts))
        add(f"neg.{u}", u, u, "a ^ 0x80008000")
        add(f"abs.{u}", u, u, "a & 0x7fff7fff")

    integers = [f"{s}{n}" for s in "su" for n in (8, 16, 32, 64)]
    for to, source in itertools.permutations(integers, 2):
        add(f"cvt.{to}.{source}", to, source, "a")
        fits = int(to[1:]) - (to[0] == "s") >= int(source[1:]) - (source[0] == "s")
        if not fits or (to[0], source[0]) == ("u", "s"):
            add(f"cvt.sat.{to}.{source}", to, source, f"clamped<{to}>(a)")
    for to, source in itertools.product(("f32", "f64"), integers):
        add(f"cvt.rn.{to}.{source}", to, source, "a")
    add("cvt.rz.f32.s32", "f32", "s32", "towards_zero(double(a))")
    add("cvt.rn.f16.s32", "f16", "s32", "a", tame=True)
    add("cvt.rn.f16.u16", "f16", "u16", "float(a)", tame=True)
    add("cvt.rn.bf16.s32", "bf16", "s32", "bf16(float(a))", arch=90, tame=True)
    rounding = {
        "rni": "std::nearbyint",
        "rzi": "std::trunc",
        "rmi": "std::floor",
        "rpi": "std::ceil",
    }
    wide = ("s16", "u16", "s32", "u32", "s64", "u64")
    for source, to in itertools.product(("f32", "f64"), wide):
        for way in ("rni", "rzi", "rmi", "rpi") if to in ("s32", "u32") else ("rzi",):
            add(f"cvt.{way}.{to}.{source}", to, source, f"integer<{to}>({rounding[way]}(a))")
    add("cvt.rzi.s32.f16", "s32", "f16", "integer<s32>(float(a))")
    add("cvt.rni.u16.f16", "u16", "f16", "integer<u16>(std::nearbyint(float(a)))")
    for way, function in rounding.items():
        add(f"cvt.{way}.f32.f32", "f32", "f32", f"{function}(a)")
        add(f"cvt.{way}.f64.f64", "f64", "f64", f"{function}(a)")
    add("cvt.rni.ftz.f32.f32", "f32", "f32", "std::nearbyint(ftz(a))")
    add("cvt.sat.f32.f32", "f32", "f32", "saturated(a)")
    add("cvt.ftz.f32.f32", "f32", "f32", "ftz(a)")
    add("cvt.f64.f32", "f64", "f32", "double(a)")
    add("cvt.rn.f32.f64", "f32", "f64", "float(a)")
    add("cvt.rz.f32.f64", "f32", "f64", "towards_zero(a)", tame=True)
    add("cvt.f32.f16", "f32", "f16", "float(a)")
    add("cvt.f32.bf16", "f32", "bf16", "float(a)", arch=90)
    add("cvt.rn.f16.f32", "f16", "f32", "f16(a)")
    add("cvt.rn.bf16.f32", "bf16", "f32", "bf16(a)")
    add("cvt.rn.f16.f64", "f16", "f64", "f16(a)")
    add("cvt.rna.tf32.f32", "b32", "f32", "bits<u32>(tf32(a))", tame=True)
    for t in ("f16", "bf16"):  # the first operand is the upper half
        add(f"cvt.rn.{t}x2.f32", f"{t}x2", "f32 f32", f"pair(raw({t}(b)), raw({t}(a)))")
        relu = f"pair(raw({t}(b > 0 ? b : 0.0f)), raw({t}(a > 0 ? a : 0.0f)))"
        add(f"cvt.rn.relu.{t}x2.f32", f"{t}x2", "f32 f32", relu, tame=True)
    return ops


def floats(kind: str, tame: bool) -> list[float]:
    tame_values = [1.0, -1.0, 0.5, 1.5, -2.5, 3.0, 0.1, -0.3, 7.0, 100.0, -1000.0, 0.0078125, 1e-3]
    if kind in ("f32", "f64"):
        tame_values += [1e10, -1e-10, 3.1415927, 65535.0, 16777217.0]
    if tame:
        return tame_values
    least = {"f16": 2.0**-14, "bf16": 2.0**-126, "f32": 2.0**-126, "f64": 2.0**-1022}[kind]
    odd = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, least, -least, least / 4, -least / 8]
    odd += [2147483647.0, -2147483648.0, 4294967295.0, 9.3e18, -9.3e18, 2.5, 3.5, -0.5, 127.5]
    if kind == "f16":
        odd = [v for v in odd if not 65504 < abs(v) < torch.inf] + [65504.0, -65504.0, 2048.5]
    elif kind != "f64":
        odd += [3.4e38, -3.4e38, 88.7, 127.9, -126.5, -149.5]
    else:
        odd += [1.7e308, 1e-45, 3.5e38, 1.0 + 2.0**-25, 2147483647.5]
    return tame_values + odd


TORCH = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@functools.cache
def edges(kind: str, tame: bool) -> torch.Tensor:
    """Edge values of a type, as integers with its bits."""
    width = WIDTHS[kind]
    if kind in TORCH:
        return torch.tensor(floats(kind, tame), dtype=TORCH[kind]).view(RAW[width])
    if kind.endswith("x2"):
        halves = edges(kind[:-2], tame).view(torch.uint16).int()
        other = halves.roll(5)
        return (halves | other << 16).contiguous()
    bits = 8 * width
    values = [0, 1, 2, 3, 5, 7, 8, 31, 32, 33, 63, 64, 100, 255 % 2**bits, -1, -2, -3, -100]
    values += [2 ** (bits - 1) - 1, -(2 ** (bits - 1)), -(2 ** (bits - 1)) + 1, 0x5A]
    if bits > 8:
        values += [0x1234, -0x1234, 0x00FF, 0x7F80]
    if bits > 16:
        values += [0x12345678, -0x12345678, 65536, 0x7FFF8000]
    if bits > 32:
        values += [2**32, 2**32 - 1, -(2**32), 0x123456789ABCDEF]
    packed = b"".join((v % 2**bits).to_bytes(width, "little") for v in values)
    return torch.frombuffer(bytearray(packed), dtype=RAW[width])


def inputs(op: Op) -> tuple[torch.Tensor, ...]:
    """All pairs of edge values for up to two operands, a thousand random ones for more."""
    kinds = [edges(kind, op.tame) for kind in op.operands]
    if len(kinds) <= 2:
        grid = torch.meshgrid(*(torch.arange(len(k)) for k in kinds), indexing="ij")
        return tuple(k[g.flatten()].contiguous() for k, g in zip(kinds, grid))
    source = micro.generator(op.name)
    return tuple(k[torch.randint(len(k), (1000,), generator=source)].contiguous() for k in kinds)


def register(kind: str) -> tuple[str, str, str]:
    """(type of the register, load, store) for operands of a type."""
    width = WIDTHS[kind]
    if kind in ("s8", "u8"):
        return "b16", f"ld.global.{kind}", "st.global.u8"
    if kind in ("f32", "f64"):
        return kind, f"ld.global.{kind}", f"st.global.{kind}"
    return f"b{8 * width}", f"ld.global.b{8 * width}", f"st.global.b{8 * width}"


def ptx(op: Op) -> str:
    """d[i] = op(a[i], b[i], ...), one thread per element; the last parameter is their number."""
    names = ["a", "b", "c", "e"][: len(op.operands)]
    declared = ["d", *names]
    kinds = dict(zip(declared, (op.result, *op.operands)))
    registers = [f".reg .{register(kind)[0]} %{name};" for name, kind in kinds.items()]
    registers += [".reg .pred %p, %q, %z;", ".reg .b32 %i, %n, %r0;", ".reg .b64 %at, %o;"]
    text = [f"    {line}" for line in registers]
    text += ["    mov.u32 %i, %ctaid.x;", f"    mad.lo.u32 %i, %i, {micro.BLOCK}, %thread;"]
    text += [f"    ld.global.u32 %n, [%ptr{len(names) + 1}];", "    setp.ge.u32 %q, %i, %n;"]
    text += ["    @%q bra DONE;"]
    for index, name in enumerate(names):
        kind = kinds[name]
        text += [f"    mul.wide.u32 %o, %i, {WIDTHS[kind]};", f"    add.u64 %at, %ptr{index}, %o;"]
        text += [f"    {register(kind)[1]} %{name}, [%at];"]
    spelled = {name: f"%{name}" for name in kinds}
    if "{" in op.instruction:
        main, *setup = (
            part for part in op.instruction.format(**spelled).split(";") if part.strip()
        )
        if main.startswith(("div", "rem", "selp")):  # what follows prepares operands
            setup, main = [*setup, main], None
        statements = setup if main is None else [main, *setup]
    elif op.result == "pred":
        operands = ", ".join(f"%{name}" for name in names)
        statements = [f"{op.instruction} %p, {operands}", "selp.b32 %d, 1, 0, %p"]
    else:
        statements = [f"{op.instruction} " + ", ".join(spelled.values())]
    text += [f"    {statement.strip()};" for statement in statements]
    text += [f"    mul.wide.u32 %o, %i, {WIDTHS[op.result]};"]
    text += [f"    add.u64 %at, %ptr{len(names)}, %o;"]
    text += [f"    {register(op.result)[2]} [%at], %d;", "DONE:"]
    return micro.kernel("\n".join(text), len(names) + 2, op.arch)


@functools.cache
def reference() -> ctypes.CDLL:
    """The operations in C++, compiled: op<i>(a, b, c, e, d, n)."""
    text = [PRELUDE.read_text()]
    for index, op in enumerate(OPS):
        names = ["a", "b", "c", "e"]
        operands = [*op.operands, "u8", "u8", "u8"][:4]
        given = ", ".join(f"const {t}* {n}s" for t, n in zip(operands, names))
        loads = " ".join(f"{t} {n} = {n}s[i];" for t, n in zip(op.operands, names))
        text.append(
            f'extern "C" void op{index}({given}, {op.result}* ds, long n) {{\n'
            f"  for (long i = 0; i < n; i++) {{ {loads} ds[i] = {op.result}({op.cxx}); }}\n}}\n"
        )
    source = "".join(text)
    compiler = build.cxx()
    flags = ["-std=c++20", "-O1", "-w", "-fwrapv", "-ffp-contract=off", "-shared", "-fPIC"]
    key = build.digest(build.version(compiler), *flags, source)

    def make(folder):
        (folder / "ops.cpp").write_text(source)
        build.call([compiler, *flags, folder / "ops.cpp", "-o", folder / "ops.so"])

    return ctypes.CDLL(str(build.cached(f"alu-{key}", make) / "ops.so"))


def expected(index: int, *operands: torch.Tensor) -> torch.Tensor:
    """What C++ makes of the operands, with the bits of the result type."""
    op, count = OPS[index], len(operands[0])
    result = torch.zeros(count, dtype=RAW[WIDTHS[op.result]])
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in operands]
    pointers += [None] * (4 - len(pointers))
    getattr(reference(), f"op{index}")(
        *pointers, ctypes.c_void_p(result.data_ptr()), ctypes.c_long(count)
    )
    return typed(op, result)


def typed(op: Op, raw: torch.Tensor) -> torch.Tensor:
    """Results as numbers where they are floating point."""
    kind = op.result.removesuffix("x2")
    return raw.view(TORCH[kind]) if kind in TORCH else raw


def case(index: int) -> micro.Micro:
    op = OPS[index]
    operands = inputs(op)
    count = len(operands[0])
    size = torch.tensor([count], dtype=torch.int32)
    result = typed(op, torch.zeros(count, dtype=RAW[WIDTHS[op.result]]))
    return micro.Micro(
        op.name, ptx(op), operands, (result, size),
        lambda *given: (expected(index, *given), size),
        arch=op.arch, grid=-(-count // micro.BLOCK), block=micro.BLOCK,
        tolerance=op.error, elementwise=True,
    )  # fmt: skip


OPS = made()
