"""What the runner promises beyond exact logits: far ids, other dtypes, raw keys, a light import."""

from __future__ import annotations

import pytest
import torch
from model_kit import Driver, Text, relative_error, visual

from vicostream_kernels.cache import PagedKVCache
from vicostream_kernels.models import load_model

SEGMENTS = [Text(range(100, 110)), visual(3, 6, 8, seed=1), Text([388, 453, 63, 10])]


@pytest.fixture(scope="module")
def runner():
    return load_model("tiny-random")


def logits(driver: Driver) -> torch.Tensor:
    return torch.cat([driver.feed(segment) for segment in SEGMENTS])


def test_ids_after_days_of_stream_turn_the_same_angles(runner) -> None:
    """Attention depends on differences of ids only; angles taken in float32 would be off by
    radians out here."""
    near, far = Driver(runner), Driver(runner)
    far.base = 200_000_000
    assert relative_error(logits(far), logits(near)) <= 1e-5


def test_bfloat16_follows_float32(runner) -> None:
    half = load_model("tiny-random", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.inv_freq.dtype == torch.float32
    expected, got = logits(Driver(runner)), logits(Driver(half))
    cosine = torch.nn.functional.cosine_similarity(got, expected, dim=-1)
    assert float(cosine.min()) > 0.995
    assert got.dtype == torch.float32


def test_raw_keys_are_kept_before_rotation(runner) -> None:
    driver = Driver(runner)
    driver.cache = PagedKVCache(
        layers=runner.layers, pages=8, page_size=16, kv_heads=runner.kv_heads,
        head_dim=runner.head_dim, raw_keys=True,
    )  # fmt: skip
    driver.stream = driver.cache.open()
    driver.base = 1000
    driver.feed(SEGMENTS[0])
    page = driver.stream.blocks[0].body.pages[0]
    layer = runner.model.model.language_model.layers[0]
    embeds = runner.embed(torch.tensor(list(SEGMENTS[0].ids)))
    with torch.no_grad():
        keys = layer.self_attn.k_proj(layer.input_layernorm(embeds)).view(10, 2, 32)
    stored = driver.cache.raw_k_pages[0, page, :10]
    assert relative_error(stored, keys) <= 1e-5
    assert relative_error(driver.cache.k_pages[0, page, :10], keys) > 0.1


def test_streams_of_one_runner_do_not_touch_each_other(runner) -> None:
    alone = logits(Driver(runner))
    one, two = Driver(runner), Driver(runner)
    two.cache, two.stream = one.cache, one.cache.open()
    got = []
    for segment in SEGMENTS:
        got.append(one.feed(segment))
        two.feed(visual(1, 4, 4, seed=9))
    assert torch.equal(torch.cat(got), alone)


def test_weights_are_not_copied(runner) -> None:
    """Fused projections and the module's own share memory: a 7B model fits once, not twice."""
    module = runner.model.model.language_model.layers[1]
    block = runner._text.blocks[1]
    q, k = module.self_attn.q_proj.weight, module.self_attn.k_proj.weight
    assert q.data_ptr() == block.qkv.weight.data_ptr()
    assert k.data_ptr() == block.qkv.weight[q.shape[0] :].data_ptr()
    assert module.mlp.gate_proj.weight.data_ptr() == block.mlp.gate_up.weight.data_ptr()


def test_import_is_light(torch_process, tmp_path) -> None:
    code = (
        "import sys, vicostream_kernels.models; "
        "print([m for m in ('transformers', 'triton', 'av') if m in sys.modules])"
    )
    done = torch_process.run(code, tmp_path)
    assert done.stdout.strip() == "[]", done.stderr
