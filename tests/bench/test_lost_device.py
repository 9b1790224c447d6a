"""A lost device is told from one that is not used and from an error that is told once."""

from __future__ import annotations

import pytest
import torch

from vicostream_kernels.bench.lost_device import first_line, why_lost


@pytest.mark.parametrize(("errors", "lost"), [(0, False), (1, False), (9, True)])
def test_only_an_error_that_stays_is_a_lost_device(monkeypatch, errors, lost):
    told = []

    def synchronize():
        told.append(True)
        if len(told) <= errors:
            raise RuntimeError("CUDA error: unspecified launch failure\nmore")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    said = "RuntimeError: CUDA error: unspecified launch failure"
    assert why_lost() == (said if lost else "")


def test_a_process_that_does_not_use_the_device_does_not_begin_to(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: pytest.fail("used"))
    assert why_lost() == ""


def test_an_error_without_a_text_has_a_name():
    assert first_line(KeyError()) == "KeyError: "
