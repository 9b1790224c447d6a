"""The sampler against transformers' own choice of processors, scores and draws."""

from __future__ import annotations

import pytest
import torch
from model_kit import small_model

from vicostream_kernels.models import Sampler

CASES = {
    "greedy": {},
    "greedy with penalty": {"repetition_penalty": 1.3},
    "temperature": {"do_sample": True, "temperature": 0.6, "top_k": 0},
    "top-k": {"do_sample": True, "top_k": 5},
    "top-p": {"do_sample": True, "top_k": 0, "top_p": 0.7},
    "min-p and typical": {"do_sample": True, "top_k": 0, "min_p": 0.05, "typical_p": 0.9},
    "cut-offs": {"do_sample": True, "top_k": 0, "epsilon_cutoff": 3e-4, "eta_cutoff": 2e-3},
    "all of them": {
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 30,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "suppress_tokens": [1, 2, 3],
        "bad_words_ids": [[7], [8, 9]],
        "renormalize_logits": True,
    },
}


@pytest.fixture(scope="module")
def model():
    return small_model()


def config_of(fields: dict):
    from transformers import GenerationConfig

    return GenerationConfig(eos_token_id=634, **fields)


@pytest.mark.parametrize("case", CASES)
def test_same_processors_scores_and_tokens(model, case: str) -> None:
    config = config_of(CASES[case])
    sampler = Sampler(config, seed=11)
    config._eos_token_tensor = torch.tensor([634])
    theirs = model._get_logits_processor(config, input_ids_seq_length=4, device="cpu")
    assert [type(x) for x in sampler.processors] == [type(x) for x in theirs]

    noise, draws = torch.Generator().manual_seed(5), torch.Generator().manual_seed(11)
    ids = torch.tensor([4, 9, 8, 4])
    for _ in range(20):
        logits = 4 * torch.randn(640, generator=noise)
        scores = theirs(ids[None], logits[None].clone())
        if config.do_sample:
            expected = int(torch.multinomial(scores.softmax(-1), 1, generator=draws))
        else:
            expected = int(scores.argmax())
        token = sampler.next_token(ids, logits)
        assert token == expected
        ids = torch.cat((ids, torch.tensor([token])))


def test_seed_fixes_the_draws() -> None:
    config = config_of({"do_sample": True})
    logits = torch.zeros(640)
    drawn = [
        [Sampler(config, seed=seed).next_token(torch.tensor([1]), logits) for _ in range(1)]
        + [s.next_token(torch.tensor([1]), logits) for s in [Sampler(config, seed=seed)] * 8]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_overrides_do_not_touch_the_configuration() -> None:
    config = config_of({})
    sampler = Sampler(config, do_sample=True, temperature=0.5)
    assert sampler.do_sample and len(sampler.processors) == 1
    assert not config.do_sample


def test_a_whole_number_serves_where_transformers_wants_a_fraction() -> None:
    logits = torch.randn(640, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([1])
    whole, fraction = (
        Sampler(config_of({}), do_sample=True, temperature=t, repetition_penalty=t, top_k=9)
        for t in (2, 2.0)
    )
    drawn = [[s.next_token(ids, logits) for _ in range(8)] for s in (whole, fraction)]
    assert drawn[0] == drawn[1]


def test_greedy_ties_go_to_the_lowest_index() -> None:
    logits = torch.zeros(640)
    logits[[30, 20, 600]] = 2.0
    assert Sampler(config_of({})).next_token(torch.tensor([1]), logits) == 20


def test_refusals() -> None:
    with pytest.raises(ValueError, match="temprature.*did you mean 'temperature'"):
        Sampler(config_of({}), temprature=0.1)
    with pytest.raises(ValueError, match="num_beams=4"):
        Sampler(config_of({}), num_beams=4)
    with pytest.raises(ValueError, match="temperature"):
        Sampler(config_of({}), do_sample=True, temperature=-1.0)
