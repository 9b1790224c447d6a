"""What has a wrong type is refused by name, for every argument of every public op."""

from __future__ import annotations

import inspect

import pytest
import torch

import vicostream_kernels as vico
from kit import tensors

Q, H, G, D, P, B = 4, 4, 2, 16, 6, 4


def ints(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.int32).view(shape)


q, kv = tensors.randn((Q, H, D), seed=1), tensors.randn((Q, G, D), seed=2)
pages = tensors.randn((P, B, G, D), seed=3)
lse, x = torch.zeros(Q, H), tensors.randn((3, 5, 8), seed=4)
ends = torch.tensor([0, 2, 4], dtype=torch.int32)
summary = tensors.randn((1, 3, G, D), seed=5)

#: A call of each op that is right.
CALLS = {
    vico.sink_window_attention: dict(
        q=q, k_pages=pages, v_pages=pages, page_table=ints(2, 3), cu_seqlens_q=ends,
        kv_len=ends[1:] + 2,
    ),
    vico.varlen_attention: dict(
        q=q, k=q, v=q, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=2, max_seqlen_k=2
    ),
    vico.merge_states: dict(out_a=q, lse_a=lse, out_b=q, lse_b=lse),
    vico.rope_append: dict(
        q=q.clone(), k=kv, v=kv, positions=ints(3, Q), inv_freq=torch.ones(D // 2),
        mrope_section=None, k_pages=pages.clone(), v_pages=pages.clone(), slots=ints(Q),
    ),
    vico.prune_tokens: dict(x=x, positions=ints(3, 3, 5), rule=vico.PruneRule(threshold=0.5)),
    vico.select_changed: dict(feature=x, reference=x[0], ratio=0.5),
    vico.gather_rows: dict(x=x, index=ints(3, 2)),
    vico.merge_rows: dict(base=x, rows=x[:, :2], index=ints(3, 2) % 2),
    vico.summarize_blocks: dict(k_pages=pages, block_pages=ints(1, 3, 2), page_fill=ints(P) % 4),
    vico.topk_blocks: dict(query=q[:1], summary=summary, k=2),
    vico.select_pages: dict(block_index=ints(1, 2), block_pages=ints(1, 3, 2)),
    vico.topk_pages: dict(query=q[:1], summary=summary, block_pages=ints(1, 3, 2), k=2),
    vico.preprocess_frames: dict(
        frames=torch.zeros(2, 28, 28, 3, dtype=torch.uint8), min_pixels=784, max_pixels=3000,
        mean=[0.5] * 3, std=[0.5] * 3,
    ),
}  # fmt: skip
#: Truth is asked of anything; a number of pixels may well be 1e5.
TAKEN = {("return_lse", kind) for kind in (object, float, str, list)}
TAKEN |= {("min_pixels", float), ("max_pixels", float)}


def test_every_public_op_is_here():
    functions = (getattr(vico, name) for name in vico.__all__)
    taking = {
        f
        for f in functions
        if inspect.isfunction(f) and "backend" in inspect.signature(f).parameters
    }
    assert taking == set(CALLS)


@pytest.mark.parametrize("wrong", [object(), 2.5, "a", [1]], ids=["object", "float", "str", "list"])
@pytest.mark.parametrize("op", CALLS, ids=lambda op: op.__name__)
def test_the_argument_is_named(op, wrong):
    op(**CALLS[op])
    for name, parameter in inspect.signature(op).parameters.items():
        takes = str(parameter.annotation)
        kind = type(wrong)
        if (name, kind) in TAKEN or (kind in (float, str) and kind.__name__ in takes):
            continue
        with pytest.raises((TypeError, ValueError), match=rf"({op.__name__}|resize): .*{name}"):
            op(**{**CALLS[op], name: wrong})


@pytest.mark.parametrize("wrong", [torch.tensor(2), torch.tensor([2, 2]).int()], ids=["0d", "1d"])
@pytest.mark.parametrize("op", CALLS, ids=lambda op: op.__name__)
def test_a_tensor_is_no_number(op, wrong):
    """To read it waits for the device, and in a capture fails."""
    for name, parameter in inspect.signature(op).parameters.items():
        kinds = str(parameter.annotation).replace(" | None", "")
        if kinds in ("int", "float"):
            message = rf"({op.__name__}|resize): {name}.*[Tt]ensor"
            with pytest.raises(TypeError, match=message):
                op(**{**CALLS[op], name: wrong})
