"""Cosine of two vectors from their dot product, as prune and reuse define it."""

from __future__ import annotations

import torch


def cosine(dot: torch.Tensor, a_squares: torch.Tensor, b_squares: torch.Tensor) -> torch.Tensor:
    """Cosine from a dot product and sums of squares: 1 of two zero vectors, 0 of one.

    The root of the product of equal sums is that sum, so equal vectors have exactly 1. float64
    keeps the product in range; it is a few values per token.
    """
    product = a_squares.double() * b_squares.double()
    value = (dot.double() / product.sqrt()).clamp(-1.0, 1.0)
    both_zero = (a_squares == 0) & (b_squares == 0)
    value = torch.where(product == 0, both_zero.double(), value)
    return value.to(dot.dtype)
