"""The PTX emulator's Python side: building, arguments, buffers, errors; and its determinism."""

import concurrent.futures
import multiprocessing
import re
import struct

import pytest
import torch
from ptx_emulator import Config, EmulatorError, Module, build, library, micro, packed, tensor_map

ADD = """
.version 8.1
.target sm_80
.address_size 64
.visible .entry micro(.param .u64 x, .param .u64 y, .param .u32 n, .param .f32 plus)
{
    .reg .b32 %i, %block, %n;
    .reg .f32 %v, %plus;
    .reg .b64 %x, %y, %at;
    .reg .pred %out;
    ld.param.u64 %x, [x];
    ld.param.u64 %y, [y];
    ld.param.u32 %n, [n];
    ld.param.f32 %plus, [plus];
    mov.u32 %block, %ctaid.x;
    mov.u32 %i, %tid.x;
    mad.lo.u32 %i, %block, 32, %i;
    setp.ge.u32 %out, %i, %n;
    @%out bra DONE;
    mul.wide.u32 %at, %i, 4;
    add.u64 %x, %x, %at;
    add.u64 %y, %y, %at;
    ld.global.f32 %v, [%x];
    add.f32 %v, %v, %plus;
    st.global.f32 [%y], %v;
DONE:
    ret;
}
"""


def test_a_launch():
    x, y = torch.arange(70.0), torch.zeros(70)
    """y = x + 0.5, with a tail."""
    module = Module(ADD)
    assert module.kernels == ["micro"]
    assert module.parameter_sizes("micro") == [8, 8, 4, 4]
    counts = module.launch("micro", (3,), (32,), x, y, 70, 0.5)
    assert torch.equal(y, x + 0.5)
    assert counts["blocks"] == 3 and counts["global_loads"] == 3


def test_views_share_their_storage():
    """The whole storage of a tensor may be touched, from the pointer of the view on."""
    x, y = torch.arange(100.0), torch.zeros(100)
    Module(ADD).launch("micro", (1,), (32,), x[10:], y[50:], 32, 0.0)
    assert torch.equal(y[50:82], x[10:42]) and not y[:50].any()


def test_outside_of_every_buffer():
    x, y = torch.arange(70.0), torch.zeros(60)
    with pytest.raises(EmulatorError, match="global"):
        Module(ADD).launch("micro", (3,), (32,), x, y, 70, 0.5)


def test_buffers_behind_raw_addresses():
    x, y = torch.arange(32.0), torch.zeros(32)
    given = [struct.pack("Q", t.data_ptr()) for t in (x, y)]
    with pytest.raises(EmulatorError, match="global"):
        Module(ADD).launch("micro", (1,), (32,), *given, 32, 1.0)
    Module(ADD).launch("micro", (1,), (32,), *given, 32, 1.0, buffers=[x, y])
    assert torch.equal(y, x + 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((1, 2, 3), "takes 4 arguments, got 3"),
        ((None, None, b"123", 1.0), "argument 2 has 3 bytes, its parameter 4"),
        ((None, None, "32", 1.0), "argument 2: str for a parameter of 4 bytes"),
        ((torch.zeros(1, device="meta"), None, 1, 1.0), "argument 0 is on meta"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Module(ADD).launch("micro", (1,), (32,), *arguments)


def test_wrong_names_and_sizes():
    module, given = Module(ADD), (None, None, 0, 0.0)
    with pytest.raises(ValueError, match="no kernel 'nobody', only micro"):
        module.launch("nobody", (1,), (32,), *given)
    with pytest.raises(ValueError, match=re.escape("grid is 1 to 3 numbers, got (1, 1, 1, 1)")):
        module.launch("micro", (1, 1, 1, 1), (32,), *given)
    with pytest.raises(ValueError, match="'early', 'late', 'random', got 'never'"):
        module.launch("micro", (1,), (32,), *given, config=Config(asynchronous="never"))
    with pytest.raises(ValueError, match="1 or more"):
        module.launch("micro", (1,), (32,), *given, config=Config(resident_blocks=0))


def test_values_as_bytes():
    assert packed(-1, 4, 0) == b"\xff" * 4 and packed(True, 1, 0) == b"\x01"
    assert packed(2**63, 8, 0) == struct.pack("Q", 2**63) and packed(None, 8, 0) == bytes(8)
    assert packed(1.5, 4, 0) == struct.pack("f", 1.5) and packed(1.5, 8, 0) == struct.pack("d", 1.5)
    tensor = torch.zeros(3)
    assert packed(tensor, 8, 0) == struct.pack("Q", tensor.data_ptr())


def test_text_that_is_no_ptx():
    with pytest.raises(EmulatorError):
        Module("this is not PTX {")


# -- tensor maps ----------------------------------------------------------------------------------

REFUSED = {
    "a pitch that is no multiple of 16": lambda: tensor_map(torch.zeros(8, 33), (8, 32)),
    "a box of more than 256": lambda: tensor_map(torch.zeros(8, 512), (8, 260)),
    "a row past the swizzle": lambda: tensor_map(torch.zeros(8, 64), (8, 64), 128),
    "an address that is no multiple of 16": lambda: tensor_map(torch.zeros(8, 64).view(-1)[1:257]
                                                               .view(8, 32), (8, 32)),
    "a box row that is no multiple of 16 bytes": lambda: tensor_map(torch.zeros(8, 64), (8, 3)),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_tensor_maps_that_the_driver_refuses(what):
    with pytest.raises(EmulatorError):
        REFUSED[what]()


def test_a_tensor_map_has_128_bytes():
    assert len(tensor_map(torch.zeros(8, 64), (8, 32), 128)) == 128


# -- schedules ------------------------------------------------------------------------------------

ORDER = micro.kernel(
    """
    atom.global.add.u32 %place, [%ptr0], 1;
    mad.wide.u32 %at, %place, 4, %ptr1;
    st.global.u32 [%at], %thread;
    """,
    2,
    registers=".reg .b32 %place; .reg .b64 %at;",
)


def order(seed: int) -> list[int]:
    """The order in which 256 threads came to an atomic."""
    count, threads = torch.zeros(1, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    Module(ORDER).launch("micro", (1,), (256,), count, threads, config=Config(seed=seed))
    return threads.tolist()


def test_a_seed_is_a_schedule():
    orders = {seed: order(seed) for seed in range(4)}
    assert all(sorted(threads) == list(range(256)) for threads in orders.values())
    assert all(order(seed) == threads for seed, threads in orders.items())
    assert len({tuple(threads) for threads in orders.values()}) > 1


# -- building -------------------------------------------------------------------------------------


def test_no_compiler_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match=r"needs a C\+\+20 compiler.*apt install g\+\+"):
        build.cxx()
    monkeypatch.setenv("CXX", "icc")
    with pytest.raises(RuntimeError, match="none of icc"):
        build.cxx()


def test_a_program_that_fails_is_quoted(tmp_path):
    source = tmp_path / "broken.cpp"
    source.write_text("int f( {")
    with pytest.raises(RuntimeError, match=r"broken\.cpp.*error"):
        build.call([build.cxx(), "-c", source, "-o", tmp_path / "broken.o"])


def test_the_library_is_built_once(monkeypatch):
    built = build.library()
    monkeypatch.setattr(build, "call", fail_unless_version(build.call))
    assert build.library() == built


def fail_unless_version(call):
    def checked(command):
        assert "--version" in map(str, command), command
        return call(command)

    return checked


def slow_build(folder):
    import time

    with open(folder.parent / "count", "a") as file:
        file.write("x")
    time.sleep(0.2)
    (folder / "made").write_text("whole")


def use_cache(place):
    build.CACHE = place
    return (build.cached("thing", slow_build) / "made").read_text()


def test_processes_that_need_it_at_once_build_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(4, mp_context=context) as pool:
        assert list(pool.map(use_cache, [tmp_path] * 4)) == ["whole"] * 4
    assert (tmp_path / "count").read_text() == "x"


def test_a_build_that_failed_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "CACHE", tmp_path)

    def broken(folder):
        (folder / "half").write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        build.cached("thing", broken)
    assert not (tmp_path / "thing").exists()
    assert (build.cached("thing", lambda folder: (folder / "made").touch()) / "made").exists()
    assert not (tmp_path / "thing" / "half").exists()


def test_the_header_and_the_binding_agree():
    """Every function of emulator.h is bound, and no other."""
    header = (build.SOURCES / "emulator.h").read_text()
    declared = set(re.findall(r"EMU_API [^;(]*?\b(emu_\w+)\(", header))
    assert declared == {name for name in vars(library()) if name.startswith("emu_")}
