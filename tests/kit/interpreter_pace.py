"""Triton's interpreter without what it does over and over: the same results in half the time.

Nearly all of a test's time there is the bookkeeping around numpy on tiny arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any


def quicken(interpreter: Any) -> None:
    """``interpreter``: the module triton.runtime.interpreter."""
    _patch_once_a_launch(interpreter)
    _check_no_overflow_for_nobody(interpreter)
    _look_types_up_once(interpreter)
    _describe_shapes_once(interpreter.tl.core)
    _broadcast_only_what_differs(interpreter.TritonSemantic)


def _patch_once_a_launch(interpreter: Any) -> None:
    """Has a launch replace the functions of Triton's language once.

    Triton looks through the language again at each call of a device function, of which `tl.sum` and
    `tl.zeros` are some, although the launch itself has replaced everything: a third of the time.
    """
    patch_lang = interpreter._patch_lang
    patched: set[Any] = set()

    @cache
    def languages(fn: Any) -> frozenset[Any]:
        known = (interpreter.tl, interpreter.tl.core)
        return frozenset(lang for lang in known if any(lang is x for x in fn.__globals__.values()))

    def patch_lang_once(fn: Any) -> Any:
        launched = bool(patched)
        if launched and languages(fn) <= patched:
            return interpreter._LangPatchScope()
        scope = patch_lang(fn)
        patched.update(languages(fn))
        if not launched:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    interpreter._patch_lang = patch_lang_once


def _check_no_overflow_for_nobody(interpreter: Any) -> None:
    """Each sum and product of integers is done again in 64 bits, for an assertion that only its
    debug mode makes: another third of the time."""
    builder = interpreter.interpreter_builder
    if getattr(builder.options, "sanitize_overflow", False) and not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _look_types_up_once(interpreter: Any) -> None:
    """Numpy's type for one of Triton's is looked up in a dictionary that is made each time."""
    block_type, look_up = interpreter.tl.block_type, interpreter._get_np_dtype
    found: dict[str, Any] = {}

    def get_np_dtype(of: Any) -> Any:
        name = of.element_ty.name if isinstance(of, block_type) else of.name
        if name not in found:
            found[name] = look_up(of)
        return found[name]

    interpreter._get_np_dtype = get_np_dtype


def _describe_shapes_once(core: Any) -> None:
    """A type of blocks and a tensor's shape are a dozen objects each, made at every operation."""

    def sizes(shape: Any) -> tuple[Any, ...]:
        return tuple(x.value if isinstance(x, core.constexpr) else x for x in shape)

    def block_key(element_ty: Any, shape: Any) -> Any:
        # By its identity: of types with the same name not all are the same.
        return id(element_ty), sizes(shape)

    make_tensor = core.tensor.__init__
    shapes: dict[Any, tuple[Any, Any]] = {}

    def make_known_tensor(self: Any, handle: Any, type: Any) -> None:
        key = sizes(type.shape) if type.is_block() else ()
        if key not in shapes:
            make_tensor(self, handle, type)
            shapes[key] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    core.tensor.__init__ = make_known_tensor
    core.block_type.__init__ = _remembering(core.block_type.__init__, block_key)


def _broadcast_only_what_differs(semantic: Any) -> None:
    """Operands of the same shape are found to be so size by size."""
    broadcast = semantic.broadcast_impl_value

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        same = lhs.shape is rhs.shape  # after `_describe_shapes_once`
        return (lhs, rhs) if same else broadcast(self, lhs, rhs)

    semantic.broadcast_impl_value = broadcast_impl_value


def _remembering(init: Callable[..., None], key_of: Callable[..., Any]) -> Callable[..., None]:
    """An ``__init__`` that sets what it set the last time for this key."""
    made: dict[Any, dict[str, Any]] = {}

    def known_init(self: Any, *args: Any) -> None:
        key = key_of(*args)
        if key not in made:
            init(self, *args)
            made[key] = dict(vars(self))  # with the element's type, whose identity stays taken
        vars(self).update(made[key])

    return known_init
