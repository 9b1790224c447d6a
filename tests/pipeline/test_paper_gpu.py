"""The engine on a GPU that is not there: see `kit.paper_gpu`."""

from __future__ import annotations

import pytest

from kit import interpreter, paper_gpu

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(paper_gpu.missing() is not None, reason=str(paper_gpu.missing())),
    pytest.mark.skipif(interpreter.ACTIVE, reason="in the interpreter nothing is launched"),
]

#: Each way of pruning, reusing, reading and keeping that the presets have.
PRESETS = {
    "live": {},
    "full-history": {},
    "streaming-llm": {},
    "rekv": {},
    "quest": {},
    "lserve": {},
    "streamingtom": {},
    "stc": {"frames": "cuda"},
    "timechat-online-pixel": {},
    "stc-pruner-dual-anchor": {},
}


@pytest.fixture(scope="module")
def found():
    return dict(zip(PRESETS, paper_gpu.run(list(PRESETS.items()))))


@pytest.mark.parametrize("preset", PRESETS)
def test_all_that_is_launched_can_be(found, preset):
    made = found[preset]
    assert "error" not in made, made["error"]
    assert made["answer"] == "AAA" and not made["faults"]
    launched = set(made["launches"])
    assert launched >= {"preprocess_frames", "varlen_attention", "rope_append"}
    assert "sink_window_attention" in launched


@pytest.mark.parametrize("preset", PRESETS)
def test_the_host_waits_for_no_chunk(found, preset):
    made = found[preset]
    assert "error" not in made and made["waits"] == []
