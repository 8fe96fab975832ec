"""Copies and atomics: cp.async, bulk copies, TMA in 1 to 5 dimensions, atom and red."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from .micro import Map, Micro, generator, kernel
from .micro_matrix import COMMON, dump_shared, fill_shared, swizzled

BARRIER = 65536  # where in shared memory the mbarrier is
FENCE = "fence.proxy.async.shared::cta;\nbar.sync 0;\n"


def integers(name: str, *shape: int, dtype=torch.int32) -> Tensor:
    values = torch.randint(0, 2**31 - 1, shape, generator=generator(name))
    return values.to(dtype) if not dtype.is_floating_point else (values % 1000 - 500).to(dtype)


# -- cp.async -------------------------------------------------------------------------------------


def cp_async(size: int, cache: str, valid: int | None = None) -> Micro:
    """Each of 32 threads copies ``size`` bytes, or the first ``valid`` of them and zeros."""
    name = f"cp.async.{cache}.{size}" + ("" if valid is None else f" of {valid}")
    source = integers(name, 32 * size // 4)
    given = "" if valid is None else f", {valid}"
    body = f"""
    mad.wide.u32 %at, %thread, {size}, %ptr0;
    mov.u32 %s, smem;
    mad.lo.u32 %s, %thread, {size}, %s;
    cp.async.{cache}.shared.global [%s], [%at], {size}{given};
    cp.async.commit_group;
    cp.async.wait_group 0;
    """
    body += dump_shared(1, 32 * size, 32)

    def expected(source):
        pieces = source.view(torch.uint8).view(32, size).clone()
        if valid is not None:
            pieces[:, valid:] = 0
        return (pieces.flatten().view(torch.int32),)

    text = kernel(body, 2, registers=COMMON)
    out = torch.full_like(source, -1)
    return Micro(name, text, (source,), (out,), expected, shared=32 * size)


# -- what copies through the async proxy need -----------------------------------------------------


def initialised(size: int) -> str:
    """An mbarrier for one arrival, made by thread 0, which then expects ``size`` bytes."""
    return f"""
    mov.u32 %bar, smem;
    add.u32 %bar, %bar, {BARRIER};
    setp.eq.u32 %first, %thread, 0;
    @%first mbarrier.init.shared::cta.b64 [%bar], 1;
    @%first fence.proxy.async.shared::cta;
    bar.sync 0;
    @%first mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {size};
    """


WAIT = """
AGAIN:
mbarrier.try_wait.parity.shared::cta.b64 %done, [%bar], 0;
@%done bra DONE;
bra AGAIN;
DONE:
"""
WAIT_STORES = """
@%first cp.async.bulk.commit_group;
@%first cp.async.bulk.wait_group 0;
"""
ASYNC = COMMON + " .reg .b32 %bar; .reg .pred %first, %done; .reg .b64 %map;"


def coordinates(start) -> str:
    """{x, y, ...}: the innermost dimension comes first."""
    return "{" + ", ".join(str(c) for c in reversed(start)) + "}"


def tile_bytes(tile: Tensor, swizzle: int) -> Tensor:
    """A tile as TMA lays it out in shared memory."""
    flat = tile.contiguous().flatten().view(torch.uint8)
    out = torch.zeros_like(flat)
    out[swizzled(torch.arange(len(flat)), swizzle)] = flat
    return out


def inside(shape, start, box):
    """(slices of the tensor, slices of the box) where the two overlap."""
    first = [max(0, s) for s in start]
    last = [min(n, s + b) for n, s, b in zip(shape, start, box)]
    tensor = tuple(slice(f, max(f, end)) for f, end in zip(first, last))
    tile = tuple(slice(f - s, max(f, end) - s) for f, end, s in zip(first, last, start))
    return tensor, tile


def tma_load(dtype: torch.dtype, shape, box, start, swizzle: int) -> Micro:
    """A box of a tensor into shared memory; zeros where it is outside."""
    rank, size = len(shape), math.prod(box) * dtype.itemsize
    name = f"tma.load.{rank}d {str(dtype)[6:]} swizzle{swizzle} {tuple(box)} at {tuple(start)}"
    source = integers(name, *shape, dtype=dtype)
    operation = f"cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile"
    operation += ".mbarrier::complete_tx::bytes"
    body = initialised(size) + f"""
    mov.u32 %s, smem;
    mov.u64 %map, map0;
    cvta.param.u64 %map, %map;
    @%first {operation} [%s], [%map, {coordinates(start)}], [%bar];
    """ + WAIT + dump_shared(1, size, 32)  # fmt: skip

    def expected(source):
        tile = torch.zeros(box, dtype=dtype)
        there, here = inside(shape, start, box)
        tile[here] = source[there]
        return (tile_bytes(tile, swizzle).view(torch.int32),)

    out = torch.full((size // 4,), -1, dtype=torch.int32)
    return Micro(
        name, kernel(body, 2, 90, 1, ASYNC), (source,), (out,), expected,
        arch=90, shared=BARRIER + 8, maps=(Map(0, tuple(box), swizzle),),
    )  # fmt: skip


def tma_store(dtype: torch.dtype, shape, box, start, swizzle: int, reduce: str = "") -> Micro:
    """A box from shared memory into a tensor, or added to it; what is outside is left out."""
    rank, size = len(shape), math.prod(box) * dtype.itemsize
    operation = f"cp.reduce.async.bulk.tensor.{rank}d.global.shared::cta.{reduce}.tile.bulk_group"
    if not reduce:
        operation = f"cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group"
    what = f"{reduce or 'store'}.{rank}d {str(dtype)[6:]}"
    name = f"tma.{what} swizzle{swizzle} {tuple(box)} at {tuple(start)}"
    tile = integers(name, *box, dtype=dtype)
    before = integers(name + "before", *shape, dtype=dtype)
    body = fill_shared(0, size, 32) + "\n" + FENCE + f"""
    setp.eq.u32 %first, %thread, 0;
    mov.u32 %s, smem;
    mov.u64 %map, map0;
    cvta.param.u64 %map, %map;
    @%first {operation} [%map, {coordinates(start)}], [%s];
    """ + WAIT_STORES  # fmt: skip

    def expected(image):
        flat = image.view(torch.uint8)[swizzled(torch.arange(size), swizzle)]
        given = flat.view(dtype).view(box)
        there, here = inside(shape, start, box)
        after = before.clone()
        combine = {"": lambda x, y: y, "add": torch.add, "min": torch.minimum, "max": torch.maximum}
        after[there] = combine[reduce](before[there], given[here])
        return (after,)

    return Micro(
        name, kernel(body, 2, 90, 1, ASYNC), (tile_bytes(tile, swizzle),), (before,), expected,
        arch=90, shared=size, maps=(Map(1, tuple(box), swizzle),),
    )  # fmt: skip


def bulk_load(size: int) -> Micro:
    source = integers("bulk.load", size // 4)
    operation = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    body = initialised(size) + f"""
    mov.u32 %s, smem;
    @%first {operation} [%s], [%ptr0], {size}, [%bar];
    """ + WAIT + dump_shared(1, size, 32)  # fmt: skip
    return Micro(
        f"cp.async.bulk.load {size}", kernel(body, 2, 90, registers=ASYNC), (source,),
        (torch.zeros_like(source),), lambda source: (source,), arch=90, shared=BARRIER + 8,
    )  # fmt: skip


def bulk_store(size: int, dtype=torch.int32, reduce: str = "") -> Micro:
    name = f"cp.async.bulk.store {size}" if not reduce else f"cp.reduce.async.bulk.{reduce} {dtype}"
    source = integers(name, size // dtype.itemsize, dtype=dtype)
    before = integers(name + "before", size // dtype.itemsize, dtype=dtype)
    kind = {torch.int32: "s32", torch.float32: "f32", torch.float16: "noftz.f16"}[dtype]
    operation = f"cp.reduce.async.bulk.global.shared::cta.bulk_group.{reduce}.{kind}"
    if not reduce:
        operation = "cp.async.bulk.global.shared::cta.bulk_group"
    body = fill_shared(0, size, 32) + "\n" + FENCE + f"""
    setp.eq.u32 %first, %thread, 0;
    mov.u32 %s, smem;
    @%first {operation} [%ptr1], [%s], {size};
    """ + WAIT_STORES  # fmt: skip
    return Micro(
        name, kernel(body, 2, 90, registers=ASYNC), (source,), (before,),
        lambda source: (before + source if reduce else source,), arch=90, shared=size,
    )  # fmt: skip


# -- atomics --------------------------------------------------------------------------------------


def atomic(operation: str, kind: str, shared: bool = False) -> Micro:
    """All 32 threads on one address: the result does not depend on their order."""
    space = "shared" if shared else "global"
    name = f"atom.{space}.{operation}.{kind}"
    dtype = {"u32": torch.int32, "s32": torch.int32, "b32": torch.int32, "u64": torch.int64,
             "s64": torch.int64, "b64": torch.int64, "f32": torch.float32,
             "f64": torch.float64}[kind]  # fmt: skip
    signed = kind[0] == "s"
    values = integers(name, 32, dtype=dtype) % 1000
    if signed:
        values -= 500
    before = torch.tensor([7], dtype=dtype)
    width, word = dtype.itemsize, f"b{8 * dtype.itemsize}"
    kind_of_register = kind if kind[0] == "f" else word
    target = "[%s]" if shared else "[%ptr1]"
    body = f"""
    mov.u32 %s, smem;
    setp.eq.u32 %p, %thread, 0;
    @%p ld.global.{word} %v, [%ptr1];
    @%p st.shared.{word} [%s], %v;
    bar.sync 0;
    mad.wide.u32 %at, %thread, {width}, %ptr0;
    ld.global.{word} %v, [%at];
    atom.{space}.{operation}.{kind} %old, {target}, %v;
    bar.sync 0;
    """
    if shared:
        body += f"@%p ld.shared.{word} %v, [%s];\n@%p st.global.{word} [%ptr1], %v;\n"

    def expected(values):
        every = torch.cat([before, values])
        if operation in ("and", "or", "xor"):
            total = every[0].item()
            for value in values.tolist():
                total = {"and": total & value, "or": total | value, "xor": total ^ value}[operation]
            return (torch.tensor([total], dtype=dtype),)
        reduce = {"add": torch.sum, "min": torch.amin, "max": torch.amax}[operation]
        return (reduce(every).to(dtype).view(1),)

    registers = f".reg .{kind_of_register} %v, %old; .reg .b64 %at; .reg .b32 %s; .reg .pred %p;"
    text = kernel(body, 2, registers=registers)
    return Micro(name, text, (values,), (before,), expected, shared=16)


def exchanges() -> list[Micro]:
    """Threads on addresses of their own: what comes back and what is left behind."""
    made = []
    for operation, kind in itertools.product(("exch", "cas", "inc", "dec"), ("b32", "b64")):
        if operation in ("inc", "dec"):
            if kind == "b64":
                continue
            kind = "u32"
        dtype = torch.int64 if kind == "b64" else torch.int32
        name = f"atom.global.{operation}.{kind}"
        before, given = (
            integers(name, 32, dtype=dtype) % 4,
            integers(name + "g", 32, dtype=dtype) % 4,
        )
        width, word = dtype.itemsize, f"b{8 * dtype.itemsize}"
        operands = "%v, 9" if operation == "cas" else "%v"
        body = "\n".join(
            f"mad.wide.u32 %at{i}, %thread, {width}, %ptr{i};" for i in range(3)
        ) + f"""
        ld.global.{word} %v, [%at0];
        atom.global.{operation}.{kind} %old, [%at1], {operands};
        st.global.{word} [%at2], %old;
        """  # fmt: skip

        def expected(given, operation=operation, before=before):
            after = {
                "exch": given,
                "cas": torch.where(before == given, 9, before),
                "inc": torch.where(before >= given, 0, before + 1),
                "dec": torch.where((before == 0) | (before > given), given, before - 1),
            }[operation]
            return after.to(before.dtype), before

        text = kernel(body, 3, registers=f".reg .{word} %v, %old; .reg .b64 %at<3>;")
        made.append(Micro(name, text, (given,), (before, torch.zeros_like(before)), expected))
    return made


def red_pair(kind: str) -> Micro:
    """red.global.add of two halves at once."""
    dtype = torch.float16 if kind == "f16x2" else torch.bfloat16
    values = (integers(kind, 64, dtype=torch.int32) % 16).to(dtype)
    before = torch.tensor([3.0, -5.0] * 32, dtype=dtype)
    body = f"""
    mad.wide.u32 %at, %thread, 4, %ptr0;
    ld.global.b32 %v, [%at];
    mad.wide.u32 %at, %thread, 4, %ptr1;
    red.global.add.noftz.{kind} [%at], %v;
    """
    text = kernel(body, 2, 90, registers=".reg .b32 %v; .reg .b64 %at;")
    return Micro(
        f"red.global.add.{kind}", text, (values,), (before,), lambda v: (before + v,), arch=90
    )


def red_vector(count: int) -> Micro:
    """red.global.add.v2/v4.f32: neighbouring elements in one instruction."""
    values = integers("vector", 32 * count, dtype=torch.float32)
    before = torch.ones(32 * count)
    names = ", ".join(f"%v{i}" for i in range(count))
    body = f"""
    mad.wide.u32 %at, %thread, {4 * count}, %ptr0;
    ld.global.v{count}.f32 {{{names}}}, [%at];
    mad.wide.u32 %at, %thread, {4 * count}, %ptr1;
    red.global.v{count}.f32.add [%at], {{{names}}};
    """
    text = kernel(body, 2, 90, registers=f".reg .f32 %v<{count}>; .reg .b64 %at;")
    return Micro(
        f"red.global.add.v{count}.f32", text, (values,), (before,), lambda v: (before + v,), arch=90
    )


def cases() -> list[Micro]:
    made = [cp_async(4, "ca"), cp_async(8, "ca"), cp_async(16, "ca"), cp_async(16, "cg")]
    made += [cp_async(16, "cg", valid) for valid in (0, 4, 12)] + [cp_async(4, "ca", 2)]
    made += [bulk_load(16), bulk_load(4096), bulk_store(16), bulk_store(4096)]
    made += [bulk_store(512, torch.float32, "add"), bulk_store(512, torch.int32, "add")]
    made += [bulk_store(512, torch.float16, "add")]
    half = torch.float16
    for swizzle, inner in ((0, 8), (0, 24), (32, 16), (64, 32), (128, 64)):
        made.append(tma_load(half, (37, 72), (16, inner), (8, 8), swizzle))
        made.append(tma_load(half, (37, 72), (16, inner), (30, 40), swizzle))  # past the ends
        made.append(tma_load(half, (37, 72), (16, inner), (-3, -8), swizzle))
        made.append(tma_store(half, (37, 72), (16, inner), (8, 8), swizzle))
        made.append(tma_store(half, (37, 72), (16, inner), (30, 40), swizzle))
    made.append(tma_load(torch.float32, (300,), (64,), (100,), 0))
    made.append(tma_load(torch.float32, (300,), (64,), (280,), 0))
    made.append(tma_store(torch.float32, (300,), (64,), (280,), 0))
    shapes = {3: (5, 6, 64), 4: (3, 4, 5, 64), 5: (2, 3, 4, 5, 64)}
    boxes = {3: (2, 4, 64), 4: (2, 2, 3, 64), 5: (2, 1, 2, 3, 64)}
    starts = {3: (1, 3, 0), 4: (2, 1, 3, 0), 5: (1, 2, -1, 2, 0)}
    for rank, swizzle in itertools.product((3, 4, 5), (0, 128)):
        made.append(tma_load(half, shapes[rank], boxes[rank], starts[rank], swizzle))
        made.append(tma_store(half, shapes[rank], boxes[rank], starts[rank], swizzle))
    made.append(tma_load(torch.uint8, (20, 256), (8, 128), (4, 128), 128))
    made.append(tma_load(torch.int32, (20, 64), (8, 32), (4, 16), 128))
    made.append(tma_load(torch.float64, (20, 32), (8, 16), (4, 10), 128))
    made.append(tma_load(torch.bfloat16, (20, 64), (8, 32), (4, 16), 64))
    for reduce, dtype in (("add", torch.float32), ("add", torch.bfloat16), ("add", torch.int32),
                          ("min", torch.int32), ("max", torch.int32)):  # fmt: skip
        inner = 128 // dtype.itemsize
        made.append(tma_store(dtype, (20, 2 * inner), (8, inner), (16, 0), 128, reduce))
    for operation in ("add", "min", "max", "and", "or", "xor"):
        kinds = ("b32", "b64") if operation in ("and", "or", "xor") else ("u32", "s32", "u64")
        for kind, shared in itertools.product(kinds, (False, True)):
            if (operation, kind) != ("add", "s64"):
                made.append(atomic(operation, kind, shared))
    made += [atomic("add", kind, shared) for kind in ("f32", "f64") for shared in (False, True)]
    made += [red_pair("f16x2"), red_pair("bf16x2"), red_vector(2), red_vector(4)]
    made += exchanges()
    return made
