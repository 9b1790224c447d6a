"""Which thread holds what of a tensor core's matrix (PTX ISA, "Matrix Fragments")."""

from __future__ import annotations

import numpy as np

from ptx.memory import Fault, SharedMemory
from ptx.text import Unsupported
from ptx.values import Array, decode

_LANE = np.arange(32)
_GROUP, _IN_GROUP = _LANE // 4, _LANE % 4


def _halves(registers: list[Array], kind: str) -> Array:
    """Registers of pairs as values [threads, registers, 2]."""
    return np.stack([decode(each, f"{kind}x2") for each in registers], 1)


def a_fragment(registers: list[Array], kind: str) -> Array:
    """The 16 x 16 matrix that each warp holds in four registers: [warps, 16, 16]."""
    values = _halves(registers, kind).reshape(-1, 32, 4, 2)
    made = np.zeros((len(values), 16, 16), values.dtype)
    for r in range(4):
        for half in range(2):
            rows, columns = _GROUP + 8 * (r % 2), 2 * _IN_GROUP + half + 8 * (r // 2)
            made[:, rows, columns] = values[:, :, r, half]
    return made


def b_fragment(registers: list[Array], kind: str) -> Array:
    """[warps, 16 (k), 8 (n)] of two registers."""
    values = _halves(registers, kind).reshape(-1, 32, 2, 2)
    made = np.zeros((len(values), 16, 8), values.dtype)
    for r in range(2):
        for half in range(2):
            made[:, 2 * _IN_GROUP + half + 8 * r, _GROUP] = values[:, :, r, half]
    return made


def c_fragment(registers: list[Array]) -> Array:
    """[warps, 16, n] of float32: four registers for each eight columns."""
    values = np.stack([each.view(np.float32) for each in registers], 1)
    values = values.reshape(-1, 32, len(registers))
    made = np.zeros((len(values), 16, 2 * len(registers)), np.float32)
    for r in range(len(registers)):
        rows, columns = _GROUP + 8 * (r % 4 // 2), 8 * (r // 4) + 2 * _IN_GROUP + r % 2
        made[:, rows, columns] = values[:, :, r]
    return made


def c_registers(matrix: Array) -> list[Array]:
    """The other way."""
    made = []
    for r in range(matrix.shape[2] // 2):
        rows, columns = _GROUP + 8 * (r % 4 // 2), 8 * (r // 4) + 2 * _IN_GROUP + r % 2
        made.append(np.ascontiguousarray(matrix[:, rows, columns]).reshape(-1).view(np.uint32))
    return made


def product(a: Array, b: Array, c: Array) -> Array:
    """a b + c: in float64, then rounded once."""
    return (a.astype(np.float64) @ b.astype(np.float64) + c).astype(np.float32)


def load_matrices(
    memory: SharedMemory, addresses: Array, count: int, transposed: bool, warps: Array
) -> list[Array]:
    """`ldmatrix`: matrices of 8 x 8 halves; lane 8 i + j has the address of row j of matrix i."""
    by_warp = addresses.reshape(-1, 32)
    made = []
    for i in range(count):
        rows = by_warp[:, 8 * i : 8 * i + 8].reshape(-1)
        words = memory.load(rows, 4, 4, np.repeat(warps.reshape(-1, 32)[:, 0], 8))
        halves = np.stack(words, 1).view(np.uint16).reshape(-1, 8, 8)
        if transposed:
            halves = halves.transpose(0, 2, 1)
        pairs = halves[:, _GROUP[:, None], 2 * _IN_GROUP[:, None] + np.arange(2)]
        made.append(np.ascontiguousarray(pairs).view(np.uint32).reshape(-1))
    return made


def store_matrices(
    memory: SharedMemory, addresses: Array, registers: list[Array], transposed: bool, warps: Array
) -> None:
    """`stmatrix`, the other way."""
    by_warp = addresses.reshape(-1, 32)
    for i, register in enumerate(registers):
        pairs = np.ascontiguousarray(register).view(np.uint16).reshape(-1, 32, 2)
        halves = np.zeros((len(pairs), 8, 8), np.uint16)
        halves[:, _GROUP[:, None], 2 * _IN_GROUP[:, None] + np.arange(2)] = pairs
        if transposed:
            halves = halves.transpose(0, 2, 1)
        words = np.ascontiguousarray(halves.reshape(-1, 8)).view(np.uint32)
        rows = by_warp[:, 8 * i : 8 * i + 8].reshape(-1)
        owners = np.repeat(warps.reshape(-1, 32)[:, 0], 8)
        memory.store(rows, [np.ascontiguousarray(words[:, k]) for k in range(4)], owners)


def described_matrix(
    memory: SharedMemory, descriptor: int, outer: int, kind: str, major: str, reader: int
) -> Array:
    """The [outer, 16] matrix of halves behind a descriptor of `wgmma`.

    ``major``: "k" where neighbours along k lie together, "outer" where those along m or n do.
    Layouts as in the PTX ISA, "Strides" of wgmma: atoms of eight rows of 32, 64 or 128 bytes whose
    16-byte pieces are swizzled by the row, or of 16 bytes that are not. ``reader``: who reads, for
    the watch over shared memory.
    """
    start = (descriptor & 0x3FFF) << 4
    leading = (descriptor >> 16 & 0x3FFF) << 4
    stride = (descriptor >> 32 & 0x3FFF) << 4
    mode = descriptor >> 62 & 3
    if descriptor >> 49 & 7:
        raise Unsupported("a descriptor with a base offset")
    width = {0: 16, 1: 128, 2: 64, 3: 32}[mode]  # bytes of a row of an atom
    m, k = np.meshgrid(np.arange(outer), np.arange(16), indexing="ij")
    if major == "k":
        piece = 2 * k // 16  # along k, in 16 bytes
        at = m // 8 * stride + m % 8 * width + 2 * k % 16
        at = at + (piece * leading if mode == 0 else piece * 16)
    else:
        inner = width // 2  # elements of a row of an atom
        apart, groups = (stride, leading) if mode == 0 else (leading, stride)
        at = m // inner * apart + k // 8 * groups + k % 8 * width + 2 * (m % inner)
    address = start + at
    address = address ^ (address >> 7 & (width // 16 - 1)) << 4
    flat = address.reshape(-1)
    size = memory.size
    if (flat < 0).any() or (flat + 2 > size).any():
        raise Fault(f"a descriptor reaches byte {int(flat.max())} of {size} of shared memory")
    bits = memory.load(flat, 2, 1, np.full(flat.shape, reader))[0]
    return decode(bits, kind).reshape(outer, 16)
