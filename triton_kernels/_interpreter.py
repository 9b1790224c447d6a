"""Triton's interpreter beside a numpy that it does not know yet."""

from __future__ import annotations

from typing import Any


def mend() -> None:
    """Lets ``for n in range(...)`` take the kernels' own scalars.

    Until Triton 3.7 the interpreter converts arrays of one element for it, which numpy 2.4 refuses
    (https://github.com/triton-lang/triton/issues/9171).
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: type, *scope: Any) -> None:
        patch(tensor, *scope)
        set_attr = scope[0].set_attr if scope else setattr  # older ones restore nothing
        set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_index
