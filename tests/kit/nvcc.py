"""The PTX that nvcc makes of a source under `csrc/cuda`, which takes it up to a minute."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
#: The targets that are shipped, by compute capability.
TARGETS = {80: "sm_80", 90: "sm_90a"}
FLAGS = ("-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}")


def ptx_of(source: Path, capability: int) -> Path:
    """What has not changed since the last time is not compiled again, nor by two at once."""
    digest = _of_headers().copy()
    digest.update(source.read_bytes())
    folder = ROOT / "build" / "ptx"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{source.stem}-{capability}"
    made = folder / f"{name}-{digest.hexdigest()[:16]}.ptx"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            new = f"{made}.new"
            command = ["nvcc", *FLAGS, f"-arch={TARGETS[capability]}", "-ptx", "-o", new]
            subprocess.run([*command, str(source)], check=True, capture_output=True)
            for old in folder.glob(f"{name}-*.ptx"):
                old.unlink()
            os.replace(new, made)
    return made


@cache
def _of_headers() -> hashlib._Hash:
    digest = hashlib.sha256(subprocess.check_output(["nvcc", "--version"]))
    digest.update(repr((FLAGS, TARGETS)).encode())
    for path in sorted((ROOT / "csrc").rglob("*.h")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest
