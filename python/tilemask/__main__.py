"""python -m tilemask demo | doctor"""

from __future__ import annotations

import argparse
import sys

from . import __version__


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m tilemask",
        description="Masked attention that costs only the tiles the mask leaves.",
    )
    top.add_argument("--version", action="version", version=f"tilemask {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="two sentences through tilemask and through plain PyTorch, compared and timed",
        description="Runs encoder, decoder and packed attention and a training step over two "
        "sentences, draws the masks and compares every result with plain PyTorch. "
        "Exits with 1 if a difference is larger than rounding explains.",
    )
    demo.add_argument(
        "--sentences",
        nargs=2,
        metavar=("FIRST", "SECOND"),
        help="your own two sentences, each of two words or more",
    )
    commands.add_parser(
        "doctor",
        help="what this machine has, which backends run on it, and why the others do not",
        description="Prints versions, GPUs, environment variables and the state of every backend, "
        "each checked with a small call. Exits with 0 if the reference passes its check.",
    )
    return top


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.command == "demo":
        from . import demo

        return demo.main(options.sentences)
    from . import doctor

    return doctor.main()


if __name__ == "__main__":
    sys.exit(main())
