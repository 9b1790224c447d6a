"""What only a device can show of the Triton kernels of retrieve."""

from __future__ import annotations

import pytest
import torch

from kit import interpreter
from kit.compare import assert_same_bits
from vicostream_kernels import select_pages, summarize_blocks, topk_blocks

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(interpreter.ACTIVE, reason="in the interpreter nothing runs on a device"),
]


@pytest.mark.parametrize("rule", [{"k": 64}, {"ratio": 0.1}, {"mass": 0.5}], ids=str)
@pytest.mark.parametrize("pool", ["mean", "max", "softmax"])
def test_a_captured_graph_replays_on_new_data(pool, rule):
    random = torch.Generator(device="cuda").manual_seed(0)
    keys = torch.randn(600, 16, 4, 128, generator=random, dtype=torch.bfloat16, device="cuda")
    query = torch.randn(5, 28, 128, generator=random, dtype=torch.bfloat16, device="cuda")
    table = torch.arange(600, dtype=torch.int32, device="cuda").view(1, 300, 2)
    fill = torch.full((600,), 16, dtype=torch.int32, device="cuda")
    cu = torch.tensor([0, 5], dtype=torch.int32, device="cuda")

    def run():
        means = summarize_blocks(keys, table, fill, backend="triton")
        found = topk_blocks(
            query, means, pool=pool, scope="kv_head", cu_seqlens=cu, backend="triton", **rule
        )
        pages = select_pages(found.block_index, table, backend="triton")
        return means, found.block_index, found.count, found.scores, pages

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run()
    keys.copy_(torch.randn(keys.shape, generator=random, device="cuda"))
    graph.replay()
    for got, wanted in zip(replayed, run()):
        assert_same_bits(got, wanted)
