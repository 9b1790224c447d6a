"""Public functions pass torch's dispatcher by only where nobody would notice."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import vicostream_kernels as vico
from kit import tensors
from vicostream_kernels.ops._direct import direct

OPS = torch.ops.vicostream


class Overload:
    """An overload that says where its calls went."""

    def __init__(self, overload):
        self._schema, self.overload, self.calls = overload._schema, overload, 0

    def __call__(self, *args):
        self.calls += 1
        return self.overload(*args)


@pytest.fixture
def rows():
    return tensors.randn((2, 5, 8), seed=1), tensors.ints((2, 3), 0, 5, seed=2)


def by_dispatcher(*args, op=OPS.gather_rows.default, integral=False) -> bool:
    """Whether a call went to the dispatcher; its result is that of a call that did."""
    spy, run = Overload(op), []

    def kernel(*given):
        run.append(given)
        return op(*given)

    got = direct(spy, kernel, [], integral)(*args)
    assert spy.calls + len(run) == 1
    if not isinstance(got, torch._subclasses.FakeTensor):
        torch.testing.assert_close(got, op(*args), rtol=0, atol=0)
    return spy.calls == 1


def test_plain_tensors_go_straight_to_the_kernel(rows):
    assert not by_dispatcher(*rows)
    assert not by_dispatcher(*rows, "cpu")
    with torch.no_grad():
        assert not by_dispatcher(*rows)
        assert not by_dispatcher(torch.nn.Parameter(rows[0]), rows[1])
    with torch.inference_mode():
        assert not by_dispatcher(*rows)
        assert not by_dispatcher(rows[0] + 1, rows[1])


def test_negated_and_inference_tensors_go_to_the_dispatcher(rows):
    x, index = rows
    negated = torch._neg_view(x)
    assert by_dispatcher(negated, index)
    torch.testing.assert_close(vico.gather_rows(negated, index), vico.gather_rows(-x, index))
    with torch.inference_mode():
        made = x + 1
    assert by_dispatcher(made, index)


def test_arguments_that_torch_converts_or_refuses_go_to_the_dispatcher(rows):
    args = (rows[0], rows[0], 1, -1, 2)  # the threshold is a float
    spy, run = Overload(OPS.select_changed.default), []
    direct(spy, run.append, [], False)(*args, "l1")
    assert spy.calls == 1 and not run
    with pytest.raises((TypeError, RuntimeError)):
        by_dispatcher(rows[0], rows[1].tolist())
    with pytest.raises((TypeError, RuntimeError)):
        by_dispatcher(*rows, "auto", 1)


def test_modes_see_the_op(rows):
    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    for mode in (Dispatch, Function):
        seen = []
        with mode():
            vico.gather_rows(*rows)
        assert OPS.gather_rows.default in seen
    with torch.profiler.profile() as profile:
        vico.gather_rows(*rows)
    assert "vicostream::gather_rows" in {event.key for event in profile.key_averages()}


def test_fake_and_traced_tensors(rows):
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in rows]
        assert isinstance(vico.gather_rows(*fake), torch._subclasses.FakeTensor)
    assert isinstance(vico.gather_rows(*fake), torch._subclasses.FakeTensor)
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x, i: vico.gather_rows(x, i))(*rows)
    assert any(node.target is OPS.gather_rows.default for node in graph.graph.nodes)


def test_a_subclass_sees_the_op(rows):
    class Mine(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    seen = []
    vico.gather_rows(rows[0].as_subclass(Mine), rows[1])
    assert OPS.gather_rows.default in seen


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_the_dispatchers(rows):
    """It has no batching rule for the ops and calls them one by one."""
    x, index = rows
    both = torch.stack([x, x + 1])
    got = torch.vmap(lambda one: vico.gather_rows(one, index))(both)
    assert torch.equal(got, torch.stack([vico.gather_rows(one, index) for one in both]))
    pages = tensors.ints((3, 1, 4, 2), 0, 9, seed=3)
    chosen = tensors.ints((3, 1, 2), 0, 4, seed=4)
    wanted = [vico.select_pages(c, p) for c, p in zip(chosen, pages)]
    assert torch.equal(torch.vmap(vico.select_pages)(chosen, pages), torch.stack(wanted))


def test_integers_without_an_address_go_to_the_dispatcher():
    pages, chosen = tensors.ints((1, 4, 2), 0, 9, seed=3), tensors.ints((1, 2), 0, 4, seed=4)
    op = OPS.select_pages.default
    assert not by_dispatcher(chosen, pages, op=op, integral=True)
    zeros = torch._efficientzerotensor((1, 2), dtype=torch.int32)
    assert by_dispatcher(zeros, pages, op=op, integral=True)
    assert vico.select_pages(zeros, pages).tolist() == vico.select_pages(zeros + 0, pages).tolist()


def test_gradients_are_refused_on_the_short_way_too(rows):
    x, index = rows
    with pytest.raises(RuntimeError, match="no backward"):
        vico.gather_rows(x.clone().requires_grad_(), index)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="no backward"):
            vico.gather_rows(dual, index)


@pytest.mark.parametrize("around", [nullcontext, torch.inference_mode, torch.profiler.profile])
def test_a_written_tensor_has_a_new_version(around):
    """What autograd saved of it must not serve a backward pass, in inference mode neither."""
    q = tensors.randn((3, 2, 8), seed=5)
    pages = torch.zeros(1, 4, 1, 8)
    out = torch.empty_like(q)
    before = pages._version, out._version

    def call(out):
        vico.sink_window_attention(
            q, pages, pages, torch.zeros(1, 1, dtype=torch.int32),
            torch.tensor([0, 3], dtype=torch.int32), kv_len=torch.tensor([4], dtype=torch.int32),
            out=out,
        )  # fmt: skip

    with around():
        call(out)
    assert (pages._version, out._version) == (before[0], before[1] + 1)
    with torch.inference_mode(), around():
        call(torch.empty_like(q))  # has no version, which is no error
