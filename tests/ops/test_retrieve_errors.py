"""What retrieval refuses, and what it says then."""

from __future__ import annotations

import pytest
import torch
from retrieve_keys import paged_keys

import vicostream_kernels as vico
from vicostream_kernels import checks
from vicostream_kernels.ops.append import KeySummary


def good() -> dict:
    return {
        "query": torch.zeros(2, 4, 8), "summary": torch.zeros(2, 5, 2, 8), "k": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    "change,error,match",
    [
        ({"query": [1.0]}, TypeError, "query must be a tensor.*list"),
        ({"query": None}, TypeError, "query must be a tensor.*NoneType"),
        ({"query": torch.zeros(2, 4, 8).int()}, TypeError, "query has dtype int32"),
        ({"query": torch.zeros(3, 4, 8)}, ValueError, r"summary has shape .*S=3"),
        ({"query": torch.zeros(2, 3, 8)}, ValueError, "H=3 heads.*multiple of.*G=2"),
        ({"query": torch.zeros(2, 4, 12), "summary": torch.zeros(2, 5, 2, 12)}, ValueError, "head dim 12"),  # noqa: E501
        ({"query": torch.zeros(2, 8)}, ValueError, "summary must have 3 dim"),
        ({"query": torch.zeros(8)}, ValueError, r"query must have 2 dimensions \[S, D\] or 3"),
        ({"query": torch.zeros(2, 0), "summary": torch.zeros(2, 5, 0)}, ValueError, "D, .*=0 is"),
        ({"query": torch.zeros(2, 8), "scope": "kv_head"}, ValueError, "has no heads.*kv_head"),
        ({"summary": torch.zeros(2, 5, 2, 16)}, ValueError, "summary has shape"),
        ({"summary": (torch.zeros(2, 5, 1, 2, 8),) * 2}, ValueError, "a mean.*, a pair 'bound'"),
        ({"summary": torch.zeros(2, 5, 1, 2, 8)}, ValueError, "summary must have 4 dim"),
        ({"summary": (torch.zeros(2, 5, 1, 2, 8),) * 3}, ValueError, "one tensor or .*3 parts"),
        ({"score": "bound", "summary": torch.zeros(2, 5, 1, 2, 8)}, ValueError, "needs a .kmin, kmax"),  # noqa: E501
        ({"score": "bound", "summary": KeySummary.empty(5, 2, 8)}, ValueError, "needs a KeySummary with kmin"),  # noqa: E501
        ({"score": "l2"}, ValueError, "score='l2'.*'dot'"),
        ({"pool": "sum"}, ValueError, "pool='sum'"),
        ({"scope": "layer"}, ValueError, "scope='layer'"),
        ({"sm_scale": 0.1}, ValueError, "sm_scale=0.1 needs pool='softmax'"),
        ({"k": None}, ValueError, "exactly one of k, ratio, mass, token_budget, got none"),
        ({"ratio": 0.5}, ValueError, "exactly one of.*got k, ratio"),
        ({"k": 0}, ValueError, "k=0 is outside"),
        ({"k": None, "ratio": 0.0}, ValueError, r"ratio=0.0 is outside \(0, 1\]"),
        ({"k": None, "mass": 1.5}, ValueError, "mass=1.5 is outside"),
        ({"k": None, "ratio": float("nan")}, ValueError, "ratio=nan"),
        ({"k": None, "token_budget": 64}, ValueError, "token_budget=64 needs block_tokens"),
        ({"k": None, "token_budget": -1, "block_tokens": 4}, ValueError, "token_budget=-1"),
        ({"k": None, "token_budget": 64, "block_tokens": 0}, ValueError, "block_tokens=0"),
        ({"block_tokens": 16}, ValueError, "block_tokens goes with token_budget.*got k=2"),
        ({"k": None, "mass": 0.5, "block_tokens": 3}, ValueError, "block_tokens goes with"),
        ({"k": 3, "group": 2}, ValueError, "k=3 counts blocks.*group=2"),
        ({"group": 0}, ValueError, "group=0"),
        ({"min_k": -1}, ValueError, "min_k=-1"),
        ({"force_last": -1}, ValueError, "force_last=-1"),
        ({"max_blocks": 0}, ValueError, "max_blocks=0 is less than"),
        ({"max_blocks": 2, "force_first": 2, "force_last": 1}, ValueError, "max_blocks=2.*3 blocks"),  # noqa: E501
        ({"num_blocks": torch.tensor([1, 2])}, TypeError, "num_blocks has dtype int64"),
        ({"num_blocks": torch.zeros(3).int()}, ValueError, "num_blocks has shape"),
        ({"cu_seqlens": torch.zeros(2).int()}, ValueError, r"cu_seqlens has 2 entries.*S\+1=3"),
        ({"external_score": torch.zeros(2, 5)}, ValueError, "takes the place of query"),
        ({"backend": "gpu"}, ValueError, "backend='gpu'"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, error, match):
    given = {**good(), **change}
    with pytest.raises(error, match=match):
        vico.topk_blocks(given.pop("query"), given.pop("summary"), **given)


@pytest.mark.parametrize(
    "change,error,match",
    [
        ({"kind": "max"}, ValueError, "kind='max'"),
        ({"sub": 6, "kind": "minmax"}, ValueError, r"sub=6 is outside \[1, 5\]"),
        ({"sub": 2}, ValueError, "sub=2 needs kind='minmax'"),
        ({"page_fill": torch.zeros(4).int()}, ValueError, "page_fill has shape .*P=11"),
        ({"block_pages": torch.zeros(1, 2, 3)}, TypeError, "block_pages has dtype float32"),
        ({"k_pages": torch.zeros(11, 5, 2, 12)}, ValueError, "head dim 12"),
    ],
)
def test_bad_summaries_are_named(change, error, match):
    k_pages, table, fill = paged_keys(torch.float32)
    with pytest.raises(error, match=match):
        vico.summarize_blocks(
            **{"k_pages": k_pages, "block_pages": table, "page_fill": fill, **change}
        )  # noqa: E501


def test_check_mode_reads_values(monkeypatch):
    monkeypatch.setattr(checks, "CHECK_VALUES", True)
    given = good()
    query, summary, k = given["query"], given["summary"], 2
    with pytest.raises(ValueError, match=r"num_blocks=\[6, 0\] must lie in \[0, NB=5\]"):
        vico.topk_blocks(query, summary, k=k, num_blocks=torch.tensor([6, 0], dtype=torch.int32))
    cu = torch.tensor([0, 2, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens=.0, 2, 1. must ascend"):
        vico.topk_blocks(query, summary, k=k, cu_seqlens=cu)
    cu = torch.tensor([0, 2, 2], dtype=torch.int32)
    with pytest.warns(RuntimeWarning, match="5 blocks score NaN"):  # no tokens: defined, and empty
        vico.topk_blocks(query, summary, k=k, cu_seqlens=cu)
    sizes = torch.tensor([[1, 1, -3, 1, 1]] * 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="block_tokens holds -3"):
        vico.topk_blocks(query, summary, token_budget=4, block_tokens=sizes)
    summary[1, 3, 0, 0] = torch.nan
    with pytest.warns(RuntimeWarning, match=r"1 blocks score NaN.*\[\[1, 3\]\]"):
        assert vico.topk_blocks(query, summary, k=5).block_index[1].tolist() == [0, 1, 2, 3, 4]
    k_pages, table, fill = paged_keys(torch.float32)
    with pytest.raises(ValueError, match=r"block_pages holds 99, allowed: -1 or \[0, 11\)"):
        vico.summarize_blocks(k_pages, table, fill)
    whole = table.clamp(max=10)
    with pytest.raises(ValueError, match=r"page_fill holds -1, allowed: \[0, \d+\)"):
        vico.summarize_blocks(k_pages, whole, torch.full_like(fill, -1))
    index = torch.tensor([[0, 7]] * 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"block_index holds 7, allowed: -1 or \[0, 4\)"):
        vico.select_pages(index, table)
    with pytest.raises(ValueError, match="sink_pages holds -2, allowed: -1 or 0 and more"):
        vico.select_pages(index.clamp(max=3), table, torch.full((2, 1), -2, dtype=torch.int32))
