"""Ours, segment by segment through pages, against transformers' one forward over everything."""

from __future__ import annotations

import pytest
import torch
from model_kit import (
    Driver,
    Text,
    Visual,
    relative_error,
    save_checkpoint,
    small_model,
    transformers_logits,
    visual,
)

from vicostream_kernels.models import Attend, load_model

BOUND = 1e-5

BEFORE, AFTER = Text(range(100, 117)), Text([388, 453, 63, 12, 500, 411, 10])
IMAGES = [
    BEFORE,
    visual(1, 6, 10, seed=1, is_image=True),
    Text([5, 6]),
    visual(1, 2, 14, seed=2, is_image=True),
    visual(1, 18, 4, seed=3, is_image=True),
    AFTER,
]
VIDEO = [
    BEFORE,
    *(visual(4, 10, 6, seed=chunk, seconds_per_step=1.0) for chunk in range(3)),
    AFTER,
]
MIXED = [
    BEFORE,
    visual(3, 4, 12, seed=4, seconds_per_step=0.37),
    visual(1, 12, 10, seed=5, is_image=True),
    Text([9]),
    visual(2, 6, 6, seed=6, seconds_per_step=40.0),
    AFTER,
]

MODELS = {
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "one kv head": {"num_key_value_heads": 1},
    "as many kv heads": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "seven to one": {
        "hidden_size": 112,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 2, 2]},
        "vision_out_hidden_size": 112,
    },
    "head dim 64, ViT head dim 80": {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        "vision_hidden_size": 160,
        "vision_fullatt_block_indexes": [0, 2],
    },
    "ViT window of 3": {"vision_window_size": 84, "vision_depth": 4},
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Runner and transformers' module of a case: saved by transformers, loaded twice."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    made = {}

    def get(case: str):
        if case not in made:
            folder = tmp_path_factory.mktemp("checkpoint")
            model = small_model(seed=len(made) + 1, **MODELS[case])
            # Small shards for one case: more than one file, and an index.
            size = "1MB" if case == "tied" else "5GB"
            save_checkpoint(folder, model, max_shard_size=size)
            assert (len(list(folder.glob("*.safetensors"))) > 1) == (case == "tied")
            theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
            made[case] = load_model(folder), theirs.eval()
        return made[case]

    return get


@pytest.mark.parametrize("case", MODELS)
def test_video_of_several_chunks(loaded, case: str) -> None:
    runner, theirs = loaded(case)
    check(runner, theirs, VIDEO, page_size=16)


@pytest.mark.parametrize(
    ("segments", "page_size"),
    [(IMAGES, 7), (MIXED, 1), (MIXED, 64)],
    ids=["images", "mixed, page size 1", "mixed, page size 64"],
)
def test_images_and_mixtures(loaded, segments: list[Text | Visual], page_size: int) -> None:
    runner, theirs = loaded("tied")
    check(runner, theirs, segments, page_size=page_size)


def check(runner, theirs, segments, *, page_size: int) -> None:
    expected = transformers_logits(theirs, segments)
    driver = Driver(runner, page_size=page_size)
    got = torch.cat([driver.feed(s, padding=5 * (i % 2)) for i, s in enumerate(segments)])
    assert relative_error(got, expected) <= BOUND


def test_video_outputs_none_leaves_the_same_cache(loaded) -> None:
    """A chunk that returns nothing writes the K and V of every layer all the same."""
    runner, theirs = loaded("gqa")
    expected = transformers_logits(theirs, VIDEO)
    driver = Driver(runner)
    for segment in VIDEO[:-1]:
        assert driver.feed(segment, padding=3, outputs="none") is None
    assert relative_error(driver.feed(AFTER), expected[-len(AFTER.ids) :]) <= BOUND


def test_last_output_is_the_last_row(loaded) -> None:
    runner, theirs = loaded("one kv head")
    expected = transformers_logits(theirs, VIDEO)
    driver = Driver(runner)
    for segment in VIDEO[:-1]:
        driver.feed(segment, outputs="none")
    got = driver.feed(AFTER, outputs="last")
    assert got.shape == (1, runner.vocab_size) and got.dtype == torch.float32
    assert relative_error(got, expected[-1:]) <= BOUND


def test_decoding_token_by_token_equals_one_forward(loaded) -> None:
    runner, theirs = loaded("seven to one")
    answer = [7, 300, 41, 41, 12, 634, 8]
    whole = [*VIDEO[:-1], Text([*AFTER.ids, *answer])]
    expected = transformers_logits(theirs, whole)[-len(answer) :]
    driver = Driver(runner, page_size=3)
    for segment in VIDEO:
        driver.feed(segment, outputs="none")
    got = torch.cat([driver.decode(token) for token in answer])
    assert relative_error(got, expected) <= BOUND


def test_greedy_answer_equals_transformers(loaded) -> None:
    """What a user sees: the same tokens as an argmax over transformers' full forward."""
    runner, theirs = loaded("gqa")
    question = runner.question_ids("What is happening now?")
    segments = [Text(runner.system_ids()), visual(2, 8, 8, seed=9)]
    driver = Driver(runner)
    for segment in segments:
        driver.feed(segment, outputs="none")
    sampler = runner.sampler(repetition_penalty=1.0, suppress_tokens=None)
    logits = driver.feed(Text(question), outputs="last")
    answer: list[int] = []
    for _ in range(6):
        answer.append(sampler.next_token(torch.tensor(question + answer), logits))
        logits = driver.decode(answer[-1])
    told = transformers_logits(theirs, [*segments, Text(question + answer)])
    start = -len(answer) - 1
    assert answer == told[start:-1].argmax(-1).tolist()


def test_window_and_sink_reach_the_op(loaded) -> None:
    """A bounded window must change the logits; sink tokens must change them again."""
    runner, _ = loaded("gqa")

    def last(**limits) -> torch.Tensor:
        driver = Driver(runner)
        driver.feed(BEFORE)
        ids = list(AFTER.ids)
        block = driver.stream.reserve(len(ids), kind="text")
        slots = driver.stream.plan(block, len(ids), len(ids))
        table = driver.stream.page_table([*driver.stream.blocks, block])
        attend = Attend(
            cache=driver.cache,
            slots=slots,
            page_table=[table] * runner.layers,
            cu_seqlens_q=torch.tensor([0, len(ids)], dtype=torch.int32),
            **limits,
        )
        embeds = runner.embed(torch.tensor(ids))
        positions = runner.text_positions(len(ids), driver.base)
        return runner.logits(runner.forward(embeds, positions, attend))

    full, windowed, sunk = last(), last(window=3), last(window=3, sink_tokens=4)
    assert relative_error(last(window=1000), full) <= BOUND
    assert relative_error(windowed, full) > 0.01
    assert relative_error(sunk, windowed) > 0.01
