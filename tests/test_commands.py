"""python -m tilemask demo | doctor: what they print, and that they notice wrong numbers."""

import os
import subprocess
import sys

import pytest
import torch

import tilemask
from tilemask import backends, demo, doctor
from tilemask.backends import reference

ON_GPU = torch.cuda.is_available()


def command(*arguments, **environment):
    """Run python -m tilemask as a user does, with none of the variables that matter set."""
    ours = ("TILEMASK_BACKEND", "TILEMASK_DEBUG", "TRITON_INTERPRET")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, "-m", "tilemask", *arguments],
        env=env | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


# -- the command line -----------------------------------------------------------------------------


def test_version():
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"tilemask {tilemask.__version__}\n")


def test_help_names_the_commands():
    done = command("--help")
    assert done.returncode == 0
    assert "demo" in done.stdout and "doctor" in done.stdout


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("demo", "--sentences", "only one")])
def test_wrong_arguments_give_the_usage(arguments):
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: python -m tilemask")


# -- demo -----------------------------------------------------------------------------------------


def test_demo():
    done = command("demo")
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("1/4  encoder", "2/4  decoder", "3/4  packed", "4/4  training"):
        assert f"\n{line}" in done.stdout
    assert "     ####/...        ########         ##########/.....\n" in done.stdout
    assert "FAILED" not in done.stdout
    assert "comparisons with plain PyTorch hold" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    if not ON_GPU:
        assert "CPU, float32, reference implementation" in done.stdout
        assert done.stdout.count("not triton: ") == 4


def test_demo_of_other_sentences():
    done = command("demo", "--sentences", "Hello, world!", "one two three")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tokens      1 2 3 4\n" in done.stdout
    assert "tokens      5 6 7 0\n" in done.stdout
    assert "masks.varlen([0, 4, 7], within=masks.causal())" in done.stdout


def test_demo_refuses_a_sentence_of_one_word(capsys):
    assert demo.main(["one", "two words"]) == 2
    assert "two words or more, got 'one'" in capsys.readouterr().err


@pytest.mark.skipif(ON_GPU, reason="Triton can run here")
def test_demo_says_when_the_forced_backend_cannot_run():
    done = command("demo", TILEMASK_BACKEND="triton")
    assert done.returncode == 2
    assert done.stderr.startswith("demo: backend 'triton' cannot run this call: ")
    assert "Traceback" not in done.stderr


def wrong_gradient(out):
    """The right numbers with twice the gradient."""
    return out + (out - out.detach())


SABOTAGE = {
    "nothing": lambda out: out,
    "numbers": lambda out: out * 1.01,
    "one_number": lambda out: out.index_fill(-1, torch.tensor(0, device=out.device), 0),
    "nan": lambda out: out * float("nan"),
    "gradient": wrong_gradient,
}


@pytest.mark.parametrize("fault", SABOTAGE)
def test_demo_notices(fault, monkeypatch, capsys):
    attention = tilemask.attention
    sabotaged = lambda *arguments, **options: SABOTAGE[fault](attention(*arguments, **options))
    monkeypatch.setattr(tilemask, "attention", sabotaged)
    monkeypatch.setattr(demo, "median_ms", lambda *_: 0.0)
    code = demo.main()
    printed = capsys.readouterr().out
    assert code == (0 if fault == "nothing" else 1), printed
    assert ("FAILED" in printed) == (fault != "nothing")


def test_demo_notices_a_wrong_backend(monkeypatch, capsys):
    right = reference.forward

    def forward(call):
        out, lse = right(call)
        return out + 0.1, lse

    monkeypatch.setattr(reference, "forward", forward)
    monkeypatch.setattr(demo, "median_ms", lambda *_: 0.0)
    with tilemask.use_backend("reference"):
        assert demo.main() == 1
    assert "comparisons FAILED" in capsys.readouterr().out


def test_tokenise():
    tokens, lengths, vocabulary = demo.tokenise(["The dog, the cat", "a dog"])
    assert tokens.tolist() == [[1, 2, 3, 1, 4], [5, 2, 0, 0, 0]]
    assert lengths.tolist() == [5, 2]
    assert vocabulary == {"<pad>": 0, "the": 1, "dog": 2, ",": 3, "cat": 4, "a": 5}


# -- doctor ---------------------------------------------------------------------------------------


def test_doctor():
    done = command("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    found = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert tilemask.__version__ in found["tilemask"]
    assert os.path.dirname(tilemask.__file__) in found["tilemask"]
    assert torch.__version__ in found["torch"]
    assert "checked on cpu" in found["reference"]
    assert {backend.NAME for backend in backends.BACKENDS} <= set(found)
    assert found["TILEMASK_BACKEND"].endswith("not set")
    assert "\nadvice: " in done.stdout
    if not ON_GPU:
        assert "does not run: " in found["triton"]


def test_doctor_checks_the_interpreter():
    pytest.importorskip("triton")
    done = command("doctor", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "triton     runs in Triton's interpreter, slowly; checked on cpu" in done.stdout
    assert "advice: unset TRITON_INTERPRET" in done.stdout


def test_doctor_knows_no_such_backend(monkeypatch, capsys):
    monkeypatch.setenv("TILEMASK_BACKEND", "abacus")
    assert doctor.main() == 0
    assert "TILEMASK_BACKEND=abacus names no backend" in capsys.readouterr().out


def raising(call):
    raise ValueError("out of beads")


def off_by_a_little(call, right=reference.forward):
    out, lse = right(call)
    return out + 1e-2, lse


@pytest.mark.parametrize(
    "forward, said",
    [(raising, "FAILED on cpu: ValueError: out of beads"), (off_by_a_little, "WRONG on cpu")],
)
def test_doctor_notices_a_broken_reference(forward, said, monkeypatch, capsys):
    monkeypatch.setattr(reference, "forward", forward)
    assert doctor.main() == 1
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("answer", ["590.48.01", ""])
def test_doctor_reads_the_driver(answer, monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{answer}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert doctor.driver() == (answer or "no answer")


def test_doctor_survives_a_broken_driver(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'cannot talk to the driver'\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert doctor.driver() == "nvidia-smi fails: cannot talk to the driver"
