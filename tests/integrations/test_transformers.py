"""generate with a SinkWindowCache: transformers' own tokens, beyond the window StreamingLLM's."""

from __future__ import annotations

import pytest
import torch
from streaming_llm_oracle import DenseStreamingLLM
from transformers import DynamicCache
from transformers_kit import (
    IMAGE,
    VISION_END,
    VISION_START,
    at,
    generate,
    make,
    models,
    prompt,
    tiny,
    tiny_vl,
)

from vicostream_kernels.integrations.transformers import SinkWindowCache, register

register()


@pytest.mark.parametrize("family", models())
@pytest.mark.parametrize("impl", ["eager", "sdpa"])
def test_tokens_in_the_window_are_those_of_transformers(family: str, impl: str) -> None:
    ids, mask = prompt(3, 19, padding=(0, 7, 18))
    model = make(family, impl)
    expected = generate(model, ids, mask, cache=DynamicCache())
    model.set_attn_implementation("vicostream")
    cache = SinkWindowCache(3, 28, page_size=4, chunk_tokens=28, model=model)  # 19 + 12 = 3 + 28
    assert torch.equal(generate(model, ids, mask, cache=cache), expected)
    chunked = SinkWindowCache(3, 28, page_size=4, chunk_tokens=5, model=model)
    # Older transformers cut M-RoPE ids along the wrong axis when generate feeds chunks.
    calls = None if family == "qwen2_5_vl" else 8
    got = generate(model, ids, mask, cache=chunked, prefill_chunk_size=calls)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("family", models())
def test_tokens_beyond_the_window_are_those_of_streaming_llm(family: str) -> None:
    model = make(family)
    ids, mask = prompt(2, 30, padding=(0, 11))
    cache = SinkWindowCache(3, 14, page_size=4, chunk_tokens=6, model=model)
    got = generate(model, ids, mask, cache=cache, new=20)
    full = generate(model, ids, mask, cache=DynamicCache(), new=20)
    for row, (pads, chunks) in enumerate([(0, [6] * 5), (11, [6, 6, 6, 1])]):
        oracle = DenseStreamingLLM(model, 3, 14)
        assert got[row].tolist() == oracle.greedy(ids[row, pads:], chunks, 20)
        assert got[row].tolist() != full[row].tolist()  # or the window has never mattered


@pytest.mark.parametrize(
    ("sink", "window", "page", "chunks"),
    [(4, 12, 16, [12, 12, 1, 7, 9]), (0, 9, 4, [9, 2, 9, 1, 1]), (5, 1, 1, [1] * 9)]
    + [(17, 8, 16, [5, 8, 8, 3, 8, 8]), (1, 16, 5, [2, 16, 16, 16, 1, 16])],
)
def test_logits_of_forward_calls_in_chunks(
    sink: int, window: int, page: int, chunks: list[int]
) -> None:
    model = tiny("llama")
    oracle = DenseStreamingLLM(model, sink, window)
    cache = SinkWindowCache(sink, window, page, chunk_tokens=window)
    ids, _ = prompt(1, sum(chunks))
    for part in ids[0].split(chunks):
        got = model(part[None], **at(cache)).logits[0]
        torch.testing.assert_close(got.double(), oracle.feed(part), rtol=2e-4, atol=2e-4)


def test_a_long_call_equals_calls_of_chunk_tokens() -> None:
    model = tiny("qwen2")
    ids, _ = prompt(2, 40)
    whole = SinkWindowCache(2, 10, 4, chunk_tokens=7)
    got = model(ids, **at(whole)).logits
    pieces = SinkWindowCache(2, 10, 4, chunk_tokens=7)
    expected = [model(part, **at(pieces)).logits for part in ids.split(7, dim=1)]
    torch.testing.assert_close(got, torch.cat(expected, dim=1), rtol=1e-4, atol=1e-4)


def test_padding_leaves_no_trace_wherever_it_stands() -> None:
    model = tiny("llama")
    ids, _ = prompt(1, 26, seed=3)
    mask = torch.ones_like(ids)
    for hole in (0, 1, 6, 7, 8, 15, 23, 25):
        mask[:, hole] = 0
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    cache = SinkWindowCache(2, 8, 4, chunk_tokens=3)
    holes = model(ids, attention_mask=mask, position_ids=position_ids, **at(cache))
    dense = SinkWindowCache(2, 8, 4, chunk_tokens=3)
    real = mask[0].bool()
    expected = model(ids[:, real], **at(dense)).logits
    torch.testing.assert_close(holes.logits[:, real], expected, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 26
    # Both hold the same now: the next tokens agree too.
    step = torch.tensor([[5]])
    got = model(step, **at(cache), position_ids=real.sum().view(1, 1)).logits
    torch.testing.assert_close(got, model(step, **at(dense)).logits, rtol=1e-4, atol=1e-4)


def test_rows_do_not_depend_on_their_batch() -> None:
    model = tiny("qwen3")
    ids, mask = prompt(3, 33, padding=(4, 0, 20))
    together = generate(model, ids, mask, cache=SinkWindowCache(3, 9, 4), new=15)
    for row, pads in enumerate((4, 0, 20)):
        alone, ones = ids[row : row + 1, pads:], mask[row : row + 1, pads:]
        got = generate(model, alone, ones, cache=SinkWindowCache(3, 9, 4), new=15)
        assert torch.equal(got[0], together[row])


def test_a_second_turn_continues_the_stream() -> None:
    model = tiny("qwen2")
    ids, mask = prompt(2, 12, padding=(0, 5))
    cache = SinkWindowCache(3, 10, 4, chunk_tokens=10)
    first = generate(model, ids, mask, cache=cache, new=9)
    more, _ = prompt(2, 6, seed=8)
    history = torch.cat([ids, first, more], dim=1)
    mask = torch.cat([mask, torch.ones(2, 15, dtype=torch.long)], dim=1)
    second = generate(model, history, mask, cache=cache, new=9)
    for row, pads in enumerate((0, 5)):
        oracle = DenseStreamingLLM(model, 3, 10)
        turn = ids[row, pads:]
        chunks = [10, 2] if pads == 0 else [7]
        assert oracle.greedy(turn, chunks, 9) == first[row].tolist()
        # generate never feeds the last token it made: it comes with the next turn.
        chunk = torch.cat([first[row, -1:], more[row]])
        assert oracle.greedy(chunk, [7], 9) == second[row].tolist()


def test_beam_search_moves_the_pages_with_the_beams() -> None:
    model = tiny("llama", "sdpa")
    ids, mask = prompt(2, 15, padding=(0, 4))
    beams = {"num_beams": 3, "num_return_sequences": 2, "new": 14}
    expected = generate(model, ids, mask, cache=DynamicCache(), **beams)
    model.set_attn_implementation("vicostream")
    cache = SinkWindowCache(4, 25, 4)
    assert torch.equal(generate(model, ids, mask, cache=cache, **beams), expected)


@pytest.mark.parametrize("rope_type", ["linear", "llama3", "yarn"])
def test_scaled_rope(rope_type: str) -> None:
    """The model's own frequencies (seen through model=) and those from the config are the same."""
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 64}
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = tiny("llama", rope_parameters=rope)
    ids, mask = prompt(1, 50)
    seen = generate(model, ids, mask, cache=SinkWindowCache(4, 8, 4, model=model), new=12)
    assert torch.equal(generate(model, ids, mask, cache=SinkWindowCache(4, 8, 4), new=12), seen)


def test_images_count_by_their_positions() -> None:
    """M-RoPE ids advance slower than tokens: the sinks move by ids, for each of (t, h, w)."""
    model = tiny_vl()
    generator = torch.Generator().manual_seed(5)
    steps, rows, columns = 2, 3, 4
    grid = torch.stack(
        torch.meshgrid(*(torch.arange(s) for s in (steps, rows, columns)), indexing="ij")
    ).flatten(1)
    ids = torch.cat([torch.arange(7).expand(3, 7), 7 + grid, torch.arange(11, 24).expand(3, 13)], 1)
    embeds = torch.randn(ids.shape[1], 64, generator=generator)
    oracle = DenseStreamingLLM(model, 3, 12, image_ids=True)
    cache = SinkWindowCache(3, 12, 4, chunk_tokens=12, model=model)
    for start, end in ((0, 9), (9, 20), (20, 31), (31, 32), (32, 44)):
        part = slice(start, end)
        got = model.model.language_model(
            inputs_embeds=embeds[None, part], position_ids=ids[:, None, part], **at(cache)
        ).last_hidden_state
        expected = oracle.feed(embeds=embeds[part], ids=ids[:, part])
        logits = model.lm_head(got[0]).double()
        torch.testing.assert_close(logits, expected, rtol=5e-4, atol=5e-4)


def test_a_picture_goes_through_the_vision_tower() -> None:
    """The tower has no cache: its windows are served as with sdpa, inside one registered name."""
    model = tiny_vl("sdpa")
    pixels = torch.randn(6 * 4, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(2))
    grid = torch.tensor([[1, 6, 4]])
    text, _ = prompt(1, 5)
    image = torch.tensor([[VISION_START, *[IMAGE] * 6, VISION_END]])
    ids = torch.cat([text, image, text], dim=1)
    picture = {
        "pixel_values": pixels,
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == IMAGE).int(),
    }
    mask = torch.ones_like(ids)
    expected = generate(model, ids, mask, cache=DynamicCache(), **picture)
    model.set_attn_implementation("vicostream")
    cache = SinkWindowCache(4, 26, 4, model=model)
    assert torch.equal(generate(model, ids, mask, cache=cache, **picture), expected)


@pytest.mark.parametrize("family", models())
def test_without_our_cache_it_is_sdpa(family: str) -> None:
    model = make(family, "sdpa")
    ids, mask = prompt(2, 14, padding=(0, 6))
    expected = generate(model, ids, mask)
    no_cache = model(ids, attention_mask=mask, use_cache=False).logits
    static = generate(model, ids, mask, cache_implementation="static", disable_compile=True)
    model.set_attn_implementation("vicostream")
    assert torch.equal(generate(model, ids, mask), expected)
    assert torch.equal(model(ids, attention_mask=mask, use_cache=False).logits, no_cache)
    again = generate(model, ids, mask, cache_implementation="static", disable_compile=True)
    assert torch.equal(again, static)


def test_training_without_our_cache_works() -> None:
    model = tiny("llama", attention_dropout=0.5).train().requires_grad_(True)
    ids, _ = prompt(1, 9)
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = tiny("qwen2").to(dtype)
    ids, _ = prompt(2, 30)
    oracle = DenseStreamingLLM(model, 4, 16)
    cache = SinkWindowCache(4, 16, chunk_tokens=16, model=model)
    for part in ids.split(10, dim=1):
        got = model(part, **at(cache)).logits
        expected = oracle.feed(part[0])
    cosine = torch.cosine_similarity(got[0].double(), expected, dim=-1)
    assert cosine.min() > 0.99
    assert cache.layers[0].k_pages.dtype == dtype
