"""The case of the whole ViT with reuse: right, and what it cannot show is refused a speed."""

from __future__ import annotations

import pytest
import torch

from vicostream_kernels.bench import registry
from vicostream_kernels.bench.check import check
from vicostream_kernels.models.reuse import EncoderState

CPU = torch.device("cpu")
CASE = registry.load()["reuse/vit-tiny/4x2s-2l/float32"]


@pytest.mark.parametrize("seed", [0, 1])
def test_all_providers_are_right(seed):
    providers = CASE.providers(CPU)
    assert {"plain", "ours:cpu", "ours:max_age=3"} <= {p.name for p in providers}
    verdicts = check(CASE, CPU, providers, seed)
    assert all(verdict.ok for verdict in verdicts.values()), verdicts


def test_a_reference_that_is_not_kept_is_found(monkeypatch):
    monkeypatch.setattr(EncoderState, "keep", lambda state, layer, *branches: None)
    monkeypatch.setattr(EncoderState, "refer_to", lambda *args: None)
    verdicts = check(CASE, CPU, CASE.providers(CPU), 0)
    assert verdicts["plain"].ok and not verdicts["ours:cpu"].ok


def test_the_real_sizes_are_the_3b_models():
    from vicostream_kernels.models import named

    vision = named.config("3b-random")["vision_config"]
    names = [name for name in registry.load() if name.startswith("reuse/vit-3b/")]
    assert len(names) == 6
    for name in names:
        axes = registry.load()[name].axes
        assert axes["width"] == vision["hidden_size"] and axes["heads"] == vision["num_heads"]
        assert axes["inner"] == vision["intermediate_size"]
        assert axes["hidden"] == vision["out_hidden_size"]
        assert (axes["height"] * 14, axes["across"] * 14) == (252, 420)
