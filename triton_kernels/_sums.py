"""Sums over threads."""

import triton
import triton.language as tl


@triton.jit
def product(a, b):
    """a * b, for a sum over threads: rounded before it is added.

    Such a sum ends with each lane adding another's value to its own. Where its own is a product,
    compilers fuse the two: then a lane rounds the other's product and not its own, two lanes have
    different bits of one sum, and which of them is stored is anybody's guess. A fused operation of
    its own is left alone.
    """
    return tl.fma(a, b, 0.0)
