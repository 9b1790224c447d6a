"""The presets are what their methods published, and they fit the ops that they configure."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch

from vicostream_kernels import methods
from vicostream_kernels.ops.attention import sink_window_attention
from vicostream_kernels.ops.prune import prune_tokens
from vicostream_kernels.ops.retrieve import topk_blocks


def test_names():
    assert methods.names()[:3] == ["vicostream", "full-history", "streaming-llm"]
    assert all(methods.get(name).name == name for name in methods.names())


def test_vicostream_is_as_published():
    method = methods.get("vicostream")
    engine = method.engine
    assert (engine.pixels, engine.frames_per_chunk, engine.window_chunks) == (90_000, 8, 4)
    assert engine.resizes == 2
    assert engine.seconds_per_step == 1.0
    assert engine.system_prompt == "with_first_chunk" and engine.history == "all"
    rule = method.prune
    assert (rule.reference, rule.metric, rule.threshold) == ("previous", "cosine", 0.25)
    assert (rule.keep, rule.reduce, rule.always_keep) == ("below", "any", "first")
    assert (method.retrieve.k, method.retrieve.score) == (64, "cosine")
    assert (method.retrieve.force_first, method.retrieve.force_last) == (0, 0)
    assert method.attention == methods.AttentionRule() and method.reuse is None


@pytest.mark.parametrize(
    ("name", "eps", "chunks", "k"),
    [("streamingbench", 0.25, 4, 32), ("ovo", 0.15, 4, 64), ("ego4d", 0.5, 16, 64)],
)
def test_vicostream_as_launched_for_a_benchmark(name, eps, chunks, k):
    method = methods.get(f"vicostream-{name}")
    assert (method.prune.threshold, method.engine.window_chunks) == (eps, chunks)
    assert method.retrieve.k == k


def test_vicostream_pruning_against_the_definition():
    torch.manual_seed(0)
    x = torch.randn(4, 12, 16)
    x[1:, ::2] = x[:1, ::2] + 0.05 * torch.randn(3, 6, 16)  # these columns hardly change
    positions = torch.arange(48, dtype=torch.int32).view(1, 4, 12).repeat(3, 1, 1)
    kept = prune_tokens(x, positions, methods.get("vicostream").prune)
    changed = [
        any(torch.cosine_similarity(x[t - 1, n], x[t, n], dim=0) < 0.25 for t in (1, 2, 3))
        for n in range(12)
    ]
    assert not any(changed[::2]) and any(changed[1::2])
    expected = torch.tensor([[True] * 12] + [changed] * 3)
    assert torch.equal(kept.mask, expected)


def test_full_history_restricts_nothing():
    method = methods.get("full-history")
    assert (method.prune, method.reuse, method.retrieve) == (None, None, None)
    assert method.attention.kwargs() == {"sink_tokens": 0, "window": None}
    assert method.engine.window_chunks is None and method.engine.history == "all"


def test_streaming_llm_has_four_sinks_and_keeps_its_window_only():
    method = methods.get("streaming-llm")
    assert method.attention.kwargs() == {"sink_tokens": 4, "window": 2044}
    assert method.attention.positions == "cache" and method.engine.history == "window"
    assert (method.prune, method.retrieve) == (None, None)


@pytest.mark.parametrize(
    ("rule", "op"),
    [
        (methods.AttentionRule(), sink_window_attention),
        (methods.RetrieveRule(), topk_blocks),
    ],
)
def test_kwargs_are_parameters_of_the_op(rule, op):
    assert set(rule.kwargs()) <= set(inspect.signature(op).parameters)


def test_methods_are_values():
    assert methods.get("vicostream") == methods.get("vicostream")
    assert hash(methods.get("vicostream").prune) == hash(methods.get("vicostream").prune)
    with pytest.raises(dataclasses.FrozenInstanceError):
        methods.get("vicostream").engine.pixels = 1
    assert all(methods.get(name).source for name in methods.names())


def test_retrieval_presets_are_as_published():
    rekv, livevlm, quest, lserve, tom = (
        methods.get(name) for name in ("rekv", "livevlm", "quest", "lserve", "streamingtom")
    )
    rule = rekv.retrieve
    assert (rule.summary, rule.score, rule.k, rule.group) == ("raw_mean_key", "dot", 64, 1)
    assert (rule.layers, rule.scope, rule.positions) == ("each", "stream", "consecutive")
    assert rekv.attention.window == 15_000 and rekv.engine.frames_per_chunk == 2
    rule = livevlm.retrieve
    assert (rule.summary, rule.unit, rule.pool) == ("raw_mean_key", "page", "softmax")
    assert (rule.ratio, livevlm.engine.page_size) == (0.4, 16)
    rule = quest.retrieve
    assert (rule.summary, rule.scope, rule.min_k) == ("minmax", "query_head", 3)
    assert (rule.dense_layers, rule.prefill, rule.reuse_steps) == (2, "dense", 1)
    assert (rule.force_last, quest.engine.page_size) == (0, 16)
    rule = lserve.retrieve
    assert (rule.sub, rule.token_budget, rule.min_k, rule.force_last) == (4, 4096, 3, 1)
    assert (rule.reuse_steps, rule.dense_layers, lserve.engine.page_size) == (4, 0, 64)
    rule = tom.retrieve
    assert (rule.summary, rule.score, rule.token_budget) == ("mean_key", "cosine", 12_544)
    assert tom.prune == methods.get("streamingtom-ctr").prune and tom.scorer.budget == 50


@pytest.mark.parametrize(
    ("preset", "overrides", "said"),
    [
        ("rekv", {"retrieve.ratio": 0.4}, "exactly one of"),
        ("rekv", {"retrieve.k": "none"}, "exactly one of"),
        ("rekv", {"retrieve.score": "bound"}, "does not go with score='bound'"),
        ("quest", {"retrieve.summary": "mean_key"}, "does not go with score='bound'"),
        ("livevlm", {"retrieve.sub": 2}, "sub=2 needs summary='minmax'"),
        ("lserve", {"engine.page_size": 2}, "do not fit in a page"),
        ("vicostream", {"retrieve.scope": "kv_head"}, "needs a summary of keys"),
        ("vicostream", {"retrieve.reuse_steps": 2}, "needs a summary of keys"),
        ("rekv", {"retrieve.group": 3}, "a multiple of group=3"),
        ("rekv", {"retrieve.reuse_steps": 0}, "reuse_steps=0 must be at least 1"),
        ("livevlm", {"retrieve.ratio": 1.5}, "at most 1"),
        ("quest", {"retrieve.dense_layers": -1}, "must not be negative"),
    ],
)
def test_retrieve_rules_that_cannot_be(preset, overrides, said):
    with pytest.raises(methods.InvalidValue, match=said):
        methods.get(preset, overrides)
