"""What models run in: torch.compile, autocast, and either name that transformers gives a cache."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers_kit import CACHE, CACHE_NAMES, at, generate, make, models, prompt, tiny

from vicostream_kernels.integrations.transformers import SinkWindowCache, register

register()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_each_name_of_the_cache_works(name: str) -> None:
    model = tiny("qwen2")
    ids, mask = prompt(2, 20, padding=(0, 6))
    expected = generate(model, ids, mask, cache=SinkWindowCache(3, 9, 4), new=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if name == CACHE else "ignore", FutureWarning)
        cache = {name: SinkWindowCache(3, 9, 4)}
        settings = {"max_new_tokens": 8, "do_sample": False}
        got = model.generate(ids, attention_mask=mask, **cache, **settings)
        assert torch.equal(got[:, 20:], expected)
        forward = [model(ids[:1], **{name: SinkWindowCache(3, 9, 4)}).logits for _ in range(2)]
    assert torch.equal(forward[0], forward[1])
    assert torch.equal(forward[0], model(ids[:1], **at(SinkWindowCache(3, 9, 4))).logits)


def test_a_cache_under_a_name_that_nobody_knows_is_refused() -> None:
    """Models pass on what they don't know, and would run without the cache."""
    with pytest.raises(TypeError, match="does not know my_cache=; transformers takes cache= since"):
        tiny("llama")(torch.tensor([[7]]), my_cache=SinkWindowCache())


def check_compiled_forwards(dynamic: bool | None, parts: list[int]) -> None:
    model = tiny("llama", num_hidden_layers=1)
    compiled = torch.compile(model.model, backend="eager", dynamic=dynamic)
    ids, _ = prompt(2, sum(parts))
    ours, expected = SinkWindowCache(3, 9, 4), SinkWindowCache(3, 9, 4)
    with torch.no_grad():
        for part in ids.split(parts, dim=1):
            got = compiled(part, **at(ours)).last_hidden_state
            assert torch.equal(got, model.model(part, **at(expected)).last_hidden_state)


def test_compiled_forward_calls(fresh_compiler: None) -> None:
    check_compiled_forwards(None, [24, 1, 1])


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, False])
def test_compiled_forward_calls_of_any_length(fresh_compiler: None, dynamic: bool) -> None:
    check_compiled_forwards(dynamic, [7, 17, 1, 3, 1])


def test_masks_are_compiled_without_a_break(fresh_compiler: None) -> None:
    """Also for lengths that are not known: an int of a class of our own could not be made then."""
    model, (ids, mask) = tiny("llama"), prompt(2, 11, padding=(0, 4))
    cache = SinkWindowCache(3, 9, 4)

    @torch.compile(backend="eager", dynamic=True, fullgraph=True)
    def new_tokens(embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return create_causal_mask(
            config=model.config, inputs_embeds=embeds, attention_mask=mask, **at(cache)
        )

    assert torch.equal(new_tokens(torch.zeros(2, 11, 64), mask), mask.bool())
    model(ids, attention_mask=mask, **at(cache))
    mask = torch.cat([mask, torch.tensor([[1, 1], [0, 1]])], dim=1)
    assert torch.equal(new_tokens(torch.zeros(2, 2, 64), mask), mask[:, 11:].bool())


@pytest.mark.slow
def test_compiled_generate_with_padding(fresh_compiler: None) -> None:
    """And with model=, whose hook on the rotary module is then compiled too."""
    model = tiny("llama")
    ids, mask = prompt(2, 19, padding=(0, 7))
    expected = generate(model, ids, mask, cache=SinkWindowCache(3, 9, 4), new=6)
    model.forward = torch.compile(model.forward, backend="eager")
    cache = SinkWindowCache(3, 9, 4, model=model)
    assert torch.equal(generate(model, ids, mask, cache=cache, new=6), expected)


@pytest.mark.parametrize("family", models())
def test_autocast_is_as_near_as_transformers_own(family: str) -> None:
    """Keys come in float32 and values in bfloat16 then, as rotations are not cast."""
    model = make(family)
    ids, mask = prompt(3, 19, padding=(0, 7, 14))
    real = mask.bool()

    @torch.no_grad()
    def logits(cache) -> torch.Tensor:
        given = {"attention_mask": mask, **at(cache)}
        if family != "qwen2_5_vl":
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return model(ids, **given).logits[real]

    exact = logits(DynamicCache())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = logits(DynamicCache())
        cache = SinkWindowCache(3, 28, 4, chunk_tokens=6, model=model)
        ours = logits(cache)
    assert ours.dtype == theirs.dtype == cache.layers[0].k_pages.dtype == torch.bfloat16
    assert (ours - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()
    assert (ours - theirs).abs().mean() < (theirs - exact).abs().mean()


def test_autocast_may_come_and_go() -> None:
    model = tiny("llama")
    ids, mask = prompt(2, 30, padding=(0, 4))
    cache, expected = SinkWindowCache(3, 9, 4), SinkWindowCache(3, 9, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = generate(model, ids, mask, cache=cache)
    assert first.shape == (2, 12)
    step = torch.tensor([[5], [6]])
    with torch.no_grad():  # a stream goes on in the dtype of its pages, the rest in the model's
        assert model(step, **at(cache)).logits.dtype == torch.float32
    assert cache.layers[0].k_pages.dtype == torch.bfloat16
    cache.reset()  # then pages are made anew
    again = generate(model, ids, mask, cache=cache)
    assert torch.equal(again, generate(model, ids, mask, cache=expected))
    assert cache.layers[0].k_pages.dtype == torch.float32
