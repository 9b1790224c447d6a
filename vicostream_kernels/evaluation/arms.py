"""What is compared: a model under a method, with the few things that no method can say."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vicostream_kernels import methods
from vicostream_kernels.evaluation.hooks import SELECTORS, drop_at_random
from vicostream_kernels.methods import Method
from vicostream_kernels.pipeline.errors import InputError

#: Keys of ``--sweep`` that are not the method's.
OWN_KEYS = ("model", "preset", "selector", "keep")


@dataclass(frozen=True)
class Arm:
    """One configuration that is measured.

    overrides: of the preset, as ``methods.get`` takes them. selector: of ``hooks.SELECTORS``.
    keep: share of tokens that stays when they are dropped at random, in place of the preset's
    pruning. label: how tables and figures call it; no part of what is measured.
    """

    model: str = "tiny"
    preset: str = "vicostream"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    selector: str = "rule"
    keep: float | None = None
    label: str = ""

    def method(self) -> Method:
        """The method; raises ``ValueError`` for what does not exist or does not go together."""
        if self.selector not in SELECTORS:
            raise InputError(f"selector={self.selector!r}: one of {', '.join(SELECTORS)}")
        method = methods.get(self.preset, self.overrides)
        if self.keep is not None:
            if not 0 < self.keep <= 1:
                raise InputError(f"keep={self.keep}: a share above 0, at most 1")
            method = drop_at_random(method, self.keep)
        if self.selector != "rule" and (method.retrieve is None or method.retrieve.k is None):
            raise InputError(f"selector={self.selector}: needs a method with retrieve.k")
        return method

    @property
    def name(self) -> str:
        """The label, or what distinguishes the arm."""
        if self.label:
            return self.label
        parts = [self.model, self.preset]
        parts += [f"{key}={value}" for key, value in self.overrides.items()]
        if self.selector != "rule":
            parts.append(f"selector={self.selector}")
        if self.keep is not None:
            parts.append(f"keep={self.keep:g}")
        return " ".join(parts)

    def with_setting(self, key: str, value: str) -> Arm:
        """A copy with a key of the method, or of ``OWN_KEYS``, set."""
        if key == "keep":
            try:
                return replace(self, keep=float(value))
            except ValueError:
                raise InputError(f"keep={value!r}: give a share such as 0.5") from None
        if key in OWN_KEYS:
            return replace(self, **{key: value})
        return replace(self, overrides={**self.overrides, key: value})


def parse_sweep(text: str) -> tuple[str, tuple[str, ...]]:
    """``"key=a,b,c"`` as a key and its values; raises :class:`InputError`."""
    key, equals, values = text.partition("=")
    parsed = tuple(value.strip() for value in values.split(",") if value.strip())
    if not equals or not key.strip() or not parsed:
        raise InputError(f"--sweep {text!r}: give key=value,value, as in retrieve.k=1,2,4")
    return key.strip(), parsed


def expand(base: Arm, sweeps: Sequence[tuple[str, Iterable[str]]]) -> list[Arm]:
    """Every combination of the values of the sweeps; each is checked before any is run."""
    arms = []
    keys = [key for key, _ in sweeps]
    for values in itertools.product(*(values for _, values in sweeps)):
        arm = base
        for key, value in zip(keys, values):
            arm = arm.with_setting(key, value)
        said = " ".join(f"{k}={v}" for k, v in zip(keys, values))
        arm = replace(arm, label=said or arm.preset)
        arm.method()
        arms.append(arm)
    return arms
