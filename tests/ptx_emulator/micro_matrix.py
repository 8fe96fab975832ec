"""mma, ldmatrix, stmatrix and wgmma, against matrix products and layouts written out in torch.

Fragments, shared memory images and descriptors are made here from the tables of the PTX
documentation, so that the kernels do nothing but load registers, run the instruction and store.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .micro import Micro, generator, kernel

SUM_ERROR = 1e-6  # of the largest element: the order in which a sum of products is rounded is open
LANES = torch.arange(32)
GROUP, WITHIN = LANES // 4, LANES % 4  # of the fragment tables


def random(name: str, *shape: int, dtype=torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(name)).to(dtype)


# -- pieces of kernels ----------------------------------------------------------------------------


def load_words(pointer: int, names: list[str], kind: str = "b32") -> str:
    """Words of each thread: names[i] = pointer[thread, i]."""
    lines = [f"mad.wide.u32 %at, %thread, {4 * len(names)}, %ptr{pointer};"]
    return "\n".join(lines + [f"ld.global.{kind} {n}, [%at+{4 * i}];" for i, n in enumerate(names)])


def store_words(pointer: int, names: list[str], kind: str = "b32") -> str:
    lines = [f"mad.wide.u32 %at, %thread, {4 * len(names)}, %ptr{pointer};"]
    return "\n".join(lines + [f"st.global.{kind} [%at+{4 * i}], {n};" for i, n in enumerate(names)])


def fill_shared(pointer: int, size: int, threads: int) -> str:
    """Shared memory = the first ``size`` bytes at a pointer; then a barrier."""
    return copy(pointer, size, threads, "global", "shared") + "\nbar.sync 0;"


def dump_shared(pointer: int, size: int, threads: int) -> str:
    return "bar.sync 0;\n" + copy(pointer, size, threads, "shared", "global")


def copy(pointer: int, size: int, threads: int, source: str, target: str) -> str:
    at = {"global": "%at", "shared": "%s"}
    lines = [f"mad.wide.u32 %at, %thread, 4, %ptr{pointer};", "mov.u32 %s, smem;"]
    lines += ["mad.lo.u32 %s, %thread, 4, %s;"]
    words = size // 4
    for first in range(0, words, threads):
        guard = ""
        if first + threads > words:
            lines.append(f"setp.lt.u32 %p, %thread, {words - first};")
            guard = "@%p "
        lines.append(f"{guard}ld.{source}.b32 %w, [{at[source]}+{4 * first}];")
        lines.append(f"{guard}st.{target}.b32 [{at[target]}+{4 * first}], %w;")
    return "\n".join(lines)


COMMON = ".reg .b64 %at; .reg .b32 %s, %w; .reg .pred %p;"


def braces(names) -> str:
    return "{" + ", ".join(names) + "}"


def words_of(values: Tensor) -> Tensor:
    """[..., n] of 16 or 32 bits as int32 words."""
    return values.contiguous().view(torch.int32)


# -- mma ------------------------------------------------------------------------------------------


def mma_indices(k: int, wide: bool):
    """Rows and columns of the A and B fragments: ([32, n] rows of A, columns, rows of B, columns).

    wide: 32-bit elements (tf32), one to a register; else two, in neighbouring columns.
    """
    group, within = GROUP[:, None], WITHIN[:, None]
    if wide:
        a_row = torch.cat([group, group + 8] * (k // 4), 1)
        a_col = torch.cat([within + 4 * (i // 2) for i in range(k // 2)], 1)
        b_row = torch.cat([within + 4 * i for i in range(k // 4)], 1)
        return a_row, a_col, b_row, group.expand_as(b_row)
    pair = torch.arange(2)[None]
    a_row = torch.cat([group.expand(32, 2), (group + 8).expand(32, 2)] * (k // 8), 1)
    a_col = torch.cat([2 * within + pair + 8 * (i // 2) for i in range(k // 4)], 1)
    b_row = torch.cat([2 * within + pair + 8 * i for i in range(k // 8)], 1)
    return a_row, a_col, b_row, group.expand_as(b_row)


def result_fragments(d: Tensor, rows: int = 16) -> Tensor:
    """[rows, N] as [threads, N / 2]: the accumulators of mma (16 rows) and wgmma (64)."""
    warps, n = rows // 16, d.shape[1]
    tiles = d.view(warps, 2, 8, n // 8, 4, 2)  # warp, half, group, column block, within, pair
    return tiles.permute(0, 2, 4, 3, 1, 5).reshape(32 * warps, n // 2).contiguous()


def mma(kind: str, k: int, accumulator: str = "f32") -> Micro:
    """d = a @ b + c with mma.m16n8k<k>."""
    name = f"mma.m16n8k{k}.{accumulator}.{kind}"
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}[kind]
    wide = kind == "tf32"
    a, b = random(name, 16, k, dtype=dtype), random(name + "b", k, 8, dtype=dtype)
    if wide:  # what the tensor core reads of a float32
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    own = torch.float32 if accumulator == "f32" else torch.float16
    c = result_fragments(random(name + "c", 16, 8, dtype=own))
    a_row, a_col, b_row, b_col = mma_indices(k, wide)
    given = (a[a_row, a_col].contiguous(), b[b_row, b_col].contiguous(), c)

    def expected(*_):
        return (result_fragments((a.double() @ b.double()).to(torch.float64)) + c.double()).to(own)

    counts = [words_of(t).shape[1] for t in given]
    regs = [[f"%{letter}{i}" for i in range(n)] for letter, n in zip("abc", counts)]
    word = "f32" if accumulator == "f32" else "b32"
    body = "\n".join(
        load_words(i, names, word if i == 2 else "b32") for i, names in enumerate(regs)
    )
    body += (
        f"\nmma.sync.aligned.m16n8k{k}.row.col.{accumulator}.{kind}.{kind}.{accumulator} "
        f"{', '.join(map(braces, (regs[2], *regs)))};\n"
    )
    body += store_words(3, regs[2], word)
    registers = f"{COMMON} .reg .b32 %a<4>, %b<2>; .reg .{word} %c<4>;"
    return Micro(
        name, kernel(body, 4, registers=registers), given, (torch.zeros_like(c),),
        lambda *g: (expected(*g),),
        tolerance=SUM_ERROR if accumulator == "f32" else 1e-3,
    )  # fmt: skip


# -- ldmatrix, stmatrix ---------------------------------------------------------------------------


def matrix_indices(count: int, transposed: bool):
    """(matrix, row, column) of the elements a lane holds, each [32, count, 2]."""
    matrix = torch.arange(count)[None, :, None].expand(32, count, 2)
    one = GROUP[:, None, None].expand(32, count, 2)
    two = (2 * WITHIN[:, None] + torch.arange(2)[None])[:, None].expand(32, count, 2)
    return (matrix, two, one) if transposed else (matrix, one, two)


def row_order(name: str, count: int) -> Tensor:
    """For each lane the 16-byte row of shared memory it names; int32 [32]."""
    order = torch.randperm(8 * count, generator=generator(name))
    return order.repeat(4 // count).to(torch.int32)


def ldmatrix(count: int, transposed: bool) -> Micro:
    name = f"ldmatrix.x{count}{'.trans' if transposed else ''}"
    size = 128 * count
    image = torch.randint(0, 2**15, (8 * count, 8), generator=generator(name)).to(torch.int16)
    order = row_order(name, count)

    def expected(image, order):
        matrices = image[order[: 8 * count].long()].view(count, 8, 8)
        return (words_of(matrices[matrix_indices(count, transposed)])[..., 0],)

    names = [f"%d{i}" for i in range(count)]
    suffix = ".trans" if transposed else ""
    body = fill_shared(0, size, 32) + "\n" + load_words(1, ["%row"])
    body += f"""
    mov.u32 %s, smem;
    mad.lo.u32 %s, %row, 16, %s;
    ldmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 {braces(names)}, [%s];
    """
    body += store_words(2, names)
    text = kernel(body, 3, registers=f"{COMMON} .reg .b32 %d<4>, %row;")
    out = torch.zeros(32, count, dtype=torch.int32)
    return Micro(name, text, (image, order), (out,), expected, shared=size)


def stmatrix(count: int, transposed: bool) -> Micro:
    name = f"stmatrix.x{count}{'.trans' if transposed else ''}"
    size = 128 * count
    words = torch.randint(0, 2**31, (32, count), generator=generator(name)).to(torch.int32)
    order = row_order(name, count)

    def expected(words, order):
        halves = words.view(torch.int16).view(32, count, 2)
        matrices = torch.zeros(count, 8, 8, dtype=torch.int16)
        matrices[matrix_indices(count, transposed)] = halves
        image = torch.zeros(8 * count, 8, dtype=torch.int16)
        image[order[: 8 * count].long()] = matrices.view(8 * count, 8)
        return (image,)

    names = [f"%d{i}" for i in range(count)]
    suffix = ".trans" if transposed else ""
    body = load_words(0, names) + "\n" + load_words(1, ["%row"])
    body += f"""
    mov.u32 %s, smem;
    mad.lo.u32 %s, %row, 16, %s;
    stmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 [%s], {braces(names)};
    """
    body += dump_shared(2, size, 32)
    text = kernel(body, 3, 90, registers=f"{COMMON} .reg .b32 %d<4>, %row;")
    out = torch.zeros(8 * count, 8, dtype=torch.int16)
    return Micro(name, text, (words, order), (out,), expected, arch=90, shared=size)


# -- wgmma ----------------------------------------------------------------------------------------

MODES = {0: 0, 128: 1, 64: 2, 32: 3}  # bits 62 and 63 of a descriptor


def swizzled(address: Tensor, span: int) -> Tensor:
    """Byte addresses with their 16-byte chunks permuted in rows of ``span`` bytes."""
    masks = {0: 0, 32: 0x10, 64: 0x30, 128: 0x70}
    return address ^ (address >> 3 & masks[span])


def offsets(shape: tuple[int, int], size: int, span: int, mn_major: bool):
    """Byte offsets of elements (mn, k) before swizzling, and (leading, stride) byte offsets."""
    mn, k = (torch.arange(n) for n in shape)
    mn, k = mn[:, None], k[None]
    per = 16 // size  # elements of a 16-byte row of a core matrix
    if not mn_major:
        if span:
            stride = 8 * span
            return mn // 8 * stride + mn % 8 * span + k * size, (16, stride)
        leading, stride = 128, 128 * (shape[1] // per)
        at = mn // 8 * stride + mn % 8 * 16 + k // per * leading + k % per * size
        return at, (leading, stride)
    if span:
        across = span // size
        stride, leading = 8 * span, span * shape[1]
        at = mn // across * leading + mn % across * size + k // 8 * stride + k % 8 * span
        return at, (leading, stride)
    stride, leading = 128 * (shape[1] // 8), 128
    at = mn // 8 * stride + mn % 8 * size + k // 8 * leading + k % 8 * 16
    return at, (leading, stride)


def image_of(matrix: Tensor, span: int, mn_major: bool) -> tuple[Tensor, int, int]:
    """A matrix [mn, k] as shared memory (bytes from a multiple of 1024), and a descriptor without
    its address."""
    size = matrix.element_size()
    at, (leading, stride) = offsets(tuple(matrix.shape), size, span, mn_major)
    at = swizzled(at, span)
    room = torch.zeros((int(at.max()) + size + 1023) // 1024 * 1024 // size, dtype=matrix.dtype)
    room[at // size] = matrix
    return room.view(torch.uint8), leading >> 4 << 16 | stride >> 4 << 32 | MODES[span] << 62


def wgmma(
    n: int, kind: str = "bf16", span: int = 128, a_major: str = "k", b_major: str = "k",
    from_registers: bool = False, accumulator: str = "f32",
) -> Micro:  # fmt: skip
    """d = a @ b in steps of one instruction, a [64, k] and b [k, n].

    a_major, b_major: which dimension of a and b is contiguous in shared memory, "k" or "mn".
    """
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}[kind]
    size = dtype.itemsize
    step = 32 // size  # k of one instruction
    k_major = a_major == b_major == "k"
    k = max(step, span // size) if k_major else step
    form = "rs" if from_registers else "ss"
    name = f"wgmma.{form}.m64n{n}k{k}.{accumulator}.{kind}.swizzle{span}.a-{a_major}.b-{b_major}"
    a, b = random(name, 64, k, dtype=dtype), random(name + "b", n, k, dtype=dtype)
    if kind == "tf32":
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    a_image, a_high = image_of(a, span, a_major == "mn")
    b_image, b_high = image_of(b, span, b_major == "mn")
    images = b_image if from_registers else torch.cat([a_image, b_image])
    own = torch.float32 if accumulator == "f32" else torch.float16

    def expected(*_):
        return (result_fragments((a.double() @ b.double().T), 64).to(own),)

    count = n // 2 if accumulator == "f32" else n // 4
    d = [f"%d{i}" for i in range(count)]
    word = "f32" if accumulator == "f32" else "b32"
    zero = "0f00000000" if accumulator == "f32" else "0"
    start = 0 if from_registers else len(a_image)
    body = fill_shared(0, len(images), 128) + "\nfence.proxy.async.shared::cta;\nbar.sync 0;\n"
    body += "mov.u32 %s, smem; shr.u32 %s, %s, 4; cvt.u64.u32 %base, %s;\n"
    body += f"or.b64 %desc0, %base, {a_high:#x};\n"
    body += f"or.b64 %desc1, %base, {b_high:#x}; add.u64 %desc1, %desc1, {start // 16};\n"
    steps = k // step
    fragments, regs = None, []
    if from_registers:
        rows = torch.cat([a[16 * w : 16 * w + 16][None] for w in range(4)])  # [4, 16, k]
        a_row, a_col, _, _ = mma_indices(step, kind == "tf32")
        parts = [
            torch.cat([words_of(rows[w][a_row, a_col + step * i]) for i in range(steps)], 1)
            for w in range(4)
        ]
        fragments = torch.cat(parts)  # [128, 4 * steps]
        regs = [f"%a{i}" for i in range(4 * steps)]
        body += load_words(1, regs) + "\n"
    body += "\n".join(f"mov.{word} {name}, {zero};" for name in d)
    body += "\nsetp.eq.u32 %no, %thread, 9999;\nsetp.ne.u32 %yes, %thread, 9999;\n"
    body += "wgmma.fence.sync.aligned;\n"
    for i in range(steps):
        source = braces(regs[4 * i : 4 * i + 4]) if from_registers else "%desc0"
        # tf32 has no transposes; A in registers has none of its own
        majors = [a_major == "mn", b_major == "mn"][from_registers:] if kind != "tf32" else []
        flags = "".join(f", {int(m)}" for m in majors)
        body += (
            f"wgmma.mma_async.sync.aligned.m64n{n}k{step}.{accumulator}.{kind}.{kind} {braces(d)}, "
            f"{source}, %desc1, {'%yes' if i else '%no'}, 1, 1{flags};\n"
        )
        body += "add.u64 %desc0, %desc0, 2; add.u64 %desc1, %desc1, 2;\n"  # 32 bytes of k
    body += "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
    pointers = 3 if from_registers else 2
    body += store_words(pointers - 1, d, word)
    registers = f"{COMMON} .reg .{word} %d<{count}>; .reg .b32 %a<{max(1, len(regs))}>;"
    registers += " .reg .b64 %base, %desc<2>; .reg .pred %yes, %no;"
    text = kernel(body, pointers, 90, registers=registers)
    given = (images,) if fragments is None else (images, fragments)
    out = torch.zeros(128, n // 2, dtype=own)
    return Micro(
        name, text, given, (out,), expected, arch=90, block=128, shared=len(images),
        tolerance=SUM_ERROR if accumulator == "f32" else 2e-3,
    )  # fmt: skip


@functools.cache
def cases() -> list[Micro]:
    made = [mma("f16", 16), mma("f16", 8), mma("f16", 16, "f16"), mma("f16", 8, "f16")]
    made += [mma("bf16", 16), mma("bf16", 8), mma("tf32", 8), mma("tf32", 4)]
    for count in (1, 2, 4):
        for transposed in (False, True):
            made += [ldmatrix(count, transposed), stmatrix(count, transposed)]
    made += [wgmma(n) for n in range(8, 257, 8)]
    for kind in ("f16", "bf16"):
        for span in (0, 32, 64, 128):
            made += [
                wgmma(n, kind, span, a_major, b_major)
                for n, a_major, b_major in (
                    (64, "k", "k"), (96, "k", "mn"), (128, "mn", "k"), (64, "mn", "mn"),
                )
                if (n, kind, span, a_major) != (64, "bf16", 128, "k")
            ]  # fmt: skip
            made += [wgmma(n, kind, span, b_major=m, from_registers=True) for n, m in
                     ((64, "k"), (128, "mn"), (256, "mn"))]  # fmt: skip
    made += [wgmma(n, "f16", accumulator="f16") for n in (8, 64, 256)]
    made += [
        wgmma(n, "f16", b_major="mn", from_registers=True, accumulator="f16") for n in (32, 64)
    ]
    made += [wgmma(n, "tf32", span) for n, span in ((8, 128), (64, 32), (128, 0), (256, 64))]
    made += [wgmma(64, "tf32", from_registers=True)]
    return made
