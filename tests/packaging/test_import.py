"""Importing the package is cheap and pulls in nothing that may be missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import vicostream_kernels as vk
from vicostream_kernels import backends

PROGRAM = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.process_time()  # not the clock: other processes must not fail this
import vicostream_kernels
elapsed = time.process_time() - start
print(json.dumps({"ms": 1e3 * elapsed, "new": sorted(set(sys.modules) - before)}))
"""


def test_import_is_cheap_and_lazy(tmp_path):
    # As where pip has installed it: not the compiler's time, which the first try has.
    bytecode = {"PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}
    tries = []
    for _ in range(8):  # a busy machine makes some of them slow
        # Not a fork, which pays for each page of its parent that it writes to.
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], cwd=tmp_path, env={**os.environ, **bytecode},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        tries.append(json.loads(done.stdout))
        if tries[-1]["ms"] < 50:
            break
    new = {name.partition(".")[0] for name in tries[0]["new"]}
    lazy = {"triton", "transformers", "av", "typer", "rich", "matplotlib", "PIL", "safetensors"}
    assert not new & lazy
    assert "vicostream_kernels._C" not in tries[0]["new"]
    assert min(t["ms"] for t in tries) < 50


def test_every_public_name_is_there():
    for name in vk.__all__:
        assert getattr(vk, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = vk.missing


@pytest.mark.parametrize(
    "value, wanted",
    [("reference", "reference"), ("cpu", "cpu"), ("auto", "cpu"), ("cuda,reference", "reference")],
)
def test_the_environment_sets_what_auto_means(torch_process, tmp_path, value, wanted):
    program = (
        "from vicostream_kernels import backends as b; print(b.choose('rope_append','auto','cpu'))"
    )
    program = f"import vicostream_kernels; {program}"
    done = torch_process.run(program, tmp_path, VICO_BACKEND=value)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == wanted


def test_an_unknown_backend_in_the_environment_says_what_is_allowed(torch_process, tmp_path):
    done = torch_process.run("import vicostream_kernels", tmp_path, VICO_BACKEND="gpu")
    assert done.returncode != 0
    assert "VICO_BACKEND=gpu: 'gpu' is not one of auto, cuda, triton, cpu, reference" in done.stderr


def test_a_request_that_cannot_be_served_says_why_and_what_can(monkeypatch):
    with pytest.raises(vk.BackendUnavailable, match=r"cuda backend takes cuda tensors.*what can: "):
        backends.choose("rope_append", "cuda", "cpu")
    with pytest.raises(ValueError, match="backend='gpu' is not one of auto"):
        backends.choose("rope_append", "gpu", "cpu")
    missing = (None, "the compiled module _C is missing (no file)")
    monkeypatch.setattr(backends, "native", lambda: missing)
    backends.choose.cache_clear()
    assert backends.choose("rope_append", "auto", "cpu") == "reference"
    with pytest.raises(vk.BackendUnavailable, match="_C is missing"):
        backends.choose("rope_append", "cpu", "cpu")
    backends.choose.cache_clear()


def test_a_gpu_too_old_for_the_kernels_gets_the_reference(monkeypatch):
    monkeypatch.setattr(backends, "native", lambda: (SimpleNamespace(has_cuda=True), None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capability = (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    caches = (backends.choose, backends._triton_missing)
    try:
        for clear in caches:
            clear.cache_clear()
        assert backends.choose("rope_append", "auto", "cuda") == "reference"
        with pytest.raises(vk.BackendUnavailable, match=r"capability 8.0 and newer.* has 7.5"):
            backends.choose("rope_append", "cuda", "cuda")
        capability = (8, 6)
        backends.choose.cache_clear()
        assert backends.choose("rope_append", "auto", "cuda") == "cuda"
    finally:
        for clear in caches:
            clear.cache_clear()


def test_info_has_a_reason_for_every_gap():
    found = backends.info()
    words = {row["word"] for row in found["ops"]["cpu"]}
    assert words == set(backends.WORDS)
    for rows in found["ops"].values():
        for row in rows:
            assert row["backends"]["reference"] is None
            assert all(r is None or len(r) > 10 for r in row["backends"].values())


def test_a_stale_build_says_so():
    """Python files that are newer than ``_C`` ask it for what it does not have."""
    native, reason = backends.native()
    if native is None:
        pytest.skip(reason)
    with pytest.raises(AttributeError, match="no 'newer_kernel'.*older.*make build"):
        native.newer_kernel  # noqa: B018


def test_auto_passes_over_what_is_served_on_request_only(monkeypatch):
    """Decode in CUDA C++ until a GPU has shown it to be the faster one; and what it declines."""
    monkeypatch.setattr(backends, "missing", lambda *args: None)
    choose = backends.choose.__wrapped__
    op, declined = "sink_window_attention", "the cuda kernels serve decode"
    monkeypatch.setattr(backends, "AUTO", ("auto",))
    assert choose(op, "auto", "cuda") == "triton"
    assert choose(op, "cuda", "cuda") == "cuda"
    with pytest.raises(backends.BackendUnavailable, match=f"cuda: {declined}.*what can: triton"):
        choose(op, "cuda", "cuda", None, declined)
    monkeypatch.setattr(backends, "AUTO", ("cuda", "auto"))
    assert choose(op, "auto", "cuda") == "cuda"
    assert choose(op, "auto", "cuda", None, declined) == "triton"
    monkeypatch.setattr(backends, "AUTO", ("auto",))
    assert choose("topk_blocks", "auto", "cuda") == "cuda"
    assert choose("topk_blocks", "auto", "cuda", None, "it is softmax") != "cuda"
