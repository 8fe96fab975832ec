"""Installs a wheel of the project for several Pythons, each with its torch, and uses it there.

    make wheel
    python tests/wheel_report.py dist/*.whl PYTHON ... [--write]

A PYTHON is an interpreter that has torch. The wheel alone is installed, into a folder of its own;
from there the library is loaded, and attention computed on the CPU. --write keeps the answers in
bench/results/static/wheel.json.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import library_code

STATIC = Path(__file__).resolve().parents[1] / "bench" / "results" / "static"

USE = """
import json, platform, torch, tilemask
from tilemask import library, masks
q = torch.randn(2, 4, 33, 16)
right = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
torch.testing.assert_close(tilemask.attention(q, q, q, mask=masks.causal()), right)
print(json.dumps({
    "python": platform.python_version(),
    "torch": torch.__version__,
    "tilemask": tilemask.__version__,
    "abi": library.load().tilemask_abi(),
    "library": library.architectures(),
    "backends": tilemask.available_backends(),
    "cuda": tilemask.backends.cuda.unavailable(),
    "imported_from": tilemask.__file__,
}))
"""


def output(*command, **environment) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(map(str, command))[:200]}")
    return done.stdout


def use(python: str, wheel: Path) -> dict:
    """What the wheel says of itself where only it was installed beside torch."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--quiet", "--no-deps", "--no-index", "--target", folder]
        output(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel)
        said = json.loads(output(python, "-W", "ignore", "-c", USE, PYTHONPATH=folder))
        if not Path(said.pop("imported_from")).is_relative_to(folder):
            raise SystemExit(f"{python} imported another tilemask")
    return said


def report(wheel: Path, pythons: list[str]) -> dict:
    audit = output(sys.executable, "-m", "auditwheel", "show", wheel)
    return {
        "command": "python tests/wheel_report.py dist/*.whl PYTHON ... --write",
        "made": datetime.date.today().isoformat(),
        "wheel": wheel.name,
        "bytes": wheel.stat().st_size,
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "sources_sha256": library_code.sources_sha256(),  # of this tree, that it was made from
        "auditwheel": " ".join(audit.split()[:10]),
        "installed": [use(python, wheel) for python in pythons],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    parser.add_argument("--write", action="store_true", help="keep it in bench/results/static")
    options = parser.parse_args()
    text = json.dumps(report(options.wheel, options.pythons), indent=1) + "\n"
    print(text, end="")
    if options.write:
        (STATIC / "wheel.json").write_text(text)


if __name__ == "__main__":
    main()
