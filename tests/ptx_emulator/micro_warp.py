"""What the lanes of a warp do together: shfl, vote, match, redux, elect, activemask."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .micro import Micro, generator, kernel

LANES = torch.arange(32)
REGISTERS = ".reg .b64 %at; .reg .b32 %v, %w, %d, %o; .reg .pred %p, %q;"
LOAD = "mad.wide.u32 %at, %thread, 4, %ptr0;\nld.global.b32 %v, [%at];\n"
STORE = "mad.wide.u32 %at, %thread, 8, %ptr1;\nst.global.v2.b32 [%at], {%d, %o};\n"


def values(name: str, most: int = 2**31 - 1) -> Tensor:
    return torch.randint(0, most, (32,), generator=generator(name)).to(torch.int32)


def case(name: str, body: str, given: Tensor, expected, arch: int = 80) -> Micro:
    """The kernel gets %v of its lane and leaves %d and %o."""
    text = kernel(LOAD + body + STORE, 2, arch, registers=REGISTERS)
    out = torch.zeros(32, 2, dtype=torch.int32)

    def both(given):
        d, o = expected(given)
        return (torch.stack([d, o], 1).to(torch.int32),)

    return Micro(name, text, (given,), (out,), both, arch=arch)


def shuffle(mode: str, b: int, c: int) -> Micro:
    """d = the value of another lane, o = whether there is one in the segment that c describes."""
    segment, clamp = c >> 8 & 31, c & 31

    def expected(given):
        least, most = LANES & segment, LANES & segment | clamp & ~segment
        lane = {
            "up": LANES - (b & 31),
            "down": LANES + (b & 31),
            "bfly": LANES ^ (b & 31),
            "idx": least | (b & 31) & ~segment,
        }[mode]
        there = lane >= most if mode == "up" else lane <= most
        return given[torch.where(there, lane, LANES)], there.int()

    body = f"shfl.sync.{mode}.b32 %d|%p, %v, {b}, {c}, 0xffffffff;\nselp.b32 %o, 1, 0, %p;\n"
    return case(f"shfl.{mode} {b} {c:#x}", body, values(f"{mode}{b}{c}"), expected)


def vote(mode: str, below: int) -> Micro:
    """On the predicate: value < below."""

    def expected(given):
        bits = sum(1 << i for i, v in enumerate(given.tolist()) if v < below)
        full = 0xFFFFFFFF
        result = {"ballot": bits, "any": bits != 0, "all": bits == full, "uni": bits in (0, full)}
        word = int(result[mode])
        d = torch.full((32,), word - (1 << 32) if word >> 31 else word)
        return d, torch.zeros_like(d)

    given = values(f"vote{below}", 100)
    body = f"setp.lt.u32 %p, %v, {below};\n"
    if mode == "ballot":
        body += "vote.sync.ballot.b32 %d, %p, 0xffffffff;\n"
    else:
        body += f"vote.sync.{mode}.pred %q, %p, 0xffffffff;\nselp.b32 %d, 1, 0, %q;\n"
    return case(f"vote.{mode} {below}", body + "mov.b32 %o, 0;\n", given, expected)


def match(mode: str, most: int) -> Micro:
    given = values(f"match{most}", most)

    def expected(given):
        same = given[:, None] == given[None]
        masks = (same.long() << LANES).sum(1)
        if mode == "all":
            masks = torch.where(same.all(), masks, 0)
        return (masks - (masks >> 31 << 32)), torch.full((32,), int(same.all()))

    target = "%d|%p" if mode == "all" else "%d"
    body = f"match.{mode}.sync.b32 {target}, %v, 0xffffffff;\n"
    body += "selp.b32 %o, 1, 0, %p;\n" if mode == "all" else f"mov.b32 %o, {int(most == 1)};\n"
    return case(f"match.{mode} {most}", body, given, expected)


def redux(operation: str, kind: str) -> Micro:
    given = values(f"redux{operation}{kind}")
    if operation != "add":
        given[3] = -5

    def expected(given):
        total = 0 if operation in ("add", "or", "xor") else None
        for v in given.tolist():
            v = v if kind == "s32" else v % 2**32
            total = v if total is None else {
                "add": total + v, "and": total & v, "or": total | v, "xor": total ^ v,
                "min": min(total, v), "max": max(total, v),
            }[operation]  # fmt: skip
        word = total % 2**32
        d = torch.full((32,), word - (1 << 32) if word >> 31 else word)
        return d, torch.zeros_like(d)

    body = f"redux.sync.{operation}.{kind} %d, %v, 0xffffffff;\nmov.b32 %o, 0;\n"
    return case(f"redux.{operation}.{kind}", body, given, expected)


def elect() -> Micro:
    """Which lane is elected is open: exactly one, and all are told the same one."""

    def expected(given):
        return torch.ones(32).int(), torch.ones(32).int()

    body = """
    elect.sync %w|%p, 0xffffffff;
    vote.sync.ballot.b32 %d, %p, 0xffffffff;
    popc.b32 %o, %d;
    brev.b32 %d, %d;
    bfind.shiftamt.u32 %d, %d;
    setp.eq.u32 %q, %d, %w;
    selp.b32 %d, 1, 0, %q;
    """
    return case("elect", body, values("elect"), expected, arch=90)


def partial() -> list[Micro]:
    """Half of the lanes, inside a branch."""
    enter = "setp.ge.u32 %q, %thread, 16;\nmov.b32 %d, 77;\nmov.b32 %o, 0;\n@%q bra SKIP;\n"
    odd = LANES < 16

    def masked(name, body, inside):
        def expected(given):
            return torch.where(odd, inside(given), 77), torch.zeros(32).int()

        return case(f"{name} half a warp", enter + body + "SKIP:\n", values(name), expected)

    return [
        masked("activemask", "activemask.b32 %d;\n", lambda given: torch.tensor(0xFFFF)),
        masked(
            "shfl.bfly", "shfl.sync.bfly.b32 %d, %v, 1, 0x1f, 0xffff;\n",
            lambda given: given[LANES ^ 1],
        ),
        masked(
            "redux.max", "redux.sync.max.u32 %d, %v, 0xffff;\n", lambda given: given[:16].max()
        ),
        masked(
            "vote.ballot", "setp.eq.u32 %p, %thread, 3;\nvote.sync.ballot.b32 %d, %p, 0xffff;\n",
            lambda given: torch.tensor(8),
        ),
    ]  # fmt: skip


def cases() -> list[Micro]:
    made = []
    for mode, b in itertools.product(("up", "down", "bfly", "idx"), (0, 1, 5, 16, 31)):
        made.append(shuffle(mode, b, 0 if mode == "up" else 31))
        made.append(shuffle(mode, b, 0x1800 | (0 if mode == "up" else 31)))  # segments of 8
    made += [vote(mode, n) for mode in ("ballot", "any", "all", "uni") for n in (0, 50, 100)]
    made += [match(mode, most) for mode in ("any", "all") for most in (1, 4)]
    made += [redux(op, kind) for op in ("add", "min", "max") for kind in ("u32", "s32")]
    made += [redux(op, "b32") for op in ("and", "or", "xor")]
    return [*made, elect(), *partial()]
