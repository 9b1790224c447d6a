"""Folders that a run writes into, checked before the work."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vicostream_kernels.pipeline.errors import InputError


def writable_folder(folder: str | os.PathLike[str], option: str) -> Path:
    """Makes ``folder`` and tries to write there: hours of work must not end in a full stop.

    Raises :class:`InputError` that names the ``option``.
    """
    if not os.fspath(folder):
        raise InputError(f"{option} '': give a folder (. is the current one)")
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "it is a file, give a folder" if path.is_file() else error.strerror or error
        raise InputError(f"{option} {folder}: {why}") from error
    try:
        # Rights alone do not tell: root has them all, also where nothing can be written.
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"{option} {folder}: the folder cannot be written") from error
    return path
