"""rope_append: every backend against the float64 reference, and the rules every op obeys."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from append_kit import Call

import vicostream_kernels as vk
from kit.backends import backends_of
from kit.compare import assert_matches, assert_same_bits
from kit.ops import check_fullgraph, check_op, check_refuses_grad
from vicostream_kernels import backends, reference
from vicostream_kernels.ops.append import KeySummary
from vicostream_kernels.reference import append as reference_append
from vicostream_kernels.reference._precision import accumulate_in

BACKENDS = backends_of("rope_append")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
assert reference is not None


def truth_of(call, dtype=torch.float64):
    """(q_out, k_pages, v_pages) of the reference computed in ``dtype``, pages as they were."""
    cast = (lambda x: x.cpu().double()) if dtype == torch.float64 else (lambda x: x.cpu())
    q, k, v = cast(call.q), cast(call.k), cast(call.v)
    k_pages, v_pages = cast(call.k_pages).clone(), cast(call.v_pages).clone()
    q_out = torch.zeros_like(q)
    with accumulate_in(dtype):
        reference_append.rope_append(
            q, k, v, call.positions.cpu(), call.inv_freq.cpu(), call.mrope_section,
            k_pages, v_pages, call.slots.cpu(), q_out,
        )  # fmt: skip
    return q_out, k_pages, v_pages


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [8, 24, 80, 128])
@pytest.mark.parametrize("sections", [True, False], ids=["mrope", "rope"])
def test_matches_the_reference(where, dtype, d, sections):
    backend, device = where
    call = Call(d=d, dtype=dtype, device=device, sections=sections)
    truth, naive = truth_of(call), truth_of(call, dtype)
    before = call.snapshot()
    q_out = call.run(backend)
    assert_matches(q_out, truth[0], naive[0], name="q_out")
    assert_matches(call.k_pages, truth[1], naive[1], name="k_pages")
    assert_same_bits(call.v_pages.cpu().double(), truth[2], name="v_pages")

    slots = call.slots.cpu().long()
    kept = torch.ones(call.k_pages.shape[0] * call.k_pages.shape[1], dtype=torch.bool)
    kept[slots[slots >= 0]] = False
    flat = (call.k_pages.shape[0] * call.k_pages.shape[1], *call.k_pages.shape[2:])
    for name in ("k_pages", "v_pages", "raw"):
        now, then = call.written()[name].cpu().reshape(flat), before[name].cpu().reshape(flat)
        assert_same_bits(now[kept], then[kept], name=f"{name} outside the slots")
    raw = call.raw_k_pages.cpu().reshape(flat)[slots[slots >= 0]]
    assert_same_bits(raw, call.k.cpu()[slots >= 0], name="raw_k_pages")


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("source", ["rotated", "raw"])
@pytest.mark.parametrize(
    ("kind", "n", "pages", "in_order"),
    (
        *(
            (kind, *size, False)
            for kind in ("mean", "minmax", "both")
            for size in ((11, 5), (90, 40))  # few; more than a warp looks at
        ),
        ("both", 300, 105, True),
    ),
)
def test_summaries_are_those_of_the_stored_keys(where, source, kind, n, pages, in_order):
    backend, device = where
    call = Call(
        n=n, pages=pages, in_order=in_order, dtype=torch.float16, device=device, source=source,
        kind=kind,
    )  # fmt: skip
    call.run(backend)
    stored = (call.k_pages if source == "rotated" else call.raw_k_pages).cpu().float()
    sums = torch.zeros(3, 2, 16)
    counts = torch.zeros(3, dtype=torch.int32)
    low, high = torch.full((3, 2, 2, 16), torch.inf), torch.full((3, 2, 2, 16), -torch.inf)
    for slot in call.slots.cpu().tolist():
        if slot < 0:
            continue
        page, offset = divmod(slot, 3)
        row = int(call.block_of_page[page])
        if row < 0 or row >= 3:
            continue
        sums[row] += stored[page, offset]
        counts[row] += 1
        part = offset * 2 // 3
        low[row, part] = torch.minimum(low[row, part], stored[page, offset])
        high[row, part] = torch.maximum(high[row, part], stored[page, offset])
    assert counts.max() > 1, "some block gets several tokens"
    if kind != "minmax":
        assert_same_bits(call.summary.sum.cpu(), sums, name="sum")
        assert_same_bits(call.summary.count.cpu(), counts, name="count")
    if kind != "mean":
        assert_same_bits(call.summary.kmin.cpu(), low, name="kmin")
        assert_same_bits(call.summary.kmax.cpu(), high, name="kmax")


@pytest.mark.parametrize("where", BACKENDS)
def test_two_calls_give_the_bits_of_one(where):
    backend, device = where
    whole, parts = Call(n=9, device=device), Call(n=9, device=device)
    wanted = whole.run(backend)
    got = []
    for piece in (slice(0, 4), slice(4, 5), slice(5, 9)):
        got.append(
            vk.rope_append(
                parts.q[piece],
                parts.k[piece],
                parts.v[piece],
                parts.positions[:, piece],
                parts.inv_freq,
                parts.mrope_section,
                parts.k_pages,
                parts.v_pages,
                parts.slots[piece],
                raw_k_pages=parts.raw_k_pages,
                summary=parts.summary,
                block_of_page=parts.block_of_page,
                backend=backend,
            )  # fmt: skip
        )
    assert_same_bits(torch.cat(got), wanted, name="q_out")
    for name, tensor in whole.written().items():
        assert_same_bits(parts.written()[name], tensor, name=name)


@pytest.mark.parametrize("where", BACKENDS)
def test_angles_keep_their_precision_at_ten_million(where):
    """Against numpy's fp64 cosine of the unreduced product."""
    backend, device = where
    d, n = 64, 8
    positions = np.linspace(0, 10_000_000, n).astype(np.int64)
    inv_freq = (1e6 ** (-np.arange(0, d, 2) / d)).astype(np.float32)
    q = torch.zeros(n, 1, d)
    q[..., : d // 2] = 1
    pages = torch.zeros(1, 1, 1, d, device=device)
    out = vk.rope_append(
        q.to(device), q.to(device), q.to(device),
        torch.tensor(positions, dtype=torch.int32, device=device).expand(3, n),
        torch.tensor(inv_freq, device=device), None, pages, pages.clone(),
        torch.full((n,), -1, dtype=torch.int32, device=device), backend=backend,
    )  # fmt: skip
    angle = positions[:, None].astype(np.float64) * inv_freq.astype(np.float64)
    got = out[:, 0].cpu().double().numpy()
    assert np.abs(got[:, : d // 2] - np.cos(angle)).max() < 2e-6
    assert np.abs(got[:, d // 2 :] - np.sin(angle)).max() < 2e-6


@pytest.mark.parametrize("where", BACKENDS)
def test_slots_outside_the_pool_write_nothing(where):
    backend, device = where
    call = Call(device=device)
    call.slots[:] = torch.tensor([15, 16, 2**31 - 1, -1, -2, -(2**31), 3], device=device)
    before = call.snapshot()
    q_out = call.run(backend)
    assert q_out.isfinite().all()
    flat = call.k_pages.reshape(15, 2, 16)
    untouched = torch.arange(15, device=device) != 3
    assert_same_bits(flat[untouched], before["k_pages"].reshape(15, 2, 16)[untouched])
    assert not torch.equal(flat[3], before["k_pages"].reshape(15, 2, 16)[3])


@pytest.mark.parametrize("where", BACKENDS)
def test_nothing_to_do(where):
    backend, device = where
    call = Call(n=2, device=device)
    empty = slice(0, 0)
    before = call.snapshot()
    out = vk.rope_append(
        call.q[empty], call.k[empty], call.v[empty], call.positions[:, empty], call.inv_freq,
        call.mrope_section, call.k_pages, call.v_pages, call.slots[empty], backend=backend,
    )  # fmt: skip
    assert out.shape == (0, 4, 16)
    for name, tensor in call.written().items():
        assert_same_bits(tensor, before[name], name=name)


@pytest.mark.parametrize("where", BACKENDS)
def test_nan_stays_in_its_token_and_in_the_bounds(where):
    backend, device = where
    call = Call(n=6, device=device, kind="minmax")
    call.k[0] = float("nan")
    call.slots[:] = torch.tensor([3, 4, 5, 6, 7, 8], dtype=torch.int32)
    call.run(backend)
    assert call.k_pages[1, 0].isnan().all() and call.k_pages[1, 1:].isfinite().all()
    row = int(call.block_of_page[1])
    assert call.summary.kmin[row, 0].isnan().all() and call.summary.kmax[row, 0].isnan().all()
    assert call.summary.kmin[row, 1].isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_runs_on_the_current_stream_and_in_a_graph(backend):
    call, wanted = Call(n=64, pages=40, device="cuda"), Call(n=64, pages=40, device="cuda")
    q_wanted = wanted.run("reference")
    call.run(backend)  # compiles
    for name, tensor in Call(n=64, pages=40, device="cuda").written().items():
        call.written()[name].copy_(tensor)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        q_out = call.run(backend)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(q_out, q_wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(call.k_pages, wanted.k_pages, rtol=1e-5, atol=1e-5)
    assert_same_bits(call.summary.count, wanted.summary.count)


def op_args(call, backend="auto"):
    s = call.summary
    return (
        call.q, call.k, call.v, call.positions, call.inv_freq, call.mrope_section, call.k_pages,
        call.v_pages, call.slots, torch.zeros(call.q.shape, dtype=call.q.dtype), call.raw_k_pages,
        s.sum, s.count, s.kmin, s.kmax, False, call.block_of_page, backend,
    )  # fmt: skip


@pytest.mark.skipif(backends.INTERPRET, reason="runs in the main process")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_is_a_proper_torch_op(backend):
    if backends.why_not("rope_append", backend, "cpu"):
        pytest.skip(backends.why_not("rope_append", backend, "cpu"))
    check_op(torch.ops.vicostream.rope_append.default, op_args(Call(), backend))
    check_refuses_grad(torch.ops.vicostream.rope_append.default, op_args(Call(), backend))


@pytest.mark.skipif(backends.INTERPRET, reason="runs in the main process")
def test_compiles_without_a_graph_break():
    call = Call()

    def step(q, k, v, k_pages, v_pages):
        return 2 * vk.rope_append(
            q, k, v, call.positions, call.inv_freq, call.mrope_section, k_pages, v_pages, call.slots
        )

    check_fullgraph(step, call.q, call.k, call.v, call.k_pages, call.v_pages)


def test_an_empty_summary_is_float32_whatever_the_default():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        summary = KeySummary.empty(2, 1, 8, kind="both")
    finally:
        torch.set_default_dtype(default)
    assert {t.dtype for t in (summary.sum, summary.kmin, summary.kmax)} == {torch.float32}
    assert summary.count.dtype == torch.int32


@pytest.mark.skipif(backends.INTERPRET, reason="runs in the main process")
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_autograd_notices_that_the_pages_were_written(backend):
    call = Call()
    weight = torch.ones_like(call.k_pages, requires_grad=True)
    loss = (weight * call.k_pages).sum()
    call.run(backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_reference(torch_process, isa, tmp_path):
    """The variants of the CPU code are picked once per process, so each runs in its own."""
    if backends.why_not("rope_append", "cpu", "cpu"):
        pytest.skip(backends.why_not("rope_append", "cpu", "cpu"))
    program = """
import torch, vicostream_kernels as vk
from vicostream_kernels import backends
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    torch.manual_seed(0)
    q, k = torch.randn(5, 3, 40).to(dtype), torch.randn(5, 1, 40).to(dtype)
    k[0, 0, :8] = torch.tensor([6e-8, -3e-6, 65504., 1e-7, float('inf'), 0., -0., 7e4]).to(dtype)
    pages = [torch.zeros(2, 3, 1, 40, dtype=dtype) for _ in range(4)]
    rest = (torch.arange(15, dtype=torch.int32).view(3, 5), torch.rand(20), [5, 7, 8])
    slots = torch.tensor([0, 2, 4, -1, 5], dtype=torch.int32)
    a = vk.rope_append(q, k, k, *rest, pages[0], pages[1], slots, backend="cpu")
    b = vk.rope_append(q, k, k, *rest, pages[2], pages[3], slots, backend="reference")
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(a, b, rtol=2 * eps, atol=2 * eps)
    torch.testing.assert_close(pages[0], pages[2], rtol=2 * eps, atol=4 * eps, equal_nan=True)
    assert torch.equal(pages[1], pages[3])
print(backends.native()[0].build_info()["isa"])
"""
    done = torch_process.run(program, tmp_path, VICO_ISA=isa, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() != isa:
        pytest.skip(f"this processor has {done.stdout.strip()} at most")
