"""Dotted keys: what they change, and what is said when they are wrong."""

from __future__ import annotations

import pytest

from vicostream_kernels import methods


@pytest.mark.parametrize(
    ("key", "typed", "value"),
    [
        ("prune.threshold", "0.15", 0.15),
        ("prune.reduce", "none", "none"),
        ("prune.weights", "0.5", (0.5,)),
        ("retrieve.k", "32", 32),
        ("engine.pixels", "12_544", 12544),
        ("engine.pixels", "none", None),
        ("engine.pixels", "1e5", 100_000),
        ("engine.seconds_per_step", "None", None),
        ("engine.window_chunks", "16", 16),
        ("engine.history", "all", "all"),
        ("attention.sink_tokens", 3, 3),
        ("engine.max_pages", None, None),
    ],
)
def test_values_are_parsed_by_the_type_of_their_key(key, typed, value):
    section, name = key.split(".")
    got = getattr(getattr(methods.get("vicostream", {key: typed}), section), name)
    assert got == value and type(got) is type(value)


def test_everything_else_stays():
    changed = methods.get("vicostream", {"prune.threshold": "0.15"})
    assert changed.engine == methods.get("vicostream").engine
    assert methods.get("vicostream", {"prune.threshold": "0.25"}) == methods.get("vicostream")


def test_sections_are_switched_off_and_taken_from_other_presets():
    assert methods.get("vicostream", {"prune": "none"}).prune is None
    assert methods.get("vicostream", {"retrieve": None}).retrieve is None
    mixed = methods.get("full-history", {"prune.threshold": 0.5, "prune": "vicostream"})
    assert mixed.prune.threshold == 0.5 and mixed.retrieve is None


@pytest.mark.parametrize(
    ("preset", "overrides", "said"),
    [
        ("vicostrem", {}, "did you mean 'vicostream'"),
        ("streaming_llm", {}, "did you mean 'streaming-llm'"),
        ("zzz", {}, "known: vicostream, full-history, streaming-llm"),
        ("vicostream", {"prune.treshold": "1"}, "did you mean 'prune.threshold'"),
        ("vicostream", {"prun.threshold": "1"}, "did you mean 'prune.threshold'"),
        ("vicostream", {"engine.chunk": "1"}, "unknown key 'engine.chunk'"),
        ("vicostream", {"threshold": "1"}, "unknown key 'threshold'"),
        ("vicostream", {"prune": "vicostrem"}, "did you mean 'vicostream'"),
    ],
)
def test_unknown_names_show_the_nearest(preset, overrides, said):
    with pytest.raises(methods.UnknownName, match=said):
        methods.get(preset, overrides)


@pytest.mark.parametrize(
    ("preset", "overrides", "said"),
    [
        ("vicostream", {"prune.threshold": "a lot"}, "prune.threshold='a lot': give none or a num"),
        ("vicostream", {"prune.threshold": "7"}, "prune.threshold=7: .*outside"),
        ("vicostream", {"prune.threshold": "nan"}, "prune.threshold='nan'"),
        ("vicostream", {"retrieve.k": "2.5"}, "retrieve.k='2.5': give none or a whole number"),
        ("vicostream", {"retrieve.k": "0"}, "k=0 must be at least 1"),
        ("vicostream", {"retrieve.k": True}, "retrieve.k=True"),
        ("vicostream", {"retrieve.score": "euclid"}, "give dot or cosine"),
        ("vicostream", {"engine.frames_per_chunk": "0"}, "frames_per_chunk=0 must be at least 1"),
        ("vicostream", {"engine.window_chunks": "-1"}, "window_chunks=-1 must not be negative"),
        ("vicostream", {"engine.history": "window"}, "leaves nothing to retrieve"),
        ("full-history", {"engine.history": "window"}, "needs a window"),
        ("full-history", {"prune.threshold": "0.2"}, "first take a preset's with prune=vicostream"),
        ("full-history", {"retrieve.k": "2"}, "'full-history' has no retrieve step"),
        ("vicostream", {"reuse.ratio": "1.5"}, "reuse.ratio=1.5: ratio=1.5 is outside"),
        ("stc", {"reuse.interval": "0"}, "interval=0 must be at least 1"),
        ("stc", {"reuse.selection": "head"}, "give layer or shared"),
        ("vicostream", {"attention.window": "64"}, "set one of them to none"),
        ("streaming-llm", {"attention.window": "none"}, "set a window"),
        ("vicostream", {"prune": 3}, "give none or a preset's name"),
        ("vicostream", {"engine.history_bytes": "256M"}, r"write MiB \(1024\) or MB \(1000\)"),
        ("vicostream", {"scorer.budget": "5"}, "first take a preset's with prune=streamingtom"),
    ],
)
def test_wrong_values_name_the_key_and_what_is_allowed(preset, overrides, said):
    with pytest.raises(methods.InvalidValue, match=said):
        methods.get(preset, overrides)
