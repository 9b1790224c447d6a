"""The CPU kernels under AddressSanitizer and UBSan: a plugin that has the tests use another ``_C``.

`make sanitize` compiles it and names it in VICO_SANITIZED. Tensors lie in memory that the sanitizer
watches, so an access beyond one of them ends the process.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import torch  # noqa: F401  (its libraries are those of _C)

import vicostream_kernels

_NAME = "vicostream_kernels._C"
_spec = importlib.util.spec_from_file_location(_NAME, os.environ["VICO_SANITIZED"])
if _NAME in sys.modules or _spec is None:
    raise ImportError(f"{os.environ['VICO_SANITIZED']} must be the first and only {_NAME}")
vicostream_kernels._C = sys.modules[_NAME] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[_NAME])


def pytest_report_header() -> str:
    return f"_C: {sys.modules[_NAME].__file__}"
