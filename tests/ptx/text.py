"""The text of a PTX module as a program: its kernels, their registers, labels and instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

#: Bytes of a type.
SIZES = {
    f"{kind}{bits}": bits // 8
    for kind, widths in {"b": (8, 16, 32, 64), "u": (8, 16, 32, 64), "s": (8, 16, 32, 64),
                         "f": (16, 32, 64), "bf": (16,)}.items()
    for bits in widths
}  # fmt: skip

#: Comments, and the lines that tie instructions to a source.
_NOISE = re.compile(r"//[^\n]*|/\*.*?\*/|^\s*\.(?:loc|file)\b[^\n]*", re.DOTALL | re.MULTILINE)
_LABEL = re.compile(r"^\s*([$%\w]+):\s*")
_NAME = r"[$%\w.]+"


class Register(NamedTuple):
    """Its place in the register file."""

    index: int


class Vector(NamedTuple):
    """``{a, b}``."""

    items: tuple[Operand, ...]


class Address(NamedTuple):
    """``[base + offset]``; ``base`` is None for an absolute one."""

    base: Operand | None
    offset: int


class Symbol(NamedTuple):
    """A variable's address, a label, a special register, or a parameter."""

    name: str


class Number(NamedTuple):
    """A literal: a whole number, or the bits of a float and how many (0f..., 0d...)."""

    value: int
    float_bits: int = 0


class Negated(NamedTuple):
    """``!p``."""

    register: Register


class Sink(NamedTuple):
    """``_``, where a result is dropped."""


Operand = Register | Vector | Address | Symbol | Number | Negated | Sink


@dataclass(frozen=True)
class Instruction:
    """``@guard opcode.modifiers operands``."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | Negated | None
    line: str


@dataclass
class Variable:
    """Static storage in "global", "const", "shared" or "local" space."""

    space: str
    align: int
    size: int
    initial: bytes | None


@dataclass
class Kernel:
    name: str
    parameters: list[tuple[str, str]] = field(default_factory=list)
    #: The type of each register, "pred" included.
    registers: list[str] = field(default_factory=list)
    variables: dict[str, Variable] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    #: The place of the instruction after each label.
    labels: dict[str, int] = field(default_factory=dict)


class Unsupported(ValueError):
    """PTX that this package does not run."""


def parse(ptx: str) -> dict[str, Kernel]:
    """The kernels (entries) of a module; the module's variables are in each."""
    ptx = _NOISE.sub("", ptx)
    shared: dict[str, Variable] = {}
    kernels: dict[str, Kernel] = {}
    # Debug sections end a module.
    ptx = re.split(r"^\s*\.section\b", ptx, flags=re.MULTILINE)[0]
    parts = re.split(r"(?=\.(?:visible|weak)\s+\.entry\b|^\.entry\b)", ptx, flags=re.MULTILINE)
    _variables(parts[0], shared)
    for part in parts[1:]:
        kernel = _kernel(part, shared)
        kernels[kernel.name] = kernel
    return kernels


def _kernel(text: str, module: dict[str, Variable]) -> Kernel:
    head, _, body = text.partition("{")
    found = re.search(r"\.entry\s+([$\w]+)\s*(?:\((.*?)\))?", head, re.DOTALL)
    kernel = Kernel(found[1], variables=dict(module))
    for declared in (found[2] or "").split(","):
        if declared.strip():
            words = declared.split()
            kernel.parameters.append((words[-1], words[1].lstrip(".")))
            if "[" in words[-1]:  # a struct: bytes
                name, _, count = words[-1].partition("[")
                kernel.parameters[-1] = (name, f"b8[{count.rstrip(']')}]")
    _Body(kernel).read(body)
    return kernel


_DECLARED = re.compile(
    r"\.(global|shared|local|const)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([$\w]+)\s*"
    r"(\[\d*\])?\s*(?:=\s*(\{[^}]*\}|[^;]+))?;"
)


def _variables(text: str, into: dict[str, Variable]) -> None:
    for space, align, kind, name, count, initial in _DECLARED.findall(text):
        size = SIZES[kind] * (int(count[1:-1] or 0) if count else 1)  # [] is dynamic
        data = None
        if initial:
            values = [int(value, 0) for value in initial.strip("{} ").split(",")]
            data = b"".join(
                (value & (1 << 8 * SIZES[kind]) - 1).to_bytes(SIZES[kind], "little")
                for value in values
            ).ljust(size, b"\0")
        into[name] = Variable(space, int(align or SIZES[kind]), size, data)


class _Body:
    """Reads the statements of a kernel; braces open scopes of registers."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scopes: list[dict[str, Register]] = [{}]

    def read(self, body: str) -> None:
        for statement in _statements(body):
            if statement == "{":
                self.scopes.append({})
            elif statement == "}":
                self.scopes.pop()
                if not self.scopes:
                    return
            else:
                self._statement(statement)

    def _statement(self, text: str) -> None:
        while found := _LABEL.match(text):
            if found[1] in self.kernel.labels:
                raise Unsupported(f"two labels {found[1]}")
            self.kernel.labels[found[1]] = len(self.kernel.instructions)
            text = text[found.end() :]
        text = " ".join(text.split())
        if not text:
            return
        if text.startswith(".reg"):
            self._registers(text)
        elif text.startswith((".shared", ".local")):
            _variables(text + ";", self.kernel.variables)
        elif not text.startswith("."):
            self.kernel.instructions.append(self._instruction(text))

    def _registers(self, text: str) -> None:
        _, kind, names = text.split(None, 2)
        for name in names.split(","):
            found = re.fullmatch(r"([%$\w]+)<(\d+)>", name.strip())
            made = [f"{found[1]}{i}" for i in range(int(found[2]))] if found else [name.strip()]
            for each in made:
                self.scopes[-1][each] = Register(len(self.kernel.registers))
                self.kernel.registers.append(kind.lstrip("."))

    def _instruction(self, text: str) -> Instruction:
        line, guard = text, None
        if text.startswith("@"):
            name, _, text = text[1:].partition(" ")
            guard = self._operand(name)
        name, _, rest = text.partition(" ")
        opcode, *modifiers = name.replace("::", "__").split(".")
        operands = tuple(self._operand(each) for each in _split(rest.strip()))
        return Instruction(opcode, tuple(modifiers), operands, guard, line)

    def _operand(self, text: str) -> Operand:
        text = text.strip()
        if text.startswith("{"):
            return Vector(tuple(self._operand(each) for each in _split(text[1:-1])))
        if text.startswith("["):
            base, _, offset = text[1:-1].replace("+-", "-").partition("+")
            if not offset and "-" in base:
                base, _, offset = base.partition("-")
                offset = "-" + offset
            at = self._operand(base)
            further = int(offset.strip() or "0", 0)
            if isinstance(at, Number):
                return Address(None, at.value + further)
            return Address(at, further)
        if text.startswith("!"):
            return Negated(self._operand(text[1:]))
        if text == "_":
            return Sink()
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return Number(int(text[2:], 16), 32)
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return Number(int(text[2:], 16), 64)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return Number(int(text.rstrip("U"), 0))
        if re.fullmatch(_NAME, text):
            return Symbol(text)
        raise Unsupported(f"an operand like {text!r}")


def _statements(body: str) -> list[str]:
    """Statements without their semicolons; a brace that opens or closes a scope stands alone."""
    made, start, depth, i = [], 0, 0, 0
    while i < len(body):
        char = body[i]
        if char == ";":
            made.append(body[start:i])
            start = i + 1
        elif char == "{":
            before = body[start:i].strip()
            if depth == 0 and (not before or before.endswith(":")):
                made += [before, "{"]
                start = i + 1
            else:
                depth += 1
        elif char == "}":
            if depth:
                depth -= 1
            else:
                made += [body[start:i], "}"]
                start = i + 1
        i += 1
    return made


def _split(text: str) -> list[str]:
    """At commas outside braces and brackets, and at the bar of ``p|q``."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "{[") - (char in "}]")
        if char in ",|" and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [part for part in (*parts, text[start:]) if part.strip()]
