"""Bad rules and bad calls: refused with the argument's name, before anything is written."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from kit import tensors
from vicostream_kernels import BackendUnavailable, PruneRule, PruneState, prune_tokens

RULE = PruneRule(threshold=0.25)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(), "exactly one of threshold"),
        (dict(threshold=0.1, k=3), "exactly one of threshold"),
        (dict(reference=(), threshold=0.1), "need a score"),
        (dict(threshold=1.5), r"threshold=1.5 is outside \[-1.0, 1.0\]"),
        (dict(threshold=-0.1, metric="l1"), r"threshold=-0.1 is outside \[0.0, inf\]"),
        (dict(threshold=5.5, metric="gaussian"), "threshold=5.5"),
        (dict(threshold=2.5, reference=("previous", "frame_mean")), r"\[-2.0, 2.0\]"),
        (dict(threshold=math.nan), "threshold=nan must be finite"),
        (dict(threshold=math.inf), "threshold=inf must be finite"),
        (dict(k=-1), "k=-1"),
        (dict(k=1.5), "k=1.5"),
        (dict(k=True), "k=True"),
        (dict(k=()), r"k=\(\)"),
        (dict(ratio=1.1), "ratio=1.1"),
        (dict(drop_ratio=-0.1), "drop_ratio=-0.1"),
        (dict(k=1, drop_multiple=0), "drop_multiple=0"),
        (dict(k=1, channels=0.0), "channels=0.0"),
        (dict(k=1, reference="next"), "reference='next' is not one of 'previous'"),
        (dict(k=1, metric="dot"), "metric='dot' is not one of"),
        (dict(k=1, reference=("previous",) * 3), "more than two terms"),
        (dict(k=1, metric=("l1", "l2")), "one for each of the 1 references"),
        (dict(k=1, weights=(1.0, 2.0)), "one weight for each"),
        (dict(k=1, weights=(0.0,)), "holds a 0"),
        (dict(k=1, keep="low"), "keep='low'"),
        (dict(k=1, scope="frame"), "scope='frame'"),
        (dict(k=1, reduce="all"), "reduce='all'"),
        (dict(k=1, always_keep=True), "always_keep=True"),
        (dict(k=1, history="call"), "history='call'"),
        (dict(k=1, mask="xor"), "mask='xor'"),
        (dict(k=1, reference="last_kept"), "last_kept"),
        (dict(threshold=0.1, reference="last_kept", reduce="any"), "last_kept"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_rules_are_checked_when_made(fields, message):
    with pytest.raises(ValueError, match=message):
        PruneRule(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(k=1, reference=3), "reference=3 must be a name"),
        (dict(threshold="0.25"), "threshold='0.25' must be a number"),
        (dict(k=1, external=True), "external=True must be a number"),
    ],
)
def test_rule_fields_of_a_wrong_type(fields, message):
    with pytest.raises(TypeError, match=message):
        PruneRule(**fields)


@pytest.mark.parametrize(
    "rule",
    [
        RULE,
        PruneRule(reference=()),
        PruneRule(threshold=0.1 + 0.2, reduce="any", always_keep="first"),
        PruneRule(reference=("running_mean", "frame_mean"), metric=("gaussian", "l1"), k=3,
                  weights=(1e-17, -2.5), channels=1 / 3, history="chunk"),
        PruneRule(reference=(), external=-1.0, k=(7,), scope="call", mask="or"),
        PruneRule(reference=(), external=1.0, k=(3, 0, 11)),
        PruneRule(drop_ratio=0.7, drop_multiple=2),
    ],
    ids=lambda rule: rule.text(),
)  # fmt: skip
def test_text_gives_back_the_rule(rule):
    again = PruneRule.parse(rule.text())
    assert again == rule and hash(again) == hash(rule) and again.text() == rule.text()


def test_rule_is_frozen_and_equal_rules_are_equal():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RULE.threshold = 0.5
    assert PruneRule(reference=["previous"], metric=("l1",), weights=[1], k=2) == PruneRule(
        metric="l1", k=2
    )
    assert dataclasses.replace(RULE, threshold=0.5).text() == "threshold=0.5"


@pytest.mark.parametrize("text", ["threshold", "thresh=0.5", "k=1;shape=3", "threshold=x"])
def test_text_of_no_rule(text):
    with pytest.raises((ValueError, TypeError), match="PruneRule"):
        PruneRule.parse(text)


def call(**changes):
    arguments = dict(
        x=tensors.randn((2, 5, 8)),
        positions=tensors.ints((3, 2, 5), 0, 9),
        rule=RULE,
    )
    arguments.update(changes)
    return prune_tokens(arguments.pop("x"), arguments.pop("positions"), **arguments)


SCORED = PruneRule(reference=(), external=1.0, k=2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(x=torch.zeros(10, 8)), ValueError, r"x must be a tensor \[T, N, D\]"),
        (dict(x=[1]), ValueError, "x must be a tensor"),
        (dict(x=torch.zeros(2, 5, 8).long()), TypeError, "x has dtype int64"),
        (dict(x=torch.zeros(2, 5, 8).double()), TypeError, "x has dtype float64"),
        (dict(x=torch.zeros(2, 0, 8), positions=torch.zeros(3, 2, 0).int()), ValueError,
         "capacity=0|at least 1"),
        (dict(x=torch.zeros(2, 5, 0)), ValueError, "sizes of at least 1"),
        (dict(positions=tensors.ints((3, 2, 4), 0, 9)), ValueError, "positions has shape"),
        (dict(positions=torch.zeros(3, 2, 5)), TypeError, "positions has dtype float32"),
        (dict(rule="threshold=0.25"), TypeError, "rule must be a PruneRule, got str"),
        (dict(capacity=0), ValueError, "capacity=0"),
        (dict(shapes=((2, 5),)), ValueError, r"\[M, D\] \(with shapes\)"),
        (dict(external_score=torch.zeros(2, 5)), ValueError, "external_score is given"),
        (dict(rule=SCORED), ValueError, "external_score is missing"),
        (dict(rule=SCORED, external_score=torch.zeros(2, 4)), ValueError, "external_score has"),
        (dict(external_mask=torch.zeros(2, 5)), TypeError, "external_mask has dtype"),
        (dict(group_ids=torch.zeros(2, 5).int()), ValueError, "no k or ratio"),
        (dict(rule=PruneRule(k=(1, 2))), ValueError, "needs group_ids"),
        (dict(rule=PruneRule(k=1), group_k=torch.ones(2).int()), ValueError, "needs group_ids"),
        (dict(rule=PruneRule(ratio=0.5), group_ids=torch.zeros(2, 5).int(),
              group_k=torch.ones(2).int()), ValueError, "the rule has none"),
        (dict(rule=PruneRule(k=1), group_ids=torch.zeros(2, 5).int(),
              group_k=torch.ones(3, 2).int()), ValueError, "group_k has shape"),
        (dict(state=PruneState.empty(PruneRule(reference="frame_mean", k=1), 5, 8)), ValueError,
         "state holds no tensors, this rule needs steps, previous"),
        (dict(state=PruneState.empty(RULE, 6, 8)), ValueError, "has 6 locations, x has N=5"),
        (dict(state=PruneState.empty(RULE, 5, 4)), ValueError, "state.previous has shape"),
        (dict(state=PruneState.empty(RULE, 5, 8, streams=2)), ValueError, "state.steps has shape"),
        (dict(state=PruneState.empty(RULE, 5, 8, dtype=torch.float16)), TypeError,
         "state.previous has dtype float16"),
        (dict(state=PruneState.empty(RULE, 5, 8, device="meta")), ValueError, "state.steps is on"),
        (dict(backend="cpuu"), ValueError, "cpuu"),
        (dict(backend="cuda"), BackendUnavailable, "reference"),
    ],
)  # fmt: skip
def test_bad_calls(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ((), "at least one pair"),
        (((2, 5), (1,)), "at least one pair"),
        (((2, 4),), "add up to 8 tokens, x has M=10"),
        (((2, 5), (0, 3)), "pairs"),
    ],
)
def test_bad_shapes(shapes, message):
    with pytest.raises(ValueError, match=message):
        call(x=torch.zeros(10, 8), positions=torch.zeros(3, 10).int(), shapes=shapes)


def test_shapes_are_pairs_on_the_host():
    with pytest.raises(TypeError, match="shapes must be pairs of ints on the host, got a tensor"):
        call(shapes=torch.tensor([[2, 5]]), x=torch.zeros(10, 8))


def test_nothing_is_written_when_a_call_is_refused():
    state = PruneState.empty(RULE, 5, 8)
    with pytest.raises(ValueError, match="external_score is given"):
        call(state=state, external_score=torch.zeros(2, 5))
    assert state.previous.isnan().all() and state.steps.tolist() == [0]


def test_input_that_requires_grad_is_refused():
    with pytest.raises(RuntimeError, match="no backward"):
        call(x=torch.zeros(2, 5, 8, requires_grad=True))
