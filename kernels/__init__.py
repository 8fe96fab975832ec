"""The Triton kernels of tilemask, installed as `tilemask.kernels`.

Modules, each using only those before it:
    tuning       one table of tile shapes
    tiles        tensors as kernel arguments, and loading and storing a tile of rows
    masks        which columns a row sees, which tiles a loop visits, and the select itself
    pack         packed bits, and the lists of tiles that masks leave
    scores       softcap, bias, ALiBi and dropout inside a tile
    softmax      the online softmax step
    forward      attention forward
    split        forward of few rows: the tiles of a row split over programs, and their merge
    backward     attention backward
    sums         sums over pairs: attention weights, the gradient of a bias
    interpreter  bfloat16 for Triton's CPU interpreter
"""

import os

# From the repository root, a plain `import kernels` finds this directory too: it would make a
# second copy of every kernel, with a compilation cache of its own.
if __name__ != "tilemask.kernels":
    raise ImportError(f"these kernels are imported as tilemask.kernels, not as {__name__}")

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    from . import interpreter

    interpreter.install()
