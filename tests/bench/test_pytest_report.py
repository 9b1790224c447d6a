"""gpu-check's tests, rehearsed on a stand-in for CUDA: what a lost device, a hang and an end by
force leave of them."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

from vicostream_kernels.bench import gpu_plan, gpu_tests, steps
from vicostream_kernels.bench.steps import Outcome, run_steps

HEAD = """
import time
import pytest, torch

torch.lost = lost = getattr(torch, "lost", [])  # one device for all files

def synchronize():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize
pytestmark = pytest.mark.gpu
"""
#: The kernel of cuda is wrong; what fails waits for nothing, as a launch does.
LOSES = """
@pytest.mark.parametrize("n", range(8))
@pytest.mark.parametrize("backend", ["triton-cuda", "cuda-cuda"])
def test_kernel(backend, n):
    if backend == "cuda-cuda":
        lost.append(n)
"""


def run(
    folder: Path, *texts: str, processes: int = 0, hang_s: int = 60, timeout_s: float = 300
) -> tuple[Outcome, gpu_tests.Report]:
    (folder / "tests").mkdir()
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu: x\n  slow: x\n")
    for number, text in enumerate(texts):
        (folder / "tests" / f"test_{number}.py").write_text(HEAD + text)
    options = ("-n", str(processes), "--max-worker-restart=20") if processes else ()
    step = gpu_plan.tests_step(
        "pytest", gpu_tests.files(folder), options, folder / "logs", sys.executable,
        hang_s=hang_s, timeout_s=timeout_s, least_s=1,
    )  # fmt: skip
    (outcome,) = run_steps([step], budget_s=timeout_s, logs=folder / "logs", root=folder)
    return outcome, gpu_tests.read(gpu_plan.report_path(folder / "logs", "pytest"))


def test_each_fault_is_that_of_its_test_and_the_others_go_on(tmp_path):
    hangs = "def test_hangs(): time.sleep(50)\ndef test_b(): pass\n"
    broken = "raise ImportError('no such thing')"
    outcome, read = run(tmp_path, LOSES, hangs, broken, processes=2, hang_s=4)
    assert outcome.status == "failed" and read.bad()[0] in outcome.reason
    assert {test for test, what in read.outcomes.items() if what == "passed"} == {
        "tests/test_1.py::test_b",
        *(f"tests/test_0.py::test_kernel[triton-cuda-{n}]" for n in range(8)),
    }

    losers = [test for test in read.bad() if "illegal memory access" in read.texts[test]]
    assert all("cuda-cuda" in test and read.outcomes[test] == "failed" for test in losers)
    # After three the time belongs to the other kernels; one more may have begun by then.
    assert 3 <= len(losers) <= 4 and read.counts()["skipped"] == 8 - len(losers)
    assert any("3 tests of tests/test_0.py cuda have lost" in text for text in read.texts.values())

    hung = "tests/test_1.py::test_hangs"
    assert read.outcomes[hung] == "crashed" and "in test_hangs" in read.texts[hung], "its stacks"
    assert read.outcomes["tests/test_2.py"] == "error"
    assert read.texts["tests/test_2.py"].count("ImportError: no such thing") == 1
    assert set(read.bad()) == {*losers, hung, "tests/test_2.py"}


def test_without_more_processes_nothing_is_run_on_a_lost_device(tmp_path):
    _, read = run(tmp_path, LOSES)
    assert read.counts() == {"failed": 1}


def test_a_run_that_is_ended_leaves_what_failed_and_what_it_was_in(tmp_path, monkeypatch):
    report = gpu_plan.report_path(tmp_path / "logs", "pytest")
    begun = []

    def late() -> float:
        """Its time is up once one test has failed and two are running, however long that takes."""
        read = gpu_tests.read(report)
        if read.counts() and len(read.running) == 2:
            begun.append(True)
        return time.monotonic() + (1000 if begun else 0)

    monkeypatch.setattr(steps, "time", SimpleNamespace(monotonic=late, sleep=time.sleep))
    text = "def test_wrong(): assert 1 == 2, 'so wrong'\n"
    text += "".join(f"def test_slow_{n}(): time.sleep(120)\n" for n in range(3))
    outcome, read = run(tmp_path, text, processes=2, timeout_s=500)
    assert outcome.status == "timeout" and "1 failed" in outcome.reason
    assert read.outcomes["tests/test_0.py::test_wrong"] == "failed"
    assert "so wrong" in read.texts["tests/test_0.py::test_wrong"]
    assert "it was in tests/test_0.py::test_slow" in outcome.reason
