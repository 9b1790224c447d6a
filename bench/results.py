"""Result rows and the files they go to.

One document: ``{"schema", "environment", "roofline", "rows", ...}``; one row: a provider on a case
in one cache state. The CSV has the same columns: files of many devices and commits concatenate.
"""

from __future__ import annotations

import csv
import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vicostream_kernels.bench.stats import geomean

SCHEMA = "vicostream-bench/1"
#: Environment facts repeated in each CSV line.
_CSV_ENVIRONMENT = tuple("time_utc commit dirty package device_name torch triton cuda".split())


@dataclass
class Row:
    """One provider on one case in one cache state.

    Times are microseconds per call; ``gb_s`` and ``tflop_s`` are the case's least work over the
    median; ``floor_us`` is the roofline's and ``floor_pct`` its share of the time, on a CPU by
    rounds in which memory alone is timed too; ``ratio`` is the baseline's time over this one's,
    with its 95 % interval. A row that is not ``match`` has no times, and ``reason`` says what was
    wrong; ``error`` is the relative RMS error of the check.
    """

    case: str
    word: str
    op: str
    provider: str
    axes: dict[str, Any]
    dtype: str
    device: str
    threads: int
    cache: str
    match: bool
    error: float
    reason: str = ""
    method: str = ""
    samples: int = 0
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    gb_s: float | None = None
    tflop_s: float | None = None
    floor_us: float | None = None
    floor_pct: float | None = None
    baseline: str = ""
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    significant: bool | None = None
    bytes: int = 0
    flops: int = 0
    note: str = ""


@dataclass
class Document:
    environment: dict[str, Any]
    roofline: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    #: Cases that would have taken this machine too long, packages it has not, and why.
    left_out: dict[str, str] = field(default_factory=dict)
    #: Cases that did not come to their end, and how far they were.
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def all_match(self) -> bool:
        return bool(self.rows) and not self.failed and all(row.match for row in self.rows)

    def geomeans(self) -> dict[tuple[str, str], tuple[float, int]]:
        """Geometric mean of the ratios and their number, by provider and cache state."""
        ratios: dict[tuple[str, str], list[float]] = {}
        for row in self.rows:
            if row.ratio is not None and row.provider != row.baseline:
                ratios.setdefault((row.provider, row.cache), []).append(row.ratio)
        return {key: (geomean(values), len(values)) for key, values in ratios.items()}

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "environment": self.environment,
            "roofline": self.roofline,
            "rows": [_without_nan(asdict(row)) for row in self.rows],
            "left_out": self.left_out,
            "failed": self.failed,
        }


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """NaN is no JSON; a check that could not compute an error has none."""
    return {k: None if isinstance(v, float) and v != v else v for k, v in row.items()}


def write_atomically(path: Path, text: str) -> None:
    """The file is either the old one or the whole new one, whatever happens in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(document: Document, path: Path) -> None:
    write_atomically(path, json.dumps(document.as_dict(), indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Document:
    """Reads what ``write_json`` wrote; raises ValueError for another schema."""
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"{path} is no {SCHEMA} document")
    rows = []
    for row in data["rows"]:
        row["error"] = float("nan") if row["error"] is None else row["error"]
        rows.append(Row(**row))
    more = {name: data.get(name, {}) for name in ("left_out", "failed")}
    return Document(data["environment"], data["roofline"], rows, **more)


def append_csv(document: Document, path: Path) -> None:
    """Adds the rows to a CSV file, with a header when the file is new.

    Raises ValueError when the file has other columns than these: a mixed file helps nobody.
    """
    columns = [*_CSV_ENVIRONMENT, *Row.__dataclass_fields__]
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists() or path.stat().st_size == 0
    if not fresh:
        with path.open(newline="") as file:
            found = next(csv.reader(file))
        if found != columns:
            raise ValueError(f"{path} has other columns than this version writes; name a new file")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if fresh:
            writer.writeheader()
        for row in document.as_dict()["rows"]:
            facts = {key: document.environment.get(key) for key in _CSV_ENVIRONMENT}
            writer.writerow({**facts, **row, "axes": json.dumps(row["axes"], sort_keys=True)})
