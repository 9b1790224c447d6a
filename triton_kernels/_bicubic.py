"""Pillow's bicubic filter with antialias, tap by tap: a = -0.5, stretched where it shrinks."""

import triton
import triton.language as tl


@triton.jit
def middle(out, size_in, size_out):
    """The input pixel in which the middle of output pixel ``out`` lies, and how far its own middle
    is from that. In integers: float32 would lose what decides a rounding at large sizes."""
    whole = (2 * out.to(tl.int64) + 1) * size_in
    pixel = whole // (2 * size_out)
    rest = (whole - pixel * (2 * size_out)).to(tl.float32)
    return pixel.to(tl.int32), 0.5 - rest / (2 * size_out)


@triton.jit
def tap(distance, shrink):
    """The weight, not yet divided by the sum of all, of a pixel so far away (in input pixels)."""
    x = tl.abs(distance) * shrink
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return tl.where(x < 1, near, tl.where(x < 2, far, 0.0))


@triton.jit
def level(value):
    """Rounded half up and clamped to what a byte holds, as float32."""
    return tl.minimum(tl.maximum(tl.floor(value + 0.5), 0.0), 255.0)
