"""The emulator as the CUDA runtime: a library with a C entry, built by nvcc and linked against it,
registers its kernels, launches them on CPU memory and encodes tensor maps."""

import ctypes
from ctypes import c_float, c_int, c_void_p

import pytest
import torch
from ptx_emulator import Config, cuda, failure

SOURCE = cuda.KERNELS / "scaled.cu"


@pytest.fixture(scope="module", params=[80, 90], ids=lambda arch: f"sm{arch}")
def arch(request):
    return request.param


@pytest.fixture(scope="module")
def made(arch):
    loaded = cuda.loaded(cuda.posed([SOURCE], arch))
    loaded.error_name.restype = ctypes.c_char_p
    loaded.scaled.argtypes = [c_void_p, c_int, c_float, c_int, c_void_p]
    loaded.out_of_bounds.argtypes = loaded.reversed.argtypes = [c_void_p]
    loaded.tile_of.argtypes = [c_void_p, c_void_p, c_int, c_int, c_int, c_int]
    return loaded


@pytest.mark.parametrize("shared", [512, 100_000])
def test_a_launch(made, arch, shared):
    """A struct by value, dynamic shared memory also past 48 KiB, a constant, a tail block."""
    x = torch.arange(1000.0)
    with cuda.posing(arch, Config(seed=1), [x]):
        assert made.scaled(x.data_ptr(), 1000, 3.0, shared, None) == 0
        ((kernel, counts),) = cuda.launches()
    assert torch.equal(x, torch.arange(1000.0) * 3 + 0.5)
    assert "scale" in kernel and counts["blocks"] == 8
    assert counts["shared_bytes"] == shared


def test_static_shared_memory_is_that_of_the_kernel(made, arch):
    x = torch.arange(128.0)
    with cuda.posing(arch, buffers=[x]):
        assert made.reversed(x.data_ptr()) == 0
        ((_, counts),) = cuda.launches()
    assert torch.equal(x, torch.arange(128.0).flip(0))
    assert counts["shared_bytes"] == 128 * 4


SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # of a block, at most


def test_the_device_is_the_one_asked_for(made, arch):
    for device in (device for device in SHARED_KIB if device >= arch):
        with cuda.posing(device):
            assert made.capability() == device
            assert made.shared_memory_of_a_block() == SHARED_KIB[device] * 1024


def test_a_fault_is_an_error_code_and_a_message(made, arch):
    x = torch.zeros(100)
    with cuda.posing(arch, buffers=[x]):
        code = made.out_of_bounds(x.data_ptr())
        message = str(failure())
    assert made.error_name(code) == b"cudaErrorLaunchFailure"
    line = 1 + SOURCE.read_text().split("void outside(")[0].count("\n")
    assert f"scaled.cu:{line}" in message and "global" in message


def test_an_error_is_gone_when_it_was_read(made, arch):
    x = torch.zeros(100)
    with cuda.posing(arch, buffers=[x]):
        assert made.out_of_bounds(x.data_ptr()) != 0
        assert made.scaled(x.data_ptr(), 100, 1.0, 512, None) == 0


def test_too_much_shared_memory_is_refused(made, arch):
    x = torch.zeros(100)
    with cuda.posing(arch, buffers=[x]):
        code = made.scaled(x.data_ptr(), 100, 1.0, 300_000, None)
    assert made.error_name(code) == b"cudaErrorInvalidValue"
    assert torch.equal(x, torch.zeros(100))


def test_a_tensor_map_of_the_drivers_entry_point(made, arch):
    if arch < 90:
        pytest.skip("sm_80 has no TMA")
    x, y = torch.randn(50, 32), torch.zeros(16, 32)
    with cuda.posing(arch, Config(asynchronous="random", seed=2), [x, y]):
        assert made.tile_of(x.data_ptr(), y.data_ptr(), 50, 128, 40, 16) == 0
    assert torch.equal(y[:10], x[40:]) and not y[10:].any()


def test_the_driver_refuses_a_bad_tensor_map(made, arch):
    """A pitch that is no multiple of 16 bytes: CUDA_ERROR_INVALID_VALUE."""
    x, y = torch.randn(50, 32), torch.zeros(16, 32)
    with cuda.posing(arch, buffers=[x, y]):
        assert made.tile_of(x.data_ptr(), y.data_ptr(), 50, 132, 0, 16) == -1
