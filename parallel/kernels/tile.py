"""One tile of a matrix product, x [M, K] times weight [N, K] transposed: what both overlapped products are made of.

                 weight^T [K, N]
                 . . |columns| .
                 . . |   |   | .
      x  [M, K]      |   v   |
    rows ---------> | tile   |  accumulated in float32 over steps of ``depth``

Inputs are read with plain loads, never with the tensor memory accelerator: peers write x with ordinary stores, and
what orders those with ordinary loads (``parallel.kernels.flags``) does not order them with the accelerator's.
Never run on a GPU; docs/kernels.md says what was checked instead.
"""

import torch
import triton
import triton.language as tl

from model.kernels.tile import Tile

AMD = Tile(columns=128, stages=2)  # one step of 32 KiB in the 64 KiB of shared memory, and one in registers


def default_tile() -> Tile:
    """What fits without spilling registers. Nothing has been timed."""
    return AMD if torch.version.hip else Tile()


@triton.jit
def multiply(x, weight, rows, columns, depth, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of x [., depth] times ``columns``, which are rows of weight [., depth] -> float32 [rows, columns].

    All of ``rows`` and ``columns`` exist: a ragged tile repeats its last. ``depth`` may be ragged. Within x and weight
    an int32 reaches everything.
    """
    k = tl.arange(0, tile.depth)
    left = x + rows[:, None] * depth + k[None, :]
    right = weight + columns[:, None] * depth + k[None, :]
    total = tl.full((tile.rows, tile.columns), 0, tl.float32)
    for start in range(0, depth, tile.depth):
        inside = k[None, :] < depth - start
        a = tl.load(left, mask=inside, other=0.0)
        b = tl.load(right, mask=inside, other=0.0)
        total = tl.dot(a, b.T, total, input_precision="ieee")
        left += tile.depth
        right += tile.depth
    return total
