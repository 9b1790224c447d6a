"""Tiny random models of each family that the transformers integration serves."""

from __future__ import annotations

import inspect

import torch
import transformers
from torch import nn

#: What models call their cache here: cache= since transformers 5.24, past_key_values= before.
_KNOWN = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
CACHE = "cache" if "cache" in _KNOWN else "past_key_values"
#: All names that work; the older one warns next to the newer, until 5.40.
_RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
CACHE_NAMES = (CACHE, "past_key_values") if (5, 24) <= _RELEASE < (5, 40) else (CACHE,)

VOCAB = 101

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,  # decided logits: greedy tokens do not hang on round-off
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [0],
}
IMAGE, VISION_START, VISION_END = VOCAB - 1, VOCAB - 2, VOCAB - 3

#: family -> (config class, model class, settings beyond the sizes)
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"head_dim": 16}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"head_dim": 24, "sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 24}),
}


def settle(model: nn.Module) -> nn.Module:
    """For inference, with norms and biases that are not all ones and zeros."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.2 * noise
    return model.eval().requires_grad_(False)


def tiny(family: str, impl: str = "vicostream", **settings) -> nn.Module:
    """A text model; ``settings`` go into its config."""
    config, model, more = FAMILIES[family]
    made = getattr(transformers, config)(**{**_SIZES, **more, **settings})
    torch.manual_seed(0)
    made._attn_implementation = impl
    return settle(getattr(transformers, model)(made))


def tiny_vl(impl: str = "vicostream") -> nn.Module:
    """Qwen2.5-VL with its vision tower."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {**_SIZES, "rope_parameters": rope}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=_VISION,
        image_token_id=IMAGE,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation=impl)
    return settle(model)


def models() -> list[str]:
    return [*FAMILIES, "qwen2_5_vl"]


def make(family: str, impl: str = "vicostream") -> nn.Module:
    """A model of any name in `models`."""
    return tiny_vl(impl) if family == "qwen2_5_vl" else tiny(family, impl)


def prompt(rows: int, length: int, *, padding: tuple[int, ...] = (), seed: int = 0):
    """ids and attention mask [rows, length]; row i starts with ``padding[i]`` padded places."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB - 3, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row, pads in enumerate(padding):
        ids[row, :pads], mask[row, :pads] = 0, 0
    return ids, mask


def at(cache) -> dict:
    """The argument by which a model gets its cache."""
    return {CACHE: cache}


def generate(model: nn.Module, ids, mask, *, cache=None, new: int = 12, **kwargs) -> torch.Tensor:
    """The new tokens of greedy decoding, [rows, new]."""
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        do_sample=False,
        **at(cache),
        **kwargs,
    )
    return out[:, ids.shape[1] :]
