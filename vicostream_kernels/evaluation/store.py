"""Results on disk: a folder per configuration, a journal that survives an interruption, tables."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import lru_cache
from pathlib import Path
from typing import Any

from vicostream_kernels.pipeline.errors import InputError
from vicostream_kernels.pipeline.trace import write_atomically

#: Weights up to this size are part of a key by their content, larger ones by size and time.
_HASHED_BYTES = 64 * 2**20
_PACKAGE = Path(__file__).parents[1]


def key_of(config: Mapping[str, Any]) -> str:
    """A short name for a configuration: equal settings, equal key."""
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def fingerprint(model: str) -> str:
    """Changes when the files of a model folder do, those in the package among them; a hub name is
    itself."""
    from vicostream_kernels.models import named

    # Names come before folders, as in load_model. The random ones share a tokenizer and template.
    folder = named.FOLDERS.get(model, named.HOME) if model in named.NAMES else Path(model)
    if not folder.is_dir():
        return model
    digest = hashlib.sha256(model.encode() if model in named.NAMES else b"")
    for path in sorted(folder.glob("*.*")):
        if path.suffix not in (".safetensors", ".json", ".jinja", ".txt"):
            continue
        facts = path.stat()
        digest.update(path.name.encode())
        if facts.st_size <= _HASHED_BYTES:
            digest.update(path.read_bytes())
        else:
            digest.update(f"{facts.st_size} {facts.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]


def contents(files: Iterable[Path]) -> str:
    """Changes with the names and bytes of files."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


@lru_cache(maxsize=4)
def code_hash(showing: Set[str]) -> str:
    """Changes with the code that makes results: what an older one measured is not found again.

    ``showing``: files of this folder that show results but do not make them (a frozenset).
    """
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        inner = path.relative_to(_PACKAGE)
        shows = inner.parts[0] == "evaluation" and inner.name in showing
        if not shows and inner.parts[0] not in ("bench", "integrations"):
            digest.update(str(inner).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def make_folder(path: str | os.PathLike[str], option: str) -> Path:
    """``path`` as a folder that can be written; raises :class:`InputError`."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option} {path}: {error.strerror or error}") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"{option} {path}: the folder cannot be written")
    return folder


class Journal:
    """Rows by their id in a JSON-lines file: written one by one, read back after a restart.

    ``config`` is kept beside it; a folder that was made with another one is refused, since its rows
    would not mean the same. Keys in ``ignore`` may differ.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], *, ignore: Sequence[str] = ()
    ) -> None:
        self._path = folder / "answers.jsonl"
        plain = json.loads(json.dumps(config, default=str))
        made_with = folder / "config.json"
        if made_with.exists():
            before = json.loads(made_with.read_text(encoding="utf-8"))
            keys = {*before, *plain} - {*ignore}
            differing = sorted(k for k in keys if before.get(k) != plain.get(k))
            if differing:
                raise InputError(
                    f"--out {folder}: holds results made with another {', '.join(differing)}; "
                    "give another folder, or delete this one"
                )
        else:
            write_atomically(made_with, json.dumps(plain, indent=1) + "\n")
        self.rows = {row["id"]: row for row in _lines(self._path)}

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends a row; it is on disk when this returns."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.rows[row["id"]] = dict(row)


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    if not path.exists():
        return
    whole = path.read_bytes()
    if whole and not whole.endswith(b"\n"):
        # A run that was killed in the middle of a line: that row is asked again.
        whole = whole[: whole.rfind(b"\n") + 1]
        path.write_bytes(whole)
    # Not splitlines(): an answer may hold U+2028 and the like, which JSON leaves as they are.
    for line in whole.decode("utf-8").split("\n")[:-1]:
        yield json.loads(line)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON in one step: a reader never sees half of it."""
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows with the columns of all of them, in the order of their first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())
