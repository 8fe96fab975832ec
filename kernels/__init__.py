"""The Triton kernels of tilemask, installed as `tilemask.kernels`.

Modules:
    masks      which keys a query row sees, and which tiles a loop visits
    softmax    the online softmax step
    forward    attention forward
    backward   attention backward
    pack       boolean masks packed into bits, and the lists of tiles they leave
    tuning     one table of tile sizes
"""

# From the repository root, a plain `import kernels` finds this directory too: it would make a
# second copy of every kernel, with a compilation cache of its own.
if __name__ != "tilemask.kernels":
    raise ImportError(f"these kernels are imported as tilemask.kernels, not as {__name__}")
