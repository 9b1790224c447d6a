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


def appended(pools: torch.Tensor) -> None:
    """A token into each layer's pages."""
    kv, ids = torch.ones(1, 1, 8), ints(3, 1)
    for layer in range(pools.shape[1]):
        k_pages, v_pages = pools[0, layer], pools[1, layer]
        vico.rope_append(kv, kv, kv * 2, ids, torch.ones(4), None, k_pages, v_pages, ids[0])


@pytest.mark.parametrize("static", [True, False])
def test_inductor_puts_every_layer_into_its_own_pages_or_says_that_it_would_not(static):
    """At a second size of the pool dynamo makes sizes and offsets symbols; inductor then takes the
    offset of what is written for 0."""
    compiled = torch.compile(appended, fullgraph=True)
    for pages in (2, 3):
        pools, expected = torch.zeros(2, 2, 3, pages, 4, 1, 8).unbind()
        appended(expected)
        if static:
            torch._dynamo.mark_static(pools)
        elif pages == 3:
            with pytest.raises(RuntimeError, match=r"v_pages is written.*198068.*mark_static"):
                compiled(pools)
            return
        compiled(pools)
        assert expected.any() and torch.equal(pools, expected)
