"""The named models: embedded files, weights from integers, true shapes."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import pytest
import torch

from vicostream_kernels.models import load_model, named, random_init
from vicostream_kernels.models.random_init import fill_

DIGEST = "9d366b7f06cb85dbf97f8486407b0e5d22b5fc8fd98662948e904698a3ec6b60"
TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_tiny_random.py"


def test_embedded_files_are_what_the_tool_writes() -> None:
    if not TOOL.exists():
        pytest.skip("the tool is not part of an installed package")
    spec = importlib.util.spec_from_file_location("make_tiny_random", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    written = {name: text.encode() for name, text in tool.files().items()}
    embedded = {file.name: file.read_bytes() for file in named.HOME.iterdir()}
    assert embedded == written


def test_tiny_random_is_the_same_bits_everywhere() -> None:
    """Checked against a value noted once: made of integers, it must not depend on the machine."""
    digest = hashlib.sha256()
    model = load_model("tiny-random").model
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    assert digest.hexdigest() == DIGEST


def test_seed_changes_every_matrix() -> None:
    one, two = (load_model("tiny-random", seed=seed).model for seed in (1, 2))
    for (name, a), b in zip(one.named_parameters(), two.parameters()):
        fixed = "norm" in name or "ln_q" in name or ("visual" in name and name.endswith("bias"))
        assert torch.equal(a, b) == fixed, name


def test_tiny_random_size() -> None:
    parameters = sum(p.numel() for p in load_model("tiny-random").model.parameters())
    assert 1_000_000 < parameters < 2_000_000
    assert sum(file.stat().st_size for file in named.HOME.iterdir()) < 64 * 1024


def test_brightness_alone_changes_no_token() -> None:
    """Else any two visual tokens are alike, and pruning drops all of every video."""
    runner = load_model("tiny-random")
    noise = torch.randn(8, 1176, generator=torch.Generator().manual_seed(0))
    dark, bright = runner.encode(noise, (1, 2, 4)), runner.encode(noise + 2.0, (1, 2, 4))
    other = runner.encode(noise.flip(0), (1, 2, 4))
    torch.testing.assert_close(dark, bright, rtol=1e-3, atol=1e-3)
    assert float(torch.nn.functional.cosine_similarity(dark, other, dim=-1).max()) < 0.5


def scalar_oracle(index: int, name: str, seed: int, std: float) -> float:
    """fill_ for one element, in Python's integers."""
    mask = (1 << 64) - 1
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    x = (index * 0x9E3779B97F4A7C15 + int.from_bytes(key, "little")) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    x ^= x >> 31
    return (2 * (x >> 40) + 1 - (1 << 24)) / (1 << 24) * std * 3**0.5


def test_fill_is_its_definition_across_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(random_init._SLICES, "cpu", 7)
    tensor = torch.empty(5, 6)
    fill_(tensor, "a.weight", 3, 0.5)
    expected = [scalar_oracle(i, "a.weight", 3, 0.5) for i in range(30)]
    torch.testing.assert_close(tensor.flatten(), torch.tensor(expected), rtol=2e-7, atol=0)


def test_fill_moments_and_dtypes() -> None:
    big = torch.empty(300, 1000)
    fill_(big, "b", 0, 0.02)
    assert abs(float(big.mean())) < 4 * 0.02 / 300_000**0.5
    assert abs(float(big.std()) / 0.02 - 1) < 0.01
    assert float(big[:, 1:].flatten() @ big[:, :-1].flatten()) / float(big.square().sum()) < 0.01
    half = torch.empty(300, 1000, dtype=torch.bfloat16)
    fill_(half, "b", 0, 0.02)
    assert torch.equal(half, big.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "parameters", "facts"),
    [
        ("3b-random", 3_754_622_976, (36, 16, 2, 2048)),
        ("7b-random", 8_292_166_656, (28, 28, 4, 3584)),
    ],
)
def test_true_shapes(name: str, parameters: int, facts: tuple[int, ...]) -> None:
    """Parameter counts of Qwen/Qwen2.5-VL-3B-Instruct and 7B-Instruct (their safetensors index)."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.initialization import no_init_weights

    config = Qwen2_5_VLConfig(**named.config(name))
    with no_init_weights(), torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == parameters
    text = config.text_config
    assert facts == (
        text.num_hidden_layers,
        text.num_attention_heads,
        text.num_key_value_heads,
        text.hidden_size,
    )


def test_big_shapes_run_with_fewer_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """3b-random's widths, heads and vocabulary, cut to one layer each, in bfloat16, end to end."""
    cut = named.config("3b-random")
    cut = {
        **cut,
        "num_hidden_layers": 1,
        "vocab_size": 2048,
        "intermediate_size": 512,
        "vision_config": {**cut["vision_config"], "depth": 1, "fullatt_block_indexes": [0]},
    }
    monkeypatch.setattr(named, "config", lambda name: cut)
    runner = load_model("3b-random")
    assert runner.dtype == torch.bfloat16 and runner.head_dim == 128
    assert (
        runner.model.lm_head.weight.data_ptr() == runner.embed.__self__._text.embedding.data_ptr()
    )
    patches = torch.randn(2 * 6 * 4, 1176, generator=torch.Generator().manual_seed(0))
    tokens = runner.encode(patches, (2, 6, 4))
    assert tokens.shape == (2, 6, 2048) and tokens.dtype == torch.bfloat16
    assert bool(torch.isfinite(tokens).all()) and float(tokens.float().std()) > 0.01
