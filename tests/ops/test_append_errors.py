"""What rope_append refuses: the error names what is wrong, and nothing has been written."""

from __future__ import annotations

import pytest
import torch
from append_kit import Call

from kit.compare import assert_same_bits
from vicostream_kernels import backends
from vicostream_kernels.ops.append import KeySummary

BAD = {
    "q of two dimensions": (dict(q=lambda x: x[0]), ValueError, "q must have 3 dimensions"),
    "float64": (dict(q=lambda x: x.double()), TypeError, "q has dtype float64"),
    "head dim 12": (dict(q=lambda x: x[..., :12]), ValueError, "head dim 12"),
    "k of another length": (dict(k=lambda x: x[:-1]), ValueError, r"k has shape .* expected \[N=7"),
    "v of another dtype": (dict(v=lambda x: x.half()), TypeError, "v has dtype float16"),
    "positions of int64": (dict(positions=lambda x: x.long()), TypeError, "positions has dtype"),
    "positions of one row": (dict(positions=lambda x: x[:1]), ValueError, "positions has shape"),
    "inv_freq too short": (dict(inv_freq=lambda x: x[:-1]), ValueError, "inv_freq has shape"),
    "sections that do not add up": (
        dict(mrope_section=lambda x: [1, 2, 3]),
        ValueError,
        "mrope_section",
    ),
    "pages of other heads": (dict(k_pages=lambda x: x[:, :, :1]), ValueError, "k_pages has shape"),
    "pages not dense": (
        dict(v_pages=lambda x: torch.zeros(5, 3, 2, 32)[..., ::2]),
        ValueError,
        "v_pages is written in place",
    ),
    "slots of floats": (dict(slots=lambda x: x.float()), TypeError, "slots has dtype"),
    "summary without its rows": (dict(block_of_page=lambda x: None), ValueError, "go together"),
    "rows without a summary": (dict(summary=lambda x: None), ValueError, "go together"),
    "half a summary": (
        dict(summary=lambda x: KeySummary(sum=x.sum)),
        ValueError,
        "sum with count",
    ),
    "unknown source": (
        dict(summary=lambda x: KeySummary(x.sum, x.count, source="both")),
        ValueError,
        "summary.source='both' is not one of 'rotated', 'raw'",
    ),
    "no tensor": (dict(q=lambda x: x.numpy()), TypeError, "q must be a tensor, got ndarray"),
    "slots in a list": (dict(slots=lambda x: x.tolist()), TypeError, "slots must be a tensor"),
    "sections of floats": (
        dict(mrope_section=lambda x: [2.0, 3.0, 3.0]),
        TypeError,
        "mrope_section=.* must be a sequence of ints",
    ),
    "a summary of another type": (
        dict(summary=lambda x: (x.sum, x.count)),
        TypeError,
        "summary must be a KeySummary or None, got tuple",
    ),
    "pages expanded": (
        dict(k_pages=lambda x: x[:1].expand(5, 3, 2, 16)),
        ValueError,
        "k_pages is written in place and several elements share a place",
    ),
    "sums expanded": (
        dict(summary=lambda x: KeySummary(x.sum[:1].expand(3, 2, 16), x.count)),
        ValueError,
        "sum is written in place and several elements share a place",
    ),
    "bounds without parts": (
        dict(summary=lambda x: KeySummary(kmin=x.kmin[:, :0], kmax=x.kmax[:, :0])),
        ValueError,
        r"sub of kmin=0 is outside \[1, 3\]",
    ),
    "more parts than a page has slots": (
        dict(summary=lambda x: KeySummary.empty(3, 2, 16, kind="minmax", sub=4)),
        ValueError,
        r"sub of kmin=4 is outside \[1, 3\]",
    ),
    "a summary of nothing": (
        dict(summary=lambda x: KeySummary()),
        ValueError,
        "summary has no tensors; KeySummary.empty",
    ),
    "no KV heads": (
        dict.fromkeys(("k", "v", "k_pages", "v_pages", "raw_k_pages"), lambda x: x[..., :0, :])
        | dict(summary=lambda x: KeySummary(x.sum[:, :0], x.count)),
        ValueError,
        "k has 0 heads, allowed: 1 or more",
    ),
}


@pytest.mark.skipif(backends.INTERPRET, reason="runs in the main process")
@pytest.mark.parametrize("what", BAD)
def test_bad_input_raises_before_anything_is_written(what):
    changes, error, message = BAD[what]
    call = Call()
    before = call.snapshot()
    kept = call.written()
    for name, change in changes.items():
        setattr(call, name, change(getattr(call, name)))
    with pytest.raises(error, match=message):
        call.run("auto")
    for name, tensor in kept.items():
        assert_same_bits(tensor, before[name], name=name)


@pytest.mark.skipif(backends.INTERPRET, reason="runs in the main process")
def test_memory_that_is_written_twice_is_refused():
    """Also when a call of the same layout has passed before."""
    call = Call()
    call.run("auto")
    before = call.snapshot()
    kept = call.written()
    for first, second in (("k_pages", "v_pages"), ("v_pages", "raw_k_pages")):
        wrong = Call()
        wrong.__dict__.update(call.__dict__)
        setattr(wrong, second, getattr(call, first))
        with pytest.raises(ValueError, match=f"{first} and {second} are the same memory"):
            wrong.run("auto")
    for name, tensor in kept.items():
        assert_same_bits(tensor, before[name], name=name)

    pool = torch.zeros(5, 2, 3, 2, 16)  # K and V of a page side by side
    call.k_pages, call.v_pages = pool[:, 0], pool[:, 1]
    call.run("auto")
    wanted = Call()
    wanted.k_pages, wanted.v_pages = torch.zeros(5, 3, 2, 16), torch.zeros(5, 3, 2, 16)
    wanted.run("auto")
    assert_same_bits(call.k_pages, wanted.k_pages)
    assert_same_bits(call.v_pages, wanted.v_pages)


@pytest.mark.skipif(backends.INTERPRET, reason="runs in the main process")
def test_forward_mode_is_refused():
    """A tangent that got lost would be a derivative of zero."""
    call = Call()
    with pytest.raises(RuntimeError, match="no backward"):
        torch.func.jvp(lambda x: vars(call).update(q=x) or call.run("auto"), (call.q,), (call.q,))
    call = Call()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no backward"):
        call.q = torch.autograd.forward_ad.make_dual(call.q, torch.ones_like(call.q))
        call.run("auto")


@pytest.mark.skipif(backends.INTERPRET, reason="runs in the main process")
def test_check_mode_refuses_bad_slots(monkeypatch):
    from vicostream_kernels import checks

    monkeypatch.setattr(checks, "CHECK_VALUES", True)
    call = Call()
    call.slots[1] = call.slots[0]
    with pytest.raises(ValueError, match="same slot twice"):
        call.run("auto")
    for slot in (15, -7):
        call.slots[1] = slot
        with pytest.raises(ValueError, match=rf"slots holds {slot}, allowed: -1 or \[0, P\*B="):
            call.run("auto")


@pytest.mark.skipif(backends.INTERPRET, reason="runs in the main process")
def test_check_mode_finds_memory_that_is_read_and_written(monkeypatch):
    from vicostream_kernels import checks

    monkeypatch.setattr(checks, "CHECK_VALUES", True)
    n = len(Call().slots)
    pool = torch.zeros(6, 3, 2, 16)
    inside = pool.view(18, 2, 16)[:n]
    for changes, said in (
        (dict(k_pages=pool[:5], k=inside), "k_pages is written and shares memory with k;"),
        (dict(k_pages=pool[:5], v_pages=pool[1:]), "k_pages is .* shares memory with v_pages"),
    ):
        call = Call()
        vars(call).update(changes)
        before = pool.clone()
        with pytest.raises(ValueError, match=said):
            call.run("auto")
        assert_same_bits(pool, before)
    # Between each other is no overlap.
    call, pool = Call(), torch.zeros(5, 2, 3, 2, 16)
    call.k_pages, call.v_pages = pool[:, 0], pool[:, 1]
    call.run("auto")


def test_an_unknown_instruction_set_is_refused(torch_process, tmp_path):
    if backends.why_not("rope_append", "cpu", "cpu"):
        pytest.skip(backends.why_not("rope_append", "cpu", "cpu"))
    program = "from vicostream_kernels import backends as b; b.info()"
    done = torch_process.run(program, tmp_path, VICO_ISA="AVX2")
    assert "ValueError: VICO_ISA=AVX2 is not one of baseline, avx2, avx512" in done.stderr
