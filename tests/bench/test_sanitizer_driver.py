"""The driver runs the smoke cases that have a native kernel, and tells right from wrong."""

from __future__ import annotations

import pytest
import torch

from vicostream_kernels.bench import registry, sanitizer_driver

CPU = torch.device("cpu")


def test_only_smoke_cases_with_a_native_kernel_are_work(toy, providers):
    native = toy("append/a", torch=providers["double"], ours_cuda=providers["double"])
    large = toy("append/b", smoke=False, ours_cuda=providers["double"], torch=providers["double"])
    without = toy("append/c", torch=providers["double"])
    work = sanitizer_driver.work([native, large, without], CPU)
    assert [(case.name, provider.name) for case, provider in work] == [("append/a", "ours:cuda")]


@pytest.mark.parametrize(
    ("name", "fault"), [("double", ""), ("off_by_little", "doubled: relative error")]
)
def test_a_run_is_judged(toy, providers, name, fault):
    case = toy(torch=providers["double"], ours_cuda=providers[name])
    (found,) = sanitizer_driver.work([case], CPU)
    said = sanitizer_driver.run_once(*found, CPU)
    assert said == fault if not fault else said.startswith(fault)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert sanitizer_driver.main() == 3
    assert "no CUDA device" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_every_native_kernel_is_right():
    device = torch.device("cuda")
    work = sanitizer_driver.work(list(registry.load().values()), device)
    wanted = {"rope_append", "sink_window_attention", "topk_blocks", "topk_pages", "select_pages"}
    assert {case.op for case, _ in work} >= wanted
    for case, provider in work:
        assert sanitizer_driver.run_once(case, provider, device) == "", case.name
