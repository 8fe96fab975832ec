"""Code that Triton makes of matrix products, in the emulator: its compiler is proven on hardware,
so right results say that fragments, descriptors, swizzles and barrier phases are read as GPUs do.
The project's own kernels are in test_emulator_triton.py."""

import pytest
import torch
from ptx_emulator import Config

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from ptx_emulator import triton_driver  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

pytestmark = pytest.mark.compiled
SCHEDULES = [Config(), Config(seed=1, asynchronous="random"), Config(seed=2, asynchronous="early")]


@triton.jit
def gemm_kernel(
    a, b, c, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """c [M, N] = a [M, K] @ b [K, N], by pointers."""
    rows, cols = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    for first in range(0, K, BK):
        ks = first + tl.arange(0, BK)
        x = tl.load(
            a + rows[:, None] * stride_am + ks[None] * stride_ak,
            mask=(rows[:, None] < M) & (ks[None] < K), other=0.0,
        )  # fmt: skip
        y = tl.load(
            b + ks[:, None] * stride_bk + cols[None] * stride_bn,
            mask=(ks[:, None] < K) & (cols[None] < N), other=0.0,
        )  # fmt: skip
        acc = tl.dot(x, y, acc)
    tl.store(c + rows[:, None] * N + cols[None], acc, (rows[:, None] < M) & (cols[None] < N))


@triton.jit
def gemm_tma_kernel(
    a, b, c, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    A_TURNED: tl.constexpr, B_TURNED: tl.constexpr,
):  # fmt: skip
    """c [M, N] = a @ b with tensor descriptors: a [M, K] or turned [K, M], b [N, K] or [K, N]."""
    row, col = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros([BM, BN], tl.float32)
    for first in range(0, K, BK):
        x = a.load([first, row]).T if A_TURNED else a.load([row, first])
        y = b.load([first, col]) if B_TURNED else b.load([col, first]).T
        acc = tl.dot(x, y, acc)
    c.store([row, col], acc)


def matrices(M, N, K, dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(M, K, generator=generator), torch.randn(K, N, generator=generator)
    if dtype == torch.float32:  # what tensor cores read of it
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    return a.to(dtype), b.to(dtype)


def close(c, a, b):
    exact = a.double() @ b.double()
    assert (c - exact).abs().max() <= 1e-5 * exact.abs().max()


POINTERS = [  # (BM, BN, BK, warps, stages), dtype, a column-major, b column-major
    ((64, 64, 32, 4, 3), torch.bfloat16, False, False),
    ((64, 64, 32, 4, 3), torch.float16, False, True),
    ((64, 64, 64, 4, 2), torch.float16, True, False),
    ((128, 32, 32, 4, 2), torch.bfloat16, True, True),
    ((16, 16, 16, 1, 2), torch.float16, False, False),
    ((32, 128, 64, 8, 2), torch.bfloat16, False, False),
    ((64, 64, 32, 4, 2), torch.float32, False, False),
    ((64, 32, 16, 4, 3), torch.float32, False, True),
]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("tile, dtype, a_turned, b_turned", POINTERS)
def test_gemm(tile, dtype, a_turned, b_turned, arch):
    """mma (and, on sm_90 from 64 rows and 4 warps on, wgmma) with cp.async, edges included."""
    M, N, K = 130, 100, 150
    a, b = matrices(M, N, K, dtype)
    a, b = (t.T.contiguous().T if turned else t for t, turned in ((a, a_turned), (b, b_turned)))
    c = torch.full((M, N), torch.nan)
    BM, BN, BK, warps, stages = tile
    with triton_driver.running(arch) as driver:
        for driver.config in SCHEDULES:
            c.fill_(torch.nan)
            gemm_kernel[(triton.cdiv(M, BM), triton.cdiv(N, BN))](
                a, b, c, M, N, K, *a.stride(), *b.stride(), BM, BN, BK,
                num_warps=warps, num_stages=stages,
            )  # fmt: skip
            close(c, a, b)
    counts = driver.launches[0][1]
    wide = arch == 90 and BM >= 64
    assert counts["wgmma" if wide else "mma"] > 0


DESCRIPTORS = [  # BM, BN, BK, warps, stages, a turned, b turned
    (64, 64, 64, 4, 3, False, False),
    (64, 128, 64, 4, 3, False, True),
    (128, 256, 64, 8, 2, True, False),
    (128, 128, 64, 8, 2, True, True),
    (128, 128, 32, 4, 3, False, True),
    (64, 64, 128, 4, 2, False, False),
    (64, 32, 64, 4, 3, True, True),
    (64, 16, 16, 4, 2, False, False),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", DESCRIPTORS, ids=lambda shape: "x".join(map(str, shape)))
def test_gemm_with_descriptors(shape, dtype):
    """TMA loads and stores, mbarriers and wgmma: both majors, swizzles of 32, 64 and 128 bytes."""
    BM, BN, BK, warps, stages, a_turned, b_turned = shape
    M, N, K = 2 * BM - 16, BN + 16, 3 * BK + 8
    a, b = matrices(M, N, K, dtype)
    a_given = a.T.contiguous() if a_turned else a
    b_given = b if b_turned else b.T.contiguous()
    c = torch.full((M, N), torch.nan)
    given = [
        TensorDescriptor.from_tensor(a_given, [BK, BM] if a_turned else [BM, BK]),
        TensorDescriptor.from_tensor(b_given, [BK, BN] if b_turned else [BN, BK]),
        TensorDescriptor.from_tensor(c, [BM, BN]),
    ]
    with triton_driver.running(90) as driver:
        for driver.config in SCHEDULES:
            c.fill_(torch.nan)
            gemm_tma_kernel[(triton.cdiv(M, BM), triton.cdiv(N, BN))](
                *given, N, K, BM, BN, BK, a_turned, b_turned,
                num_warps=warps, num_stages=stages,
            )  # fmt: skip
            close(c, a, b)
    counts = driver.launches[0][1]
    assert counts["wgmma"] > 0 and counts["bulk_bytes"] > 0


def test_descriptors_without_tma():
    """On sm_80 a descriptor argument comes apart into pointer, shape and strides."""
    a, b = matrices(64, 64, 64, torch.float16)
    c = torch.full((64, 64), torch.nan)
    given = [TensorDescriptor.from_tensor(t, [64, 64]) for t in (a, b, c)]
    with triton_driver.running(80):
        gemm_tma_kernel[(1, 1)](*given, 64, 64, 64, 64, 64, False, True)
    close(c, a, b)


# -- the driver -----------------------------------------------------------------------------------


@triton.jit
def everything_kernel(pair, out, n, small, wide, flag, number, half, double, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(pair[0] + i, mask=i < n, other=0.0) * pair[1]
    if flag:
        x += small.to(tl.float32) + wide.to(tl.float32)
    x += number + half.to(tl.float32) + double.to(tl.float32)
    tl.store(out + i, x, mask=i < n)


@pytest.mark.parametrize("arch", [80, 90])
def test_arguments_of_every_type(arch):
    x, out = torch.arange(50.0), torch.zeros(50)
    with triton_driver.running(arch):
        everything_kernel[(1,)]((x, 2.0), out, 50, -3, 2**40, True, 0.5, 0.25, 0.125, N=64)
    torch.testing.assert_close(out, 2 * x - 3 + 2.0**40 + 0.875)


@triton.jit
def sums_kernel(x, total, sums, n, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    values = tl.load(x + i, mask=i < n, other=0)
    tl.atomic_add(total, tl.sum(values))
    tl.store(sums + i, tl.cumsum(values), mask=i < n)


@pytest.mark.parametrize("arch", [80, 90])
def test_reductions_scans_and_atomics(arch):
    x, total, sums = torch.arange(1000), torch.zeros(1, dtype=torch.int64), torch.zeros(1000).long()
    with triton_driver.running(arch, Config(resident_blocks=3, seed=4)):
        sums_kernel[(4,)](x, total, sums, 1000, N=256)
    assert total.item() == 499500
    pieces = [piece.cumsum(0) for piece in x.split(256)]
    assert torch.equal(sums, torch.cat(pieces))


def test_an_arch_that_is_not_emulated_is_refused():
    with pytest.raises(ValueError, match="80, 90, got 100"), triton_driver.running(100):
        pass


def test_the_driver_of_before_is_back():
    before = triton.runtime.driver._active
    with triton_driver.running(90) as driver:
        assert triton.runtime.driver.active is driver
    assert triton.runtime.driver._active is before


def test_both_architectures_in_turn():
    """What was compiled for one is not launched on the other."""
    x, total, sums = torch.arange(256), torch.zeros(1, dtype=torch.int64), torch.zeros(256).long()
    with triton_driver.running(80) as old, triton_driver.running(90) as new:
        for driver in (old, new, old):
            triton.runtime.driver.set_active(driver)
            sums_kernel[(1,)](x, total, sums, 256, N=256)
    targets = {
        kernel.asm["ptx"].split(".target ")[1].split()[0] for kernel in compiled(sums_kernel)
    }
    assert {"sm_80", "sm_90a"} <= targets and len(old.launches) == 2 and len(new.launches) == 1


def compiled(function):
    """What Triton keeps of a function in this process, on every device."""
    return [k for caches in function.device_caches.values() for k in caches[0].values()]


def test_no_programs_launch_nothing():
    with triton_driver.running(80) as driver:
        sums_kernel[(0,)](torch.arange(4), torch.zeros(1).long(), torch.zeros(4).long(), 4, N=256)
    assert driver.launches == []
