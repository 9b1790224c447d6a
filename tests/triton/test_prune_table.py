"""The small numbers that some prune calls put on the device, outside a capture and inside one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from vicostream_kernels.triton_kernels import _prune_layout as layout  # noqa: E402

VALUES = (4, 135, 0, 0, 0, 2, 17, 540, 4, 5)
CPU = torch.device("cpu")


def test_numbers_written_one_by_one_are_those_that_are_copied():
    assert torch.equal(layout.filled(VALUES, CPU).view(-1, 5), layout.constants(VALUES, 5, CPU))


def test_nothing_is_copied_from_the_host_in_a_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("made on the host"))
    written = torch.empty(10, dtype=torch.int32)
    monkeypatch.setattr(layout, "filled", lambda values, device: written)
    assert layout.constants(VALUES, 5, torch.device("cuda")).data_ptr() == written.data_ptr()


def test_nothing_is_kept_that_a_graph_could_still_read():
    assert layout.constants(VALUES, 5, CPU) is not layout.constants(VALUES, 5, CPU)
