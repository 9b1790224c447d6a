"""Which modifiers of an instruction are known: any other is refused, none is passed over."""

from __future__ import annotations

import re

from ptx.text import SIZES, Instruction, Unsupported

#: The PTX ISA manual calls these the instruction's type.
TYPES = {*SIZES, *(f"{kind}x2" for kind in ("f16", "bf16", "s16", "u16")), "pred"}
COMPARISONS = {
    *("eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs"),
    *("equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"),
}
ROUNDINGS = {"rni", "rmi", "rpi", "rzi"}
_SHARED = {"shared", "shared__cta"}
_MATRIX = {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans"} | _SHARED
_APPROXIMATE = {"approx", "ftz"}

_KNOWN: dict[str, set[str]] = {
    **dict.fromkeys(("rem", "and", "or", "xor", "not", "shl", "shr", "selp", "bfe", "bfi"), set()),
    **dict.fromkeys(("prmt", "lop3", "popc", "clz", "brev", "copysign", "mov"), set()),
    **dict.fromkeys(("rsqrt", "ex2", "lg2", "sin", "cos", "tanh"), _APPROXIMATE),
    **dict.fromkeys(("sqrt", "rcp"), _APPROXIMATE | {"rn"}),
    **dict.fromkeys(("abs", "neg"), {"ftz"}),
    **dict.fromkeys(("min", "max"), {"ftz", "NaN", "relu"}),
    **dict.fromkeys(("ret", "exit", "bra"), {"uni"}),
    **dict.fromkeys(("ldmatrix", "stmatrix"), _MATRIX),
    "add": {"rn", "ftz", "sat", "cc"},
    "addc": {"cc"},
    "sub": {"rn", "ftz", "sat"},
    "mul": {"rn", "ftz", "sat", "lo", "hi", "wide"},
    "mad": {"lo", "hi", "wide", "cc"},
    "madc": {"lo", "hi", "cc"},
    "fma": {"rn", "ftz", "sat", "relu"},
    "div": {"rn", "full", "approx", "ftz"},
    "shf": {"l", "r", "wrap", "clamp"},
    "setp": COMPARISONS | {"ftz", "and", "or", "xor"},
    "cvt": ROUNDINGS | {"rn", "ftz", "sat"},
    "bfind": {"shiftamt"},
    "ld": _SHARED | {"global", "local", "param", "nc", "v2", "v4"},
    "st": _SHARED | {"global", "local", "v2", "v4"},
    "atom": _SHARED | {"global", "add", "min", "max", "exch", "and", "or", "cas"},
    "cvta": {"to", "global", "shared"},
    "shfl": {"sync", "up", "down", "bfly", "idx"},
    "redux": {"sync", "add", "min", "max", "and", "or", "xor"},
    "vote": {"sync", "all", "any", "ballot"},
    "bar": {"sync", "warp"},
    "cp": _SHARED | {"async", "ca", "cg", "global", "commit_group", "wait_group", "wait_all"},
    "mma": {"sync", "aligned", "m16n8k16", "row", "col"},
    "wgmma": {"mma_async", "fence", "commit_group", "wait_group", "sync", "aligned"},
    "fence": {"proxy", "async"} | _SHARED,
    "membar": {"gl", "cta", "sys"},
    "prefetch": {"global", "L2"},
}


def check(instruction: Instruction) -> None:
    """Raises Unsupported for an opcode or a modifier that is not known."""
    if instruction.opcode not in _KNOWN:
        raise Unsupported(f"the opcode {instruction.opcode}")
    unknown = set(instruction.modifiers) - TYPES - _KNOWN[instruction.opcode]
    if instruction.opcode == "wgmma":
        unknown = {each for each in unknown if not re.fullmatch(r"m64n\d+k16", each)}
    if unknown:
        raise Unsupported(f"{instruction.opcode} with {', '.join(sorted(unknown))}")


def types_of(modifiers: tuple[str, ...]) -> list[str]:
    return [each for each in modifiers if each in TYPES]
