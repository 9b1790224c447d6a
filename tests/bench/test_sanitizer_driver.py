"""The driver runs the smoke cases that have a native kernel, and tells right from wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vicostream_kernels import backends
from vicostream_kernels.bench import sanitizer_driver

CPU = torch.device("cpu")


def test_only_smoke_cases_with_a_native_kernel_are_work(toy, providers):
    native = toy("append/a", torch=providers["double"], ours_cuda=providers["double"])
    large = toy("append/b", smoke=False, ours_cuda=providers["double"], torch=providers["double"])
    without = toy("append/c", torch=providers["double"])
    work = sanitizer_driver.work([native, large, without], CPU)
    assert [(case.name, provider.name) for case, provider in work] == [("append/a", "ours:cuda")]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("double", ""),
        ("off_by_little", "doubled: relative error"),
        ("raises", "raised RuntimeError: no such kernel"),
    ],
)
def test_a_run_is_judged(toy, providers, name, fault):
    case = toy(torch=providers["double"], ours_cuda=providers[name])
    (found,) = sanitizer_driver.work([case], CPU)
    said = sanitizer_driver.run_once(*found, CPU)
    assert said == fault if not fault else said.startswith(fault)


@pytest.fixture
def four(toy, providers):
    """The second of append raises; another op follows."""
    runs = [providers[name] for name in ("double", "raises", "double")]
    cases = [
        toy(f"append/{at}", torch=providers["double"], ours_cuda=run) for at, run in enumerate(runs)
    ]
    cases.append(replace(cases[0], name="append/other", op="the_other_op"))
    return sanitizer_driver.work(cases, CPU)


def test_one_kernel_that_raises_does_not_end_the_others(four, capsys):
    assert sanitizer_driver.run_all(four, CPU) == 1
    said = capsys.readouterr().out
    assert "FAULT toy_op append/1 raised RuntimeError: no such kernel" in said
    assert "ran toy_op append/2" in said and "ran the_other_op append/other" in said
    assert said.splitlines()[-1] == "sanitizer_driver: 4 kernels, 1 faults"


def test_after_a_lost_device_other_ops_go_on_in_another_process(four, capsys, monkeypatch):
    started = []
    monkeypatch.setattr(
        sanitizer_driver, "why_lost", lambda: "lost" if "append/1" in heard() else ""
    )
    monkeypatch.setattr(sanitizer_driver.subprocess, "run", started.append)
    texts = []

    def heard() -> str:
        texts.append(capsys.readouterr().out)
        return "".join(texts)

    # append/1 is the second to run.
    assert sanitizer_driver.run_all(sorted(four, key=lambda each: each[0].name), CPU) == 1
    said = heard()
    assert "sanitizer_driver: 2 kernels, 1 faults" in said
    assert "not run toy_op append/2" in said
    ((*_, module, option, op),) = started
    assert (module, option, op) == (sanitizer_driver.__name__, "--ops", "the_other_op")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert sanitizer_driver.main([]) == 3
    assert "no CUDA device" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_every_native_kernel_is_right():
    device = torch.device("cuda")
    work = sanitizer_driver.work(sanitizer_driver.all_cases(), device)
    native = {op for op, known in backends.OPS.items() if "cuda" in known.implementations}
    assert {case.op for case, _ in work} >= native
    for case, provider in work:
        assert sanitizer_driver.run_once(case, provider, device) == "", case.name
