"""The PTX emulator's instructions one by one: arithmetic against C++, the rest against formulas."""

import re
import subprocess
from pathlib import Path

import pytest
from ptx_emulator import (
    Config,
    EmulatorError,
    Module,
    micro,
    micro_alu,
    micro_matrix,
    micro_memory,
    micro_warp,
)

SCHEDULES = [Config(), Config(seed=1, asynchronous="early"), Config(seed=2, asynchronous="random")]
CASES = [*micro_matrix.cases(), *micro_memory.cases(), *micro_warp.cases()]


def check(case, config):
    wanted = case.expected(*case.inputs)
    for got, exact in zip(micro.emulated(case, config), wanted, strict=True):
        assert micro.agree(case, got, exact), f"{case}: {micro.difference(case, got, exact)}"


@pytest.mark.parametrize("index", range(len(micro_alu.OPS)), ids=[op.name for op in micro_alu.OPS])
def test_arithmetic(index):
    check(micro_alu.case(index), SCHEDULES[0])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_form(case):
    for config in SCHEDULES:
        check(case, config)


def test_every_case_has_a_name_of_its_own():
    names = [case.name for case in CASES]
    names += [micro_alu.OPS[index].name for index in range(len(micro_alu.OPS))]
    assert len(names) == len(set(names)) > 700


def test_every_case_is_ptx(tmp_path):
    """ptxas of Triton's wheel takes all of them, as one file."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    cases = [*CASES, *(micro_alu.case(index) for index in range(len(micro_alu.OPS)))]
    text = [f".version {micro.VERSION}\n.target sm_90a\n.address_size 64"]
    text += [".extern .shared .align 1024 .b8 smem[];"]
    for number, case in enumerate(cases):
        body = case.ptx[case.ptx.index(".visible") :]  # after what every file begins with
        text.append(f"// {case.name}\n" + body.replace("micro(", f"micro{number}("))
    source = tmp_path / "all.ptx"
    source.write_text("\n".join(text))
    command = [tool, "-arch=sm_90a", "-O0", "-o", tmp_path / "all.cubin", source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# -- what is not understood -----------------------------------------------------------------------

UNKNOWN = {
    "an instruction": ("tcgen05.wait::ld.sync.aligned;", "tcgen05"),
    "a modifier": ("add.rn.approximately.f32 %f, %f, %f;", "approximately"),
    "a special register": ("mov.u32 %r, %warpsize;", "%warpsize"),
    "a register": ("mov.u32 %r, %undeclared;", "%undeclared"),
    "a label": ("bra NOWHERE;", "NOWHERE"),
    "an operand more": ("add.s32 %r, %r, %r, %r;", "add.s32"),
    "an operand less": ("add.s32 %r, %r;", "add.s32"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_is_unknown_is_an_error_with_its_line(kind):
    statement, named = UNKNOWN[kind]
    text = micro.kernel(statement, 0, registers=".reg .b32 %r; .reg .f32 %f;")
    line = text[: text.index(statement)].count("\n") + 1
    with pytest.raises(EmulatorError, match=re.escape(named)) as raised:
        Module(text).launch("micro", (1,), (1,))
    assert re.search(rf"\b{line}\b", str(raised.value)), raised.value
