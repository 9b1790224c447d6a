"""Bad input to the attention ops: the error names the argument, and nothing has been written."""

from __future__ import annotations

import re

import pytest
import torch
from attention_oracle import inverse_frequencies, make_case

import vicostream_kernels as vk
from vicostream_kernels import checks


def good() -> dict:
    """Arguments of a call of two streams that is right; unused slots are finite here."""
    case = make_case([3, 2], [[4, 1, 3], [5, 0, -1]], kv_len=[11, 8])
    case.k_pages.nan_to_num_(0.0)
    case.v_pages.nan_to_num_(0.0)
    fields = ("q", "k_pages", "v_pages", "page_table", "cu_seqlens_q")
    return {**{name: getattr(case, name) for name in fields}, **case.options}


def ints(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.int32)


FILL = ints(12) * 4
SHIFT = {"page_shift": ints(2, 3, 3), "inv_freq": inverse_frequencies(16)}

BAD = [
    ({"q": "x"}, TypeError, "q must be a tensor, got str"),
    ({"q": torch.zeros(5, 4)}, ValueError, "q must have 3 dimensions [Q, H, d]"),
    ({"q": torch.zeros(5, 4, 16, dtype=torch.float64)}, TypeError, "q has dtype float64"),
    ({"q": torch.zeros(5, 4, 12)}, ValueError, "head dim 12 must be a multiple of 8"),
    ({"q": torch.zeros(5, 4, 264)}, ValueError, "head dim 264 must be a multiple of 8"),
    ({"q": torch.zeros(5, 3, 16)}, ValueError, "q has 3 heads, expected a multiple of the 2"),
    ({"q": torch.zeros(5, 4, 16).half()}, TypeError, "k_pages has dtype float32"),
    ({"k_pages": torch.zeros(12, 4, 2, 8)}, ValueError, "k_pages has shape (12, 4, 2, 8)"),
    ({"k_pages": torch.zeros(12, 4, 0, 16)}, ValueError, "v_pages has shape"),
    (
        {"k_pages": torch.zeros(12, 0, 2, 16), "v_pages": torch.zeros(12, 0, 2, 16)},
        ValueError,
        "k_pages has page size 0",
    ),
    ({"v_pages": torch.zeros(11, 4, 2, 16)}, ValueError, "v_pages has shape (11, 4, 2, 16)"),
    ({"v_pages": torch.zeros(12, 4, 2, 16).bfloat16()}, TypeError, "v_pages has dtype bfloat16"),
    ({"page_table": ints(2, 3).long()}, TypeError, "page_table has dtype int64"),
    ({"page_table": [[1]]}, TypeError, "page_table must be a tensor, got list"),
    ({"kv_len": [11, 8]}, TypeError, "kv_len must be a tensor or None, got list"),
    ({"out": "x"}, TypeError, "out must be a tensor, got str"),
    ({"page_table": ints(2)}, ValueError, "page_table must have 2 dimensions"),
    (
        {"page_table": ints(2, 3, 3), "page_fill": FILL, "kv_len": None},
        ValueError,
        "page_table has shape (2, 3, 3), expected [S, L], [S, 2, L]",
    ),
    ({"page_table": ints(2, 2, 3)}, ValueError, "per-head tables need page_fill"),
    ({"cu_seqlens_q": ints(2)}, ValueError, "cu_seqlens_q has shape (2,), expected [S+1=3]"),
    ({"cu_seqlens_q": ints(3).long()}, TypeError, "cu_seqlens_q has dtype int64"),
    (
        {"kv_len": None},
        ValueError,
        "exactly one of kv_len and page_fill must be given, got neither",
    ),
    (
        {"page_fill": FILL},
        ValueError,
        "exactly one of kv_len and page_fill must be given, got both",
    ),
    ({"kv_len": ints(3)}, ValueError, "kv_len has shape (3,)"),
    ({"kv_len": ints(2).float()}, TypeError, "kv_len has dtype float32"),
    ({"kv_len": None, "page_fill": ints(5)}, ValueError, "page_fill has shape (5,)"),
    ({"kv_len": None, "page_fill": FILL.long()}, TypeError, "page_fill has dtype int64"),
    ({"sink_tokens": -1}, ValueError, "sink_tokens=-1 is outside [0, inf]"),
    ({"window": -1}, ValueError, "window=-1 is outside [0, inf]"),
    ({"window_start": ints(1)}, ValueError, "window_start has shape (1,)"),
    ({"window_start": ints(2).long()}, TypeError, "window_start has dtype int64"),
    ({"sm_scale": float("nan")}, ValueError, "sm_scale=nan must be finite"),
    ({"sm_scale": float("inf")}, ValueError, "sm_scale=inf must be finite"),
    ({"sink_logits": torch.zeros(2)}, ValueError, "sink_logits has shape (2,)"),
    ({"sink_logits": ints(4)}, TypeError, "sink_logits has dtype int32"),
    ({**SHIFT, "inv_freq": None}, ValueError, "page_shift needs inv_freq"),
    ({**SHIFT, "page_shift": ints(2, 3)}, ValueError, "page_shift must have 3 dimensions"),
    ({**SHIFT, "page_shift": ints(2, 4, 3)}, ValueError, "page_shift has shape (2, 4, 3)"),
    ({**SHIFT, "page_shift": ints(2, 3, 2)}, ValueError, "page_shift has shape (2, 3, 2)"),
    ({**SHIFT, "page_shift": ints(2, 3, 3).long()}, TypeError, "page_shift has dtype int64"),
    ({**SHIFT, "inv_freq": torch.zeros(16)}, ValueError, "inv_freq has shape (16,)"),
    ({**SHIFT, "inv_freq": torch.zeros(8).double()}, TypeError, "inv_freq has dtype float64"),
    ({**SHIFT, "mrope_section": [4, 2, 1]}, ValueError, "mrope_section=[4, 2, 1] must be"),
    ({**SHIFT, "mrope_section": [8]}, ValueError, "mrope_section=[8] must be"),
    ({**SHIFT, "mrope_section": [9, -1, 0]}, ValueError, "mrope_section=[9, -1, 0] must be"),
    ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q=-1 is outside"),
    ({"out": torch.zeros(4, 4, 16)}, ValueError, "out has shape (4, 4, 16)"),
    ({"out": torch.zeros(5, 4, 16).half()}, TypeError, "out has dtype float16"),
    ({"out": torch.zeros(5, 16, 4).mT}, ValueError, "out is written in place and needs a dense"),
    ({"q": torch.zeros(5, 4, 16, device="meta")}, ValueError, "k_pages is on cpu"),
    ({"backend": "fastest"}, ValueError, "backend='fastest' is not one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m[:40] for _, _, m in BAD])
def test_sink_window_attention(change, error, message):
    arguments = {"out": torch.full((5, 4, 16), 7.0), **good(), **change}
    with pytest.raises(error, match=re.escape(message)):
        vk.sink_window_attention(**arguments)
    if "out" not in change:
        assert arguments["out"].eq(7.0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_table": torch.tensor([[4, 1, 12], [5, 0, -1]])}, "page_table holds 12, allowed"),
        ({"page_table": torch.tensor([[4, 1, 3], [5, -2, 0]])}, "page_table holds -2, allowed"),
        ({"kv_len": torch.tensor([13, 8])}, "kv_len[0]=13, allowed: 0 to 12"),
        ({"kv_len": torch.tensor([12, 9])}, "kv_len[1]=9, allowed: 0 to 8"),
        ({"kv_len": torch.tensor([-1, 8])}, "kv_len[0]=-1, allowed: 0 to 12"),
        ({"kv_len": None, "page_fill": FILL + 1}, "page_fill of a listed page holds 5, allowed"),
        ({"kv_len": None, "page_fill": FILL - 5}, "page_fill of a listed page holds -1, allowed"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 6])}, "cu_seqlens_q=[0, 3, 6] must start at 0"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 2])}, "cu_seqlens_q=[0, 3, 2] must start at 0"),
        ({"cu_seqlens_q": torch.tensor([1, 3, 5])}, "cu_seqlens_q=[1, 3, 5] must start at 0"),
    ],
    ids=str,
)
def test_values_are_checked_on_request(monkeypatch, change, message):
    change = {k: v.int() if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    arguments = {**good(), **change}
    unchecked = vk.sink_window_attention(**arguments)  # skipped or cut, never an error
    assert unchecked.isfinite().all()
    monkeypatch.setattr(checks, "CHECK_VALUES", True)
    with pytest.raises(ValueError, match=re.escape(message)):
        vk.sink_window_attention(**arguments)
    assert vk.sink_window_attention(**good()).isfinite().all()
    unlisted = torch.tensor([4, 4, 99, 4, 4, 4, -9] + [99] * 5, dtype=torch.int32)
    assert vk.sink_window_attention(**{**good(), "kv_len": None, "page_fill": unlisted}).any()


def test_check_mode_looks_at_what_streams_with_queries_reach(monkeypatch):
    """A captured graph is replayed with the tables of streams that have none this time."""
    monkeypatch.setattr(checks, "CHECK_VALUES", True)
    arguments = good()
    # Eleven tokens in three pages and eight in two; then a stream without rows.
    arguments["page_table"] = torch.tensor([[4, 1, 3, 99], [5, 0, -7, 99], [99, -5, 1, 2]]).int()
    arguments["cu_seqlens_q"] = torch.cat((arguments["cu_seqlens_q"], torch.tensor([5]).int()))
    arguments["kv_len"] = torch.tensor([11, 8, 77], dtype=torch.int32)
    assert torch.equal(vk.sink_window_attention(**arguments), vk.sink_window_attention(**good()))
    fills = {**arguments, "kv_len": None, "page_fill": FILL}
    with pytest.raises(ValueError, match="page_table holds 99, allowed"):
        vk.sink_window_attention(**fills)
    fills["page_table"] = fills["page_table"].where(fills["page_table"].abs() < 9, -1).clamp(-1)
    fills["page_table"][2] = 99
    assert vk.sink_window_attention(**fills).isfinite().all()


@pytest.mark.parametrize("name", ["q", "k_pages", "v_pages"])
def test_check_mode_finds_results_that_lie_in_what_is_read(monkeypatch, name):
    monkeypatch.setattr(checks, "CHECK_VALUES", True)
    arguments = good()
    q = arguments["q"].contiguous()
    arguments |= {"q": q, "out": torch.empty_like(q)}
    assert vk.sink_window_attention(**arguments).isfinite().all()
    dense = arguments[name].contiguous()
    arguments |= {name: dense, "out": dense.flatten()[: q.numel()].view(q.shape)}
    with pytest.raises(ValueError, match=f"out is written and shares memory with {name}"):
        vk.sink_window_attention(**arguments)


def varlen() -> dict:
    made = {name: torch.ones(5, 2, 16) for name in ("q", "k", "v")}
    cu = torch.tensor([0, 3, 5], dtype=torch.int32)
    return {**made, "cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 3, "max_seqlen_k": 3}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cu_seqlens_k": [0, 3, 5]}, TypeError, "cu_seqlens_k must be a tensor, got list"),
        ({"q": torch.zeros(5, 32)}, ValueError, "q must have 3 dimensions [Nq, H, d]"),
        ({"q": torch.zeros(5, 2, 16).int()}, TypeError, "q has dtype int32"),
        ({"q": torch.zeros(5, 2, 20)}, ValueError, "head dim 20 must be"),
        ({"k": torch.zeros(5, 1, 16)}, ValueError, "k has shape (5, 1, 16)"),
        ({"v": torch.zeros(4, 2, 16)}, ValueError, "v has shape (4, 2, 16)"),
        ({"v": torch.zeros(5, 2, 16).half()}, TypeError, "v has dtype float16"),
        ({"cu_seqlens_q": ints(3).long()}, TypeError, "cu_seqlens_q has dtype int64"),
        ({"cu_seqlens_k": ints(4)}, ValueError, "cu_seqlens_k has shape (4,), expected [W+1=3]"),
        (
            {"cu_seqlens_q": ints(0), "cu_seqlens_k": ints(0)},
            ValueError,
            "cu_seqlens_q is empty, allowed",
        ),
        ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q=-1 is outside"),
        ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k=-1 is outside"),
        ({"sm_scale": float("nan")}, ValueError, "sm_scale=nan must be finite"),
        ({"backend": "fastest"}, ValueError, "backend='fastest' is not one of"),
    ],
)
def test_varlen_attention(change, error, message):
    with pytest.raises(error, match=re.escape(message)):
        vk.varlen_attention(**{**varlen(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": [0, 4, 3]}, "cu_seqlens_q=[0, 4, 3] must start at 0"),
        ({"cu_seqlens_k": [0, 3, 6]}, "cu_seqlens_k=[0, 3, 6] must start at 0"),
        ({"max_seqlen_q": 2}, "max_seqlen_q=2 is below the longest window, 3"),
        ({"max_seqlen_k": 1}, "max_seqlen_k=1 is below the longest window, 3"),
    ],
    ids=str,
)
def test_varlen_values_are_checked_on_request(monkeypatch, change, message):
    monkeypatch.setattr(checks, "CHECK_VALUES", True)
    change = {k: torch.tensor(v).int() if isinstance(v, list) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        vk.varlen_attention(**{**varlen(), **change})
    assert vk.varlen_attention(**varlen()).eq(1).all()


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (0, torch.zeros(3, 8), ValueError, "out_a must have 3 dimensions [Q, H, d]"),
        (0, torch.zeros(3, 2, 8).double(), TypeError, "out_a has dtype float64"),
        (1, torch.zeros(2, 3), ValueError, "lse_a has shape (2, 3)"),
        (1, torch.zeros(3, 2).half(), TypeError, "lse_a has dtype float16"),
        (2, torch.zeros(3, 2, 16), ValueError, "out_b has shape (3, 2, 16)"),
        (2, torch.zeros(3, 2, 8).half(), TypeError, "out_b has dtype float16"),
        (3, None, TypeError, "lse_b must be a tensor, got NoneType"),
    ],
)
def test_merge_states(place, value, error, message):
    arguments = [torch.zeros(3, 2, 8), torch.zeros(3, 2)] * 2
    arguments[place] = value
    with pytest.raises(error, match=re.escape(message)):
        vk.merge_states(*arguments)
