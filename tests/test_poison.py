"""The traps of the tests themselves: poisoned memory works, and check() refuses what is wrong."""

import cases
import poison
import pytest
import torch

import tilemask
from tilemask import masks
from tilemask.backends import empty_like_query

MAKERS = {
    "empty": "torch.empty(3, 4, dtype={0})",
    "empty_like": "torch.empty_like(torch.zeros(3, 4, dtype={0}))",
    "empty_strided": "torch.empty_strided((3, 4), (4, 1), dtype={0})",
    "new_empty": "torch.zeros(1, dtype={0}).new_empty((3, 4))",
    "new_empty_strided": "torch.zeros(1, dtype={0}).new_empty_strided((3, 4), (4, 1))",
}


def made(maker, dtype, filename):
    """What a maker gives to code in a file of that name."""
    return eval(compile(MAKERS[maker].format(dtype), filename, "eval"), {"torch": torch})


@pytest.mark.parametrize("maker", MAKERS)
def test_the_package_gets_garbage(maker):
    kernels = pytest.importorskip("tilemask.kernels").__file__
    for filename in (tilemask.__file__, masks.__file__, kernels):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            assert made(maker, dtype, filename).isnan().all()
        for dtype in (torch.int32, torch.int64):
            assert (made(maker, dtype, filename) == poison.GARBAGE).all()
        assert (made(maker, torch.uint8, filename) == poison.GARBAGE % 128).all()
        assert made(maker, torch.bool, filename).all()


def test_functions_of_the_package_are_reached():
    assert empty_like_query(torch.zeros(1, 2, 3, 4), 4).isnan().all()


def test_others_do_not_get_garbage(monkeypatch):
    filled = []
    monkeypatch.setattr(poison, "fill", filled.append)
    for maker in MAKERS:
        made(maker, torch.float32, __file__)
    assert filled == []


def test_uninstall_brings_the_originals_back():
    patched = [getattr(owner, name) for owner, name in poison.MAKERS]
    poison.uninstall()
    originals = [getattr(owner, name) for owner, name in poison.MAKERS]
    assert all(a is not b for a, b in zip(patched, originals, strict=True))
    poison.install()
    poison.install()  # twice is once
    poison.uninstall()
    again = [getattr(owner, name) for owner, name in poison.MAKERS]
    assert all(a is b for a, b in zip(originals, again, strict=True))


# -- check() ------------------------------------------------------------------------------------


def spoiled(name):
    """Ways to spoil a right result of the case in the test below, each of which must be refused."""

    def nan(result):
        result[name].flatten()[-1] = torch.nan

    def infinite(result):
        result[name].flatten()[-1] = torch.inf

    def off(result):  # by a hundredth of what the tensor holds
        result[name].flatten()[-1] += 0.01 * cases.largest(result[name])

    def missing(result):
        del result[name]

    def cut(result):
        result[name] = result[name][:1]

    return {f.__name__: f for f in (nan, infinite, off, missing, cut)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv"])
@pytest.mark.parametrize("way", spoiled(""))
def test_check_refuses(name, way, dtype):
    case = cases.named("padding_both")
    right = {n: t.clone() for n, t in cases.run(case, dtype, backend="reference").items()}
    cases.check(case, dtype, right)
    spoiled(name)[way](right)
    with pytest.raises(AssertionError, match="padding_both"):
        cases.check(case, dtype, right)


def test_check_wants_exact_zeros():
    case = cases.named("padding_both")  # batch 1 sees keys 33 to 39 of 70
    right = cases.run(case, torch.float32, backend="reference")
    for name in ("dk", "dv"):
        spoiled = {n: t.clone() for n, t in right.items()}
        spoiled[name][1, 0, 50, 3] = 1e-30
        with pytest.raises(AssertionError, match="not 0"):
            cases.check(case, torch.float32, spoiled)
    case = cases.named("causal_offset_-5")  # the first five rows see nothing
    right = cases.run(case, torch.float32, backend="reference")
    for name in ("out", "dq"):
        spoiled = {n: t.clone() for n, t in right.items()}
        spoiled[name][0, 0, 4, 3] = 1e-30
        with pytest.raises(AssertionError, match="not 0"):
            cases.check(case, torch.float32, spoiled)
    spoiled = {n: t.clone() for n, t in right.items()}
    spoiled["lse"][0, 0, 4] = -1e9
    with pytest.raises(AssertionError, match="-inf"):
        cases.check(case, torch.float32, spoiled)
