"""Names, globs, expressions; unknown names with the nearest; every shipped case is sound."""

from __future__ import annotations

import pytest
import torch

from vicostream_kernels.bench import registry
from vicostream_kernels.bench.registry import UnknownCase, select


@pytest.fixture
def cases(toy, providers):
    made = [
        toy(name, torch=providers["double"])
        for name in ("append/1t/float32", "append/1t/bfloat16", "prune/9t/float32")
    ]
    return {case.name: case for case in made}


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("append", 2),
        ("toy_op", 3),
        ("append/1t/float32", 1),
        ("*/float32", 2),
        (r".*/\dt/b.*", 1),
    ],
)
def test_select_understands_words_ops_globs_and_expressions(cases, pattern, count):
    assert len(select([pattern], cases)) == count


def test_select_keeps_the_order_of_registration_and_no_case_twice(cases):
    chosen = select(["prune", "append", "*/float32"], cases)
    assert [case.name for case in chosen] == list(cases)


def test_an_unknown_name_gives_the_nearest(cases):
    with pytest.raises(UnknownCase, match="no benchmark case matches 'apend'; nearest: append"):
        select(["append", "apend"], cases)


def test_an_invalid_expression_is_an_unknown_name(cases):
    with pytest.raises(UnknownCase, match="append"):
        select(["append("], cases)


def test_a_name_is_registered_once(toy, providers, monkeypatch):
    monkeypatch.setattr(registry, "CASES", {})
    case = toy(torch=providers["double"])
    assert registry.add(case) is case
    with pytest.raises(ValueError, match="registered already"):
        registry.add(case)


def test_a_case_is_named_after_its_word(toy, providers):
    with pytest.raises(ValueError, match="must be named retrieve/"):
        registry.Case(**{**vars(toy(torch=providers["double"])), "word": "retrieve"})


SHIPPED = registry.load()
SMALL = [case for case in SHIPPED.values() if case.bytes <= 16 << 20]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_shipped_case_has_a_baseline_and_counts_no_more_than_it_allocates(case):
    device = torch.device("cpu")
    assert case.baseline in {p.name for p in case.providers(device)}
    inputs = case.make(device, 0)
    result = [p for p in case.providers(device) if p.name == case.baseline][0].run(inputs)
    held = [t for t in (*inputs.values(), *case.outputs(inputs, result).values())]
    tensors = {t.data_ptr(): t for t in held if isinstance(t, torch.Tensor)}
    # A case of several calls reads its weights in each.
    calls = case.axes.get("calls", 1)
    assert case.bytes <= 2 * calls * sum(t.nbytes for t in tensors.values())


def test_every_word_with_cases_has_a_smoke_case():
    words = {case.word for case in SHIPPED.values()}
    assert words == {case.word for case in SHIPPED.values() if case.smoke}
    assert "append" in words
