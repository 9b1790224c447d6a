"""The Makefile on machines that are not ours: a folder with a space, a python without venv."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    shutil.which("make") is None or not (ROOT / "Makefile").exists(),
    reason="needs make and the checkout",
)

#: Like Debian's python3 without python3-venv: half an environment, then an error.
PYTHON = """#!/bin/sh
[ "$2" = venv ] || exit 0
mkdir -p "$3/bin" && touch "$3/bin/python"
echo "ensurepip is not available" >&2
exit 1
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    folder = tmp_path / "a folder"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "setup.py", "CMakeLists.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "python").write_text(PYTHON)
    (folder / "python").chmod(0o755)
    return folder


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # What was given to the make that runs the tests.
    given = ("MAKE", "MFLAGS", "VENV", "TORCH", "TRITON", "PYTHON")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(given)}
    return subprocess.run(
        ["make", *arguments], cwd=checkout, env=clean, capture_output=True, text=True
    )


def test_every_use_of_a_path_with_a_space_is_quoted(checkout):
    done = make(checkout, "-n", "build", "demo", "lint", "packaging", "gpu-check")
    assert done.returncode == 0, done.stderr
    assert str(checkout) in done.stdout, "some path is absolute"
    assert checkout.name not in re.sub(r'"[^"]*"', "", done.stdout)


def test_a_failed_environment_is_not_taken_for_one_the_next_time(checkout):
    for _ in range(2):
        done = make(checkout, "build", "PYTHON=./python")
        assert done.returncode != 0
        assert "ensurepip is not available" in done.stderr
    assert not (checkout / ".venv" / "bin" / "python").exists()
