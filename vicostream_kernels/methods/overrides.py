"""Changing a method by dotted keys, as the command line's ``--set key=value`` does."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from vicostream_kernels.methods.rules import Method, ReuseRule

SECTIONS = ("prune", "scorer", "reuse", "attention", "retrieve", "engine")
#: Sections that a key brings into a method without them: their defaults are a published rule.
_DEFAULTS = {"reuse": ReuseRule()}
_NONE = {"none", "null", "off"}
_BOOL = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class UnknownName(ValueError):
    """A preset or key that does not exist; the message names the nearest that does."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = list(known)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        super().__init__(f"unknown {kind} {name!r}: {hint}known: {', '.join(known)}")


class InvalidValue(ValueError):
    """A value that its key does not take."""


def apply(method: Method, overrides: Mapping[str, Any], presets: Mapping[str, Method]) -> Method:
    """``method`` with ``overrides`` applied.

    A key is ``section.field`` or a whole section, which takes ``none`` or the name of the preset
    that it is taken from (``prune=vicostream``); whole sections come first. A key of ``reuse``
    starts from the published rule where the method has none. Values are strings as
    typed on a command line, or Python values. ``prune`` brings its scorer along. Raises
    :class:`UnknownName`, :class:`InvalidValue`.
    """
    changes: dict[str, Any] = {}
    fields: dict[str, dict[str, Any]] = {}
    for key, value in overrides.items():
        section, dot, name = key.partition(".")
        if section not in SECTIONS:
            raise UnknownName("key", key, _all_keys(method))
        if dot:
            fields.setdefault(section, {})[name] = value
        else:
            changes[section] = _section(method, section, value, presets)
            if section == "prune" and "scorer" not in overrides:
                changes["scorer"] = (
                    None
                    if changes["prune"] is None or value not in presets
                    else presets[value].scorer
                )
    for section, values in fields.items():
        current = changes.get(section, getattr(method, section))
        changes[section] = _replace(section, current, values, method, presets)
    try:
        return dataclasses.replace(method, **changes)
    except ValueError as error:
        raise InvalidValue(str(error)) from error


def _section(method: Method, section: str, value: Any, presets: Mapping[str, Method]) -> Any:
    default = {f.name: f.default for f in dataclasses.fields(Method)}[section]
    if value is None or (isinstance(value, str) and value.lower() in _NONE):
        return default
    if isinstance(value, str):
        if value not in presets:
            raise UnknownName(f"preset for {section}", value, presets)
        return getattr(presets[value], section)
    if not dataclasses.is_dataclass(value):
        raise InvalidValue(f"{section}={value!r}: give none or a preset's name")
    return value


def _replace(
    section: str,
    current: Any,
    values: dict[str, Any],
    method: Method,
    presets: Mapping[str, Method],
) -> Any:
    current = current or _DEFAULTS.get(section)
    if current is None:
        wanted = next(iter(values))
        having = [name for name, other in presets.items() if getattr(other, section) is not None]
        able = [name for name in having if hasattr(getattr(presets[name], section), wanted)]
        source = "prune" if section == "scorer" else section  # a score is of use to its rule only
        advice = f": first take a preset's with {source}={(able or having)[0]}" if having else ""
        raise InvalidValue(f"{section}.{wanted}: {method.name!r} has no {section} step{advice}")
    hints = typing.get_type_hints(type(current))
    known = [f.name for f in dataclasses.fields(current)]
    parsed = {}
    for name, value in values.items():
        if name not in known:
            raise UnknownName("key", f"{section}.{name}", [f"{section}.{k}" for k in known])
        parsed[name] = _parse(f"{section}.{name}", value, hints[name])
    try:
        return dataclasses.replace(current, **parsed)
    except (ValueError, TypeError) as error:
        said = ", ".join(f"{section}.{name}={value}" for name, value in values.items())
        raise InvalidValue(f"{said}: {error}") from error


_UNITS = {"k": 1, "m": 2, "g": 3, "t": 4}


def _bytes(key: str, value: Any) -> Any:
    """``"256MiB"`` and the like (powers of 1024 with an i, of 1000 without) as a number; anything
    else as it is."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"([0-9.]+)\s*([kmgt])(i?)(b?)", value.strip().lower())
    if found is None:
        return value
    if not found[4]:
        unit = found[2].upper()
        raise InvalidValue(f"{key}={value}: write {unit}iB (1024) or {unit}B (1000)")
    try:
        count = float(found[1])
    except ValueError:
        return value
    return int(count * (1024 if found[3] else 1000) ** _UNITS[found[2]])


def _parse(key: str, value: Any, hint: Any) -> Any:
    """``value`` as the field's type has it; the first alternative that fits is taken."""
    if key.endswith("_bytes"):
        value = _bytes(key, value)
    for option in _alternatives(hint):
        fits, parsed = _as(value, option)
        if fits:
            return parsed
    sizes = ", such as 256MiB or 2GB" if key.endswith("_bytes") else ""
    raise InvalidValue(f"{key}={value!r}: give {_allowed(hint)}{sizes}")


def _alternatives(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        # Words before text, or "none" would be taken for a string.
        options = [o for arg in typing.get_args(hint) for o in _alternatives(arg)]
        return sorted(options, key=lambda o: (o is str, o is not type(None)))
    return [hint]


def _as(value: Any, option: Any) -> tuple[bool, Any]:
    text = value.strip().lower() if isinstance(value, str) else None
    if option is type(None):
        return value is None or text in _NONE, None
    if typing.get_origin(option) is typing.Literal:
        return value in typing.get_args(option), value
    if typing.get_origin(option) is tuple:
        return _as_tuple(value, typing.get_args(option))
    if option is bool:
        return (True, _BOOL[text]) if text in _BOOL else (isinstance(value, bool), value)
    if option in (int, float):
        return _as_number(value, option)
    if isinstance(option, type):
        return isinstance(value, option), value
    return False, None


def _as_number(value: Any, kind: type) -> tuple[bool, Any]:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return False, None
    try:
        number = float(value.replace(",", "")) if isinstance(value, str) else float(value)
    except ValueError:
        return False, None
    if number != number or (kind is int and not number.is_integer()):
        return False, None
    return True, kind(number)


def _as_tuple(value: Any, args: tuple[Any, ...]) -> tuple[bool, Any]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (tuple, list)):
        return False, None
    kinds = [args[0]] * len(parts) if args[-1] is Ellipsis else list(args)
    if len(kinds) != len(parts):
        return False, None
    parsed = [_as(p.strip() if isinstance(p, str) else p, kind) for p, kind in zip(parts, kinds)]
    return all(fits for fits, _ in parsed), tuple(part for _, part in parsed)


def _allowed(hint: Any) -> str:
    words = []
    for option in _alternatives(hint):
        if option is type(None):
            words.append("none")
        elif typing.get_origin(option) is typing.Literal:
            words.extend(str(arg) for arg in typing.get_args(option))
        else:
            words.append(
                {int: "a whole number", float: "a number", bool: "true or false"}.get(
                    option, "text" if option is str else str(option)
                )
            )
    return " or ".join(words)


def _all_keys(method: Method) -> list[str]:
    keys = []
    for section in SECTIONS:
        value = getattr(method, section)
        keys.append(section)
        if value is not None:
            keys.extend(f"{section}.{f.name}" for f in dataclasses.fields(value))
    return keys
