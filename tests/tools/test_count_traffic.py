"""The tool that counts what compiled kernels ask of memory."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from kit import interpreter

pytest.importorskip("triton")


def test_it_counts_a_case_of_the_benchmark():
    command = [sys.executable, "tools/count_traffic.py", "reuse/gather_rows/2f-19n-72c/bfloat16"]
    done = subprocess.run(command, cwd=interpreter.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reuse/gather_rows/2f-19n-72c/bfloat16, triton, sm_90" in done.stdout
    kernel = re.search(r"gather_kernel: (\d+) blocks, ([\d,]+) warp instructions", done.stdout)
    assert kernel and int(kernel[1]) > 0
    asked, needed = re.search(r"load +(\d+) sectors, (\d+) needed", done.stdout).groups()
    rows_of_words = 2 * 19 * 72 * 2 // 32
    assert 0 < int(needed) <= int(asked) < rows_of_words
