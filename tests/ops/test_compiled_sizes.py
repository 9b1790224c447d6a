"""torch.compile in one graph where sizes are symbols, or known from data alone."""

from __future__ import annotations

import pytest
import torch

import vicostream_kernels as vico
from kit import tensors
from kit.poison import unpoisoned
from vicostream_kernels import checks

RULE = vico.PruneRule(threshold=0.5)


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with unpoisoned(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield
    torch._dynamo.reset()


CASES = {
    "prune_tokens": lambda x: vico.prune_tokens(x, ints(3, *x.shape[:2]), rule=RULE).tokens,
    "select_changed": lambda x: (
        vico.select_changed(
            x, x[:, 1:].new_zeros(x.shape), threshold=0.5, max_changed=x.shape[1]
        ).index
    ),
    "topk_blocks": lambda x: (
        vico.topk_blocks(
            None, None, external_score=x[:, :, 0], token_budget=9, block_tokens=x.shape[1]
        ).block_index
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_sizes_that_change_from_call_to_call(name):
    compiled = torch.compile(CASES[name], fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 6, 7):
        x = tensors.randn((3, n, 8), seed=n).contiguous()
        assert torch.equal(compiled(x), CASES[name](x))


def test_sizes_that_only_the_data_know():
    pages = torch.zeros(1, 4, 1, 8)

    def attend(q, kept, ends):
        return vico.sink_window_attention(
            q[kept], pages, pages, ints(1, 1), ends, kv_len=ints(1) + 4
        )

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    q, kept = tensors.randn((5, 2, 8), seed=1), torch.tensor([1, 0, 1, 1, 0]).bool()
    ends = torch.tensor([0, 3], dtype=torch.int32)
    assert compiled(q, kept, ends).shape == (3, 2, 8)


def test_fx_traces_an_op():
    index = ints(2, 3)
    graph = torch.fx.symbolic_trace(lambda x: vico.gather_rows(x, index)).graph
    called = [node.target for node in graph.nodes]
    assert torch.ops.vicostream.gather_rows.default in called


@pytest.mark.parametrize(
    ("size", "stride", "apart"),
    [
        ((4, 2, 8), (16, 8, 1), True),
        ((2, 4, 8), (8, 16, 1), True),
        ((4, 1, 8), (8, 3, 1), True),
        ((0, 5, 8), (8, 0, 1), True),
        ((4, 2, 8), (8, 8, 1), False),
        ((4, 8), (0, 1), False),
        ((4, 8), (7, 1), False),
    ],
)
def test_places_of_written_tensors(size, stride, apart):
    x = torch.zeros(100).as_strided(size, stride)
    if apart:
        checks.check_last_dim_dense("op", x=x)
    else:
        with pytest.raises(ValueError, match="x is written in place and several elements share"):
            checks.check_last_dim_dense("op", x=x)
