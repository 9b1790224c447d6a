"""Which tests are for a GPU, which come first, and what is read from a report of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vicostream_kernels.bench import gpu_tests

ROOT = Path(__file__).parents[2]


def test_no_file_with_a_test_for_a_gpu_is_left_out(request):
    """Of all that this run has collected: in the whole suite that is every one."""
    found = {*gpu_tests.files(ROOT), *gpu_tests.ALONE}
    assert {"tests/triton/test_append_gpu.py", "tests/pipeline/test_gpu.py"} <= found
    assert "tests/bench/test_stats.py" not in found
    marked = {item.path for item in request.session.items if item.get_closest_marker("gpu")}
    assert {path.relative_to(ROOT).as_posix() for path in marked} <= found


def test_what_no_other_machine_can_tell_comes_first():
    in_order = [
        "tests/ops/test_append.py::test_a[torch.float32-cuda-cuda]",
        "tests/triton/test_append_gpu.py::test_a",
        "tests/pipeline/test_gpu.py::test_a[vicostream]",
        "tests/ops/test_append.py::test_a[torch.float32-triton-cuda]",
        "tests/ops/test_attention_properties.py::test_a[triton-cuda]",
    ]
    assert sorted(reversed(in_order), key=gpu_tests.importance) == in_order


@pytest.mark.parametrize(
    ("test", "backend"),
    [
        ("a.py::test[cuda-cuda]", "cuda"),
        ("a.py::test[cuda]", "cuda"),
        ("a.py::test[torch.float32-triton-cuda-3]", "triton"),
        ("a.py::test_cuda[vicostream]", ""),
    ],
)
def test_the_backend_is_read_from_the_parameters(test, backend):
    assert gpu_tests.backend_of(test) == backend


def report(tmp_path: Path, *lines: tuple, end: str = "") -> gpu_tests.Report:
    path = tmp_path / "report.jsonl"
    keys = ("test", "outcome", "seconds", "text")
    written = [json.dumps(dict(zip(keys, line))) for line in lines]
    path.write_text("\n".join([*written, end]))
    return gpu_tests.read(path)


def test_a_report_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path):
    lines = ("a", "started"), ("a", "passed", 2.0, ""), ("a", "ended"), ("b", "started")
    read = report(tmp_path, *lines, end='{"test": "b", "outc')
    assert read.outcomes == {"a": "passed"} and read.running == ["b"]
    assert gpu_tests.read(tmp_path / "none") == gpu_tests.Report()


def test_the_worst_that_was_said_of_a_test_counts_and_nothing_is_lost(tmp_path):
    read = report(
        tmp_path,
        ("a", "passed", 1.0, ""),
        ("a", "error", 0.5, "in the teardown"),
        ("b", "failed", 1.0, "wrong"),
        ("b", "crashed", 0.0, "its worker died"),
        ("c", "started"),
        ("c", "crashed", 0.0, "its worker died"),
        ("d", "skipped", 0.0, "no such kernel"),
        ("e", "skipped", 0.0, "no such kernel"),
    )
    assert read.counts() == {"error": 1, "failed": 1, "crashed": 1, "skipped": 2}
    assert read.bad() == ["a", "b", "c"] and read.running == []
    data = read.as_dict()
    assert data["bad"][1] == {"test": "b", "outcome": "failed", "text": "wrong\nits worker died"}
    assert data["skipped"] == {"no such kernel": 2} and data["slowest"]["a"] == 1.5


def test_long_texts_keep_their_end(tmp_path):
    data = report(tmp_path, ("a", "failed", 1.0, "x" * 10_000 + "AssertionError")).as_dict()
    assert len(data["bad"][0]["text"]) < 3000
    assert data["bad"][0]["text"].endswith("AssertionError")
