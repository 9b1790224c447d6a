"""Which Triton the kernels refuse, and why."""

from __future__ import annotations

import pytest
import torch

from vicostream_kernels.triton_kernels import refusal


@pytest.mark.parametrize(
    ("version", "capability", "dtype", "reason"),
    [
        ("3.2.0", (9, 0), torch.bfloat16, "tuples"),
        ("2.10.0", None, None, "tuples"),
        ("3.6.0", (7, 5), torch.float16, "7.5"),
        ("3.6.0", None, torch.bfloat16, "triton/pull/11585"),
    ],
)
def test_known_bad_is_refused_with_its_reason(version, capability, dtype, reason):
    assert reason in refusal(version, capability, dtype)


@pytest.mark.parametrize("version", ["3.3.0", "3.6.0+git1234", "3.10.0", "4.0.0"])
@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((8, 0), torch.bfloat16), ((9, 0), None), (None, torch.float16), (None, None)],
)
def test_the_rest_is_served(version, capability, dtype):
    assert refusal(version, capability, dtype) is None


def test_the_interpreter_runs_with_nothing_but_its_variable(torch_process, tmp_path):
    """Kernels that loop over a number they computed: numpy 2.4 and Triton before 3.7."""
    pytest.importorskip("triton")
    program = """
import torch, vicostream_kernels as vk
x = torch.arange(80.0).view(2, 5, 8)
changed = vk.select_changed(x, x.flip(1), ratio=0.5, backend="triton")
rows = vk.gather_rows(x, changed.index, backend="triton")
assert torch.equal(rows, vk.gather_rows(x, changed.index, backend="reference"))
"""
    done = torch_process.run(program, tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
