"""python -m tilemask demo | doctor | bench | cost"""

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
    add_bench(commands)
    add_cost(commands)
    return top


def add_bench(commands) -> None:
    bench = commands.add_parser(
        "bench",
        help="tilemask and its peers, compared and timed: a table, JSON and an HTML page",
        description="Compares every contender with a float64 truth, then times it. Writes "
        "results.json and report.html into OUT after every row. Without a GPU it times the CPU, "
        "and says so. Exits with 1 if tilemask is wrong or fails anywhere.",
    )
    suites = ("quick", "dense", "masks", "bias", "models", "decode", "overhead", "prepare", "gpu")
    bench.add_argument(
        "--suite",
        nargs="+",
        choices=suites,
        default=["quick"],
        metavar="NAME",
        help=f"{', '.join(suites)} (the most telling of all, in that order); default quick",
    )
    bench.add_argument(
        "--only", nargs="+", default=(), metavar="TEXT", help="workloads whose name holds one"
    )
    bench.add_argument(
        "--backends",
        nargs="+",
        metavar="NAME",
        help="of tilemask; default all that run here, the reference only where no other does",
    )
    bench.add_argument(
        "--peers",
        nargs="+",
        metavar="NAME",
        help='by name ("sdpa flash") or family (sdpa), or none; default all that run here',
    )
    bench.add_argument(
        "--out", default="bench-results", metavar="DIR", help="default bench-results"
    )
    bench.add_argument(
        "--limit",
        type=seconds,
        metavar="SECONDS",
        help="end after this time with what there is; default none, for quick alone 55",
    )
    bench.add_argument("--device", choices=("cpu", "cuda"), help="default cuda where it is there")
    bench.add_argument(
        "--warm",
        type=int,
        default=0,
        metavar="N",
        help="compile what the run needs beforehand, in N processes (default 0: as it comes)",
    )
    bench.add_argument(
        "--compare",
        nargs=2,
        metavar=("A.json", "B.json"),
        help="time nothing: print what changed from A to B beyond the noise",
    )


def add_cost(commands) -> None:
    cost = commands.add_parser(
        "cost",
        help="tiles, operations and bytes of a workload, and the least time on a GPU; needs none",
        description="Counts what a mask leaves from its definition, and divides operations and "
        "bytes by the published ceilings of GPUs.",
    )
    cost.add_argument("workloads", nargs="*", metavar="WORKLOAD", help="names, see --list")
    cost.add_argument("--list", action="store_true", help="print the names of all workloads")
    cost.add_argument(
        "--mask", metavar="EXPRESSION", help='a mask of your own: "causal() & window(1023, 0)"'
    )
    cost.add_argument(
        "--shape",
        nargs=6,
        type=positive,
        default=(1, 32, 8, 8192, 8192, 128),
        metavar=("B", "Hq", "Hkv", "Lq", "Lk", "D"),
        help="with --mask; default 1 32 8 8192 8192 128",
    )
    cost.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="bfloat16")
    cost.add_argument(
        "--tile",
        nargs=2,
        type=positive,
        default=(128, 128),
        metavar=("ROWS", "COLUMNS"),
        help="default 128 128",
    )
    gpus = ("A100", "H100", "H200", "L40S", "B200")
    cost.add_argument("--gpus", nargs="+", choices=gpus, default=list(gpus), metavar="NAME")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return number


def seconds(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
    return number


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.command == "demo":
        from . import demo

        return demo.main(options.sentences)
    if options.command == "bench":
        from .bench import compare, run

        return compare.main(*options.compare) if options.compare else run.main(options)
    if options.command == "cost":
        from .bench import cost

        return cost.main(options)
    from . import doctor

    return doctor.main()


if __name__ == "__main__":
    sys.exit(main())
