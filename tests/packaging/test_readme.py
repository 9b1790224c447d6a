"""What the README tells a stranger to type works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="needs the checkout")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("at", range(2))
def test_the_python_examples_run(at, capsys):
    pytest.importorskip("transformers")
    names = {"frames": torch.zeros(16, 56, 84, 3, dtype=torch.uint8)}
    exec(compile(blocks("python")[at], f"README example {at}", "exec"), names)
    if at == 0:
        assert names["out"].shape == (32, 16, 128) and names["out"].isfinite().all()


def test_the_two_commands_are_make_targets_on_the_first_screen():
    first_screen = README.read_text().splitlines()[:20]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in ("demo", "test"):
        assert any(line.startswith(f"make {target}") for line in first_screen)
    named = set(re.findall(r"`?make ([a-z-]+)`?", README.read_text()))
    assert named <= set(targets)


def test_links_lead_somewhere():
    for page in (README, *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_generated_pages_are_those_of_the_code():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "make_docs.py"), "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
