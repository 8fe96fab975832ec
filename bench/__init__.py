"""The benchmark suite of tilemask, installed as `tilemask.bench`: python -m tilemask bench | cost

Modules, each using only those before it:
    area       what a mask leaves: visible pairs, tiles by class
    workloads  named shapes and masks, and the suites
    cost       operations and bytes of a workload, and the least time they take
    timing     CUDA events or the wall clock, medians, measured ceilings
    check      the truth in float64, and how far from it a result may be
    peers      the calls that are timed: tilemask's backends, and others
    record     the JSON document: provenance, its checks, reading and writing
    cells      one contender on one case: compared, then timed
    overhead   what a call costs in Python; preparing masks
    plots      SVG
    report     the table and the HTML page
    compare    what changed between two documents
    readme     the performance section of README.md
    run        the loop over workloads
"""

# From the repository root, a plain `import bench` finds this directory too.
if __name__ != "tilemask.bench":
    raise ImportError(f"the benchmarks are imported as tilemask.bench, not as {__name__}")
