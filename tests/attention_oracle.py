"""The attention contract once more, head by head with Python ints, and cases to hold it against.

Written apart from the reference on purpose: what both say is what the contract says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch

import vicostream_kernels as vk
from kit import tensors
from kit.compare import assert_matches


def inverse_frequencies(head_dim: int, theta: float = 10000.0) -> torch.Tensor:
    """The usual rotary frequencies [d/2] in radians per position."""
    half = head_dim // 2
    return 1.0 / theta ** (torch.arange(half, dtype=torch.float32) / half)


@dataclass
class Case:
    """One call of ``sink_window_attention``: positional tensors and keyword options."""

    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    page_table: torch.Tensor
    cu_seqlens_q: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def run(
        self, backend: tuple[str, str], *, return_lse: bool = True, **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse (NaN if not asked for) of (backend, device), back on the CPU."""
        name, device = backend
        moved = [
            tensors.strided(x.to(device)) if device != "cpu" else x
            for x in (self.q, self.k_pages, self.v_pages, self.page_table, self.cu_seqlens_q)
        ]
        options = {
            key: value.to(device) if isinstance(value, torch.Tensor) else value
            for key, value in {**self.options, **more}.items()
        }
        got = vk.sink_window_attention(*moved, **options, return_lse=return_lse, backend=name)
        out, lse = got if return_lse else (got, torch.full(got.shape[:2], math.nan))
        return out.cpu(), lse.cpu()

    def changed(self, **fields: Any) -> Case:
        """A copy with other fields or options."""
        own = {key: fields.pop(key) for key in list(fields) if key in self.__dataclass_fields__}
        return replace(self, **own, options={**self.options, **fields})


def make_case(
    queries: list[int],
    tables: list[Any],
    *,
    pages: int = 12,
    page_size: int = 4,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    padding: int = 0,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Random q and pages around the given tables; every slot that no stream lists is NaN.

    Lists among the options become int32 tensors (float32 for ``sink_logits``).
    """
    rows = sum(queries) + padding
    pool = (pages, page_size, kv_heads, head_dim)
    starts = [sum(queries[:n]) for n in range(len(queries) + 1)]
    for name, value in options.items():
        if isinstance(value, list) and name != "mrope_section":
            kind = torch.float32 if name == "sink_logits" else torch.int32
            options[name] = torch.tensor(value, dtype=kind)
    case = Case(
        tensors.randn((rows, kv_heads * group, head_dim), dtype, seed=seed),
        tensors.randn(pool, dtype, seed=seed + 1),
        tensors.randn(pool, dtype, seed=seed + 2),
        tensors.strided(torch.as_tensor(tables, dtype=torch.int32)),
        torch.tensor(starts, dtype=torch.int32),
        options,
    )
    unused = torch.ones(pages, page_size, dtype=torch.bool)
    for s in range(len(queries)):
        for h in range(kv_heads * group):
            for page, offset, _ in logical_sequence(case, s, h):
                unused[page, offset] = False
    case.k_pages[unused] = math.nan
    case.v_pages[unused] = math.nan
    return case


def logical_sequence(case: Case, s: int, h: int) -> list[tuple[int, int, int]]:
    """(page, offset, table entry) of the tokens that stream s has for query head h, in order."""
    pages, page_size, kv_heads, _ = case.k_pages.shape
    table = case.page_table[s].tolist()
    if case.page_table.dim() == 3:
        per_table = case.q.shape[1] // len(table)
        table = table[h // per_table]
    fill, kv_len = case.options.get("page_fill"), case.options.get("kv_len")
    left = None if kv_len is None else int(kv_len[s])
    tokens = []
    for entry, page in enumerate(table):
        if not 0 <= page < pages:
            continue
        filled = int(fill[page]) if left is None else min(page_size, left)
        left = None if left is None else left - max(filled, 0)
        tokens += [(page, offset, entry) for offset in range(min(filled, page_size))]
    return tokens


def turn(shift: list[int], case: Case, dtype: torch.dtype) -> torch.Tensor:
    """What a key [d] that moved by ``shift`` is multiplied by: complex [d / 2]."""
    frequencies = case.options["inv_freq"].tolist()
    section = case.options.get("mrope_section") or [len(frequencies), 0, 0]
    axis = [0] * section[0] + [1] * section[1] + [2] * section[2]
    # int (24 bits) x float32 fits float64, and libm reduces the argument exactly.
    angles = [shift[a] * f for a, f in zip(axis, frequencies)]
    complex_type = torch.complex128 if dtype == torch.float64 else torch.complex64
    return torch.tensor([complex(math.cos(x), math.sin(x)) for x in angles], dtype=complex_type)


def turned(keys: torch.Tensor, turns: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys [n, d], each by its own turn [n, d / 2]: angles exact to float64's last bits."""
    real, imaginary = keys.to(turns.real.dtype).chunk(2, dim=1)
    product = torch.complex(real, imaginary) * turns
    return torch.cat((product.real, product.imag), dim=1).to(dtype)


@cache
def hidden_keys(
    keys: int, queries: int, window: int | None, sinks: int, first: int
) -> torch.Tensor:
    """[queries, keys] bool: the rule, one pair at a time, the other way round."""
    hidden = torch.ones(queries, keys, dtype=torch.bool)
    for r in range(queries):
        i = keys - queries + r
        for j in range(keys):
            recent = j >= first and (window is None or i - j < window)
            hidden[r, j] = not (j <= i and (j < sinks or recent))
    return hidden


def stored(case: Case, s: int, h: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys, moved, and the values [n, d] of stream s that query head h has."""
    heads, shift = case.q.shape[1], case.options.get("page_shift")
    tokens = logical_sequence(case, s, h)
    g = h * case.k_pages.shape[2] // heads
    place = [page for page, _, _ in tokens], [offset for _, offset, _ in tokens], g
    keys, values = case.k_pages[place].to(dtype), case.v_pages[place].to(dtype)
    if shift is not None:
        of_head = shift[s]
        if shift.dim() == 4:
            of_head = of_head[h * shift.shape[1] // heads]
        entries = {entry for _, _, entry in tokens}
        turns = {entry: turn(of_head[entry].tolist(), case, dtype) for entry in entries}
        if turns:
            of_keys = torch.stack([turns[entry] for _, _, entry in tokens])
            keys = turned(case.k_pages[place], of_keys, dtype)
    return keys, values


def scale_of(case: Case) -> float:
    given = case.options.get("sm_scale")
    return case.q.shape[-1] ** -0.5 if given is None else given


def dense(
    case: Case, dtype: torch.dtype, *, scaled_query: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [Q, H, d] and lse [Q, H], all in ``dtype``, a head of a stream at a time.

    ``scaled_query``: the scale meets the query (as in torch's own attention), not the scores.
    """
    rows, heads, d = case.q.shape
    opt = case.options
    scale = scale_of(case)
    window, sinks = opt.get("window"), opt.get("sink_tokens", 0)
    # The query heads of a KV head read the same, but where each has a list of its own.
    lists = case.k_pages.shape[2]
    for own, of_heads in ((case.page_table, 3), (opt.get("page_shift"), 4)):
        if own is not None and own.dim() == of_heads:
            lists = max(lists, own.shape[1])
    out = torch.zeros(rows, heads, d, dtype=dtype)
    lse = torch.full((rows, heads), -math.inf, dtype=dtype)
    starts = case.cu_seqlens_q.tolist()
    for s in range(len(starts) - 1):
        first = 0 if opt.get("window_start") is None else int(opt["window_start"][s])
        read: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for h in range(heads):
            g = h * lists // heads
            if g not in read:
                read[g] = stored(case, s, h, dtype)
            keys, values = read[g]
            mine = range(starts[s], starts[s + 1])
            hidden = hidden_keys(len(keys), len(mine), window, sinks, first)
            rows_seeing = [row for row in mine if not hidden[row - mine.start].all()]
            if not rows_seeing:
                continue
            hidden = hidden[[row - mine.start for row in rows_seeing]]
            query = case.q[rows_seeing, h].to(dtype)
            scores = query * scale @ keys.T if scaled_query else query @ keys.T * scale
            scores[hidden] = -math.inf
            # What has no weight but -inf's is as good as blind.
            weighs = scores.ne(-math.inf).any(1)
            if not weighs.any():
                continue
            scores = scores[weighs]
            rows_seeing = [row for row, some in zip(rows_seeing, weighs.tolist()) if some]
            if opt.get("sink_logits") is not None:
                sink = opt["sink_logits"][h].to(dtype).expand(len(rows_seeing), 1)
                scores = torch.cat((scores, sink), 1)
            lse[rows_seeing, h] = scores.logsumexp(1)
            weights = scores.softmax(1)[:, : len(keys)]
            out[rows_seeing, h] = weights @ values
    return out, lse


def check(case: Case, backend: tuple[str, str], **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a case of some size and compares it with the oracle; gives back what came out."""
    out, lse = case.run(backend, **more)
    alone, _ = case.run(backend, return_lse=False, **more)
    dtype = case.q.dtype
    assert out.dtype == dtype and lse.dtype == torch.float32
    true_out, true_lse = dense(case, torch.float64)
    # The LSE is float32 in every dtype, but a key that was turned on load may be rounded again:
    # what comes of that has the precision of the dtype, in each value and in their direction.
    lse_dtype = dtype if "page_shift" in case.options else torch.float32
    own = [dense(case, dtype, scaled_query=early) for early in (False, True)]
    own_out, own_lse = zip(*own, strict=True)
    if lse_dtype != dtype:
        own_lse = [dense(case, lse_dtype)[1]]
    sizes = dense(case.changed(v_pages=case.v_pages.abs()), torch.float64)[0]
    summed = float(sizes[sizes.isfinite()].max()) if sizes.isfinite().any() else 0.0
    assert_matches(out, true_out, own_out, name="out", summed=summed)
    assert_matches(alone, true_out, own_out, name="out without lse", summed=summed)
    assert_matches(lse.to(lse_dtype), true_lse, own_lse, name="lse")
    return out, lse


def check_small(case: Case, backend: tuple[str, str], **more: Any) -> None:
    """As ``check`` for cases of few numbers, where torch's own error may be 0 by luck.

    The bound is then first-order: a score may err by float32's rounding of the sum of |q k|, and
    moves the output by at most twice that times the largest |v|.
    """
    out, lse = case.run(backend, **more)
    alone, _ = case.run(backend, return_lse=False, **more)
    dtype = case.q.dtype
    true_out, true_lse = dense(case, torch.float64)
    score = case.q.double().abs().sum(-1).max().item() if case.q.numel() else 0.0
    score *= case.k_pages.double().nan_to_num().abs().max().item() if case.k_pages.numel() else 0.0
    score *= abs(scale_of(case))
    eps = torch.finfo(dtype if "page_shift" in case.options else torch.float32).eps
    error = eps * (1 + score)
    value = case.v_pages.double().nan_to_num().abs().max().item() if case.v_pages.numel() else 0.0
    allowed_out = 2 * (error + torch.finfo(dtype).eps) * value
    for name, got, truth, allowed in (
        ("out", out, true_out, allowed_out),
        ("out without lse", alone, true_out, allowed_out),
        ("lse", lse, true_lse, 2 * error + 1e-6 * true_lse.nan_to_num(neginf=0.0).abs().amax()),
    ) if out.numel() else ():  # fmt: skip
        infinite = torch.isinf(truth)
        assert not got.isnan().any(), f"{name}: NaN at {got.isnan().nonzero()[0].tolist()}"
        assert torch.equal(got.double()[infinite], truth[infinite]), f"{name}: -inf elsewhere"
        off = (got.double() - truth)[~infinite].abs()
        assert off.numel() == 0 or off.max() <= allowed, f"{name}: {off.max()} > {allowed}"
