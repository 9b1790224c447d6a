"""What only a device can show of Triton's prefill, windows and merge; `test_attention_decode.py`
has the same of decode."""

from __future__ import annotations

import pytest
import torch

import vicostream_kernels as vk
from kit import interpreter
from kit.compare import assert_same_bits

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(interpreter.ACTIVE, reason="in the interpreter nothing runs on a device"),
]


def calls(device="cuda", backend="triton"):
    """The ops by name, each a function that returns fresh tensors, and what they read."""
    torch.manual_seed(0)
    data = [torch.randn(320, 16, 128), *(torch.randn(40, 64, 2, 128) for _ in range(2))]
    x = torch.randn(256, 16, 80)
    q, k, v, x = (t.to(device, torch.bfloat16) for t in (*data, x))

    def ints(*values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    table = torch.randperm(40).int().to(device).view(2, 20)
    cu, kv_len = ints(0, 200, 320), ints(1270, 1100)
    windows, frames = ints(0, 64, 128, 192, 256), ints(0, 256)

    def prefill():
        return vk.sink_window_attention(
            q, k, v, table, cu, kv_len=kv_len, sink_tokens=4, window=600, max_seqlen_q=200,
            return_lse=True, backend=backend,
        )  # fmt: skip

    def varlen(cu=windows, longest=64):
        return vk.varlen_attention(
            x, x, x, cu, cu, max_seqlen_q=longest, max_seqlen_k=longest, backend=backend
        )

    def merge():
        out, lse = prefill()
        return vk.merge_states(out, lse, out.flip(0), lse.flip(0), backend=backend)

    ops = {
        "prefill": prefill,
        "windows": lambda: [varlen()],
        "frames": lambda: [varlen(frames, 256)],
        "merge": merge,
    }
    return ops, (q, k, v, x)


OPS = ("prefill", "windows", "frames", "merge")


@pytest.mark.parametrize("op", OPS)
def test_a_captured_graph_replays_on_new_data(op):
    ops, read = calls()
    ops[op]()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = ops[op]()
    for tensor in read:
        tensor.copy_(torch.randn(tensor.shape))
    graph.replay()
    for got, wanted in zip(replayed, ops[op](), strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("op", OPS)
def test_it_runs_on_the_callers_stream(op):
    ops, (q, _, _, x) = calls()
    fresh = q.clone(), x.clone()
    wanted = [t.clone() for t in ops[op]()]
    q.zero_(), x.zero_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # the copies below wait for it, so must the kernels
        q.copy_(fresh[0]), x.copy_(fresh[1])
        got = ops[op]()
    side.synchronize()
    for a, b in zip(got, wanted, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("op", OPS)
def test_nothing_waits_for_the_device(op):
    ops, _ = calls()
    ops[op]()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops[op]()
    finally:
        torch.cuda.set_sync_debug_mode("default")
