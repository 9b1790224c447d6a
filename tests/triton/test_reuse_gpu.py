"""What only a device can show of the Triton kernels of reuse."""

from __future__ import annotations

import pytest
import torch

from kit import interpreter
from kit.compare import assert_same_bits
from vicostream_kernels import gather_rows, merge_rows, select_changed

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(interpreter.ACTIVE, reason="in the interpreter nothing runs on a device"),
]


def layer(feature, reference, residual):
    changed = select_changed(feature, reference, ratio=0.25, threshold=0.1, backend="triton")
    rows = gather_rows(feature, changed.index, backend="triton")
    merged = merge_rows(reference, rows, changed.index, residual=residual, backend="triton")
    return [*changed, merged]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_captured_graph_replays_on_new_data(dtype):
    torch.manual_seed(0)
    shape = (4, 540, 1280)
    feature, residual = (torch.randn(shape, dtype=dtype, device="cuda") for _ in range(2))
    reference = torch.randn(shape[1:], dtype=dtype, device="cuda")
    layer(feature, reference, residual)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = layer(feature, reference, residual)
    amount = torch.rand(4, 540, 1, device="cuda")
    feature.copy_(reference + amount * torch.randn(shape, device="cuda"))
    graph.replay()
    for got, wanted in zip(replayed, layer(feature, reference, residual)):
        assert_same_bits(got, wanted)
    exact = select_changed(feature.cpu(), reference.cpu(), ratio=0.25, threshold=0.1)
    torch.testing.assert_close(replayed[2].cpu(), exact.similarity, rtol=1e-5, atol=1e-5)


def test_addresses_do_not_wrap_at_32_bits():
    far = torch.zeros(2**31 + 64, dtype=torch.float16, device="cuda")
    x = far.as_strided((1, 2, 8), (0, 2**31 + 8, 1))
    x[0, 1] = torch.arange(8, device="cuda")
    index = torch.tensor([[1]], dtype=torch.int32, device="cuda")
    assert_same_bits(gather_rows(x, index, backend="triton")[0, 0], x[0, 1].contiguous())
    none = torch.full((1, 1), -1, dtype=torch.int32, device="cuda")
    merged = merge_rows(x[0], torch.ones_like(x[:, :1]), none, backend="triton")
    assert_same_bits(merged[0, 1], x[0, 1].contiguous())
    same = select_changed(x, x, threshold=0.9, backend="triton")
    assert same.similarity.tolist() == [[1.0, 1.0]]
