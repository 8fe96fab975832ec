"""Golden vectors: on a GPU, each instruction there against the emulator's. Without one, the
comparison itself: the emulator stands in for the GPU."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from ptx_emulator import Config, micro

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
import golden

CASES = golden.cases()
FEW = [
    case for case in CASES if case.name.startswith(("add.s32", "mma", "ldmatrix", "tma.load.2d"))
]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_gpu_agrees(case):
    if not golden.runs_on(case, torch.cuda.get_device_capability()):
        pytest.skip("the GPU has not got this instruction")
    assert golden.compared(case, golden.on_gpu) == []


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_the_emulator_agrees_with_itself(case):
    config = Config(seed=5, asynchronous="random")
    assert golden.compared(case, lambda case: micro.emulated(case, config)) == []


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_one_wrong_element_is_a_difference(case):
    def wrong(case):
        first, *rest = micro.emulated(case)
        first = first.clone()
        first.view(-1)[len(first.view(-1)) // 2] += 1
        return (first, *rest)

    (difference,) = golden.compared(case, wrong)
    assert case.name in difference


def test_wrong_signs_of_zero_and_lost_nan_are_differences():
    case = dataclasses.replace(CASES[0], tolerance=0.0)
    zero, nan = torch.tensor([0.0]), torch.tensor([torch.nan])
    assert micro.agree(case, zero, zero.clone()) and micro.agree(case, nan, -nan)
    assert not micro.agree(case, zero, -zero)
    assert not micro.agree(case, zero, nan) and not micro.agree(case, nan, zero)


def test_tolerances():
    """Of sums relative to the largest element, of approximations to each."""
    got, wanted = torch.tensor([1000.0, 1e-3]), torch.tensor([1000.0005, 1.1e-3])
    case = dataclasses.replace(CASES[0], tolerance=1e-6)
    assert micro.agree(dataclasses.replace(case, elementwise=False), got, wanted)
    assert not micro.agree(dataclasses.replace(case, elementwise=True), got, wanted)
    infinite = torch.tensor([torch.inf, 1e-3])
    assert not micro.agree(dataclasses.replace(case, elementwise=False), got, infinite)


def test_which_gpu_runs_what():
    old, new = (next(case for case in CASES if case.arch == arch) for arch in (80, 90))
    assert golden.runs_on(old, (8, 0)) and golden.runs_on(old, (12, 0))
    assert golden.runs_on(new, (9, 0)) and not golden.runs_on(new, (8, 0))
    assert not golden.runs_on(new, (10, 0))
