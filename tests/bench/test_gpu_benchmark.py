"""gpu-check's benchmark, rehearsed on a CPU: the order, and a case that ends its process."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from vicostream_kernels.bench import gpu_benchmark, registry
from vicostream_kernels.bench.report import summary_lines
from vicostream_kernels.bench.results import read_json
from vicostream_kernels.bench.runner import Options

CPU = torch.device("cpu")
NAMES = ("append/a", "append/dies", "append/b", "append/loses", "append/hangs", "append/c")
#: Times NAMES in a process of its own, as `gpu_benchmark --time` does on a GPU.
TIMES = """
import os, sys, time
from pathlib import Path
import torch
import torch._dynamo  # which the first check imports, for seconds on a busy machine
from vicostream_kernels.bench import gpu_benchmark, runner
from vicostream_kernels.bench.registry import Case, Provider

lost, cpu = [], torch.device("cpu")

def synchronize():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access")

torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize

def double(inputs):
    return inputs["x"] * 2

def ours(name):
    def run(inputs):
        if name == "append/dies":
            os._exit(7)
        if name == "append/hangs":
            time.sleep(60)
        if name == "append/loses":
            lost.append(name)
            synchronize()
        return double(inputs)
    return run

def case(name):
    providers = [Provider("torch", double), Provider("ours:cuda", ours(name))]
    return Case(
        name, "append", "op", {}, torch.float32, 8, 1, lambda *_: {"x": torch.ones(4)},
        lambda device: providers, lambda inputs: {"out": double(inputs)},
        lambda inputs, result: {"out": result},
    )

runner.QUICK = runner.Budget(0.0, 4, 4)
gpu_benchmark._MOST_SECONDS = 10
asked = runner.Options(cpu, quick=True, caches=("warm",))
gpu_benchmark.time_cases(Path(sys.argv[1]), [case(name) for name in sys.argv[2:]], asked)
"""


def test_a_case_that_ends_its_process_takes_no_other_along(tmp_path, monkeypatch):
    command = [sys.executable, "-c", TIMES]
    monkeypatch.setattr(gpu_benchmark, "_command", lambda path, _: [*command, str(path), *NAMES])
    path = tmp_path / "benchmark.json"
    document = gpu_benchmark.time_all(path, [SimpleNamespace(name=name) for name in NAMES])
    rows = {(row.case, row.provider): row for row in document.rows}
    for name in ("append/a", "append/b", "append/c"):
        assert rows[name, "ours:cuda"].p50_us > 0, name
    assert "illegal memory access" in rows["append/loses", "ours:cuda"].reason
    assert rows["append/loses", "torch"].reason == "not timed: the device was lost"
    assert document.failed == {
        "append/dies": "did not come to its end: its process ended with 7",
        "append/hangs": "did not come to its end: its process ended with 1",
    }
    assert "FAILED: append/dies: did not come to its end" in "\n".join(summary_lines(document))
    assert not document.all_match and read_json(path).failed == document.failed
    assert not set(document.left_out) & set(NAMES)


def test_a_process_that_dies_before_its_first_case_is_not_tried_for_ever(tmp_path, monkeypatch):
    tries = []
    monkeypatch.setattr(gpu_benchmark, "_command", lambda *_: tries.append(1) or ["false"])
    cases = [SimpleNamespace(name="append/a")]
    document = gpu_benchmark.time_all(tmp_path / "benchmark.json", cases)
    assert document.left_out["append/a"] == "not reached" and not document.all_match
    assert len(tries) == 1


def test_what_the_goals_are_about_comes_first_and_smoke_cases_do_not_come():
    cases = gpu_benchmark.chosen(list(registry.load().values()))
    names = [case.name for case in cases]
    assert names[0].startswith("attention/decode-16s-") and names[0].endswith("/bfloat16")
    assert names[-1].startswith("reuse/vit-3b/4x4s-")
    assert not [case.name for case in cases if case.smoke]
    for pattern in (*gpu_benchmark._FIRST, *gpu_benchmark._LAST):
        assert any(gpu_benchmark.fnmatchcase(name, pattern) for name in names), pattern


@pytest.mark.parametrize("part", range(2))
def test_each_process_compiles_its_part_of_our_kernels_alone(toy, providers, monkeypatch, part):
    ran = []
    monkeypatch.setattr(gpu_benchmark, "_COMPILERS", 2)

    def ours(name):
        return lambda inputs: (ran.append(name), providers["raises"](inputs))

    cases = [
        toy(f"append/{n}", torch=lambda inputs: ran.append("torch"), ours_cuda=ours(n))
        for n in range(5)
    ]
    gpu_benchmark.compile_part(cases, part, Options(CPU))
    assert ran == [[0, 2, 4], [1, 3]][part]


def test_what_compiles_for_too_long_is_left_out_by_its_name():
    (case,) = (c for c in registry.load().values() if c.name.startswith("attention/prefill-2048q"))
    names = [p.name for p in case.providers(CPU)]
    assert set(gpu_benchmark._LEFT_OUT) - {"flashinfer"} <= set(names)
