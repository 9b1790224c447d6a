"""Models by name that need no download.

``tiny`` and ``tiny-full`` are checkpoints in the package: trained from nothing by
``tools/train_tiny.py`` to answer questions about the clips of ``evaluation.streamqa``, the one with
the masks of a bounded stream, the other with full history.

The others have weights from a seed. ``tiny-random`` is for tests (its small files lie in
``tiny_random/``); ``3b-random`` and ``7b-random`` have the true Qwen2.5-VL shapes and exist to
measure speed with no checkpoint at hand. All three use tiny-random's tokenizer; embedding rows keep
their true number.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: The embedded tokenizer, chat template, image settings and tiny-random's configuration.
HOME = Path(__file__).parent / "tiny_random"

_VISION = {
    "depth": 32,
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}

# Differences from tiny-random's configuration (Qwen/Qwen2.5-VL-*-Instruct config.json).
_SHAPES: dict[str, dict[str, Any]] = {
    "tiny-random": {},
    "3b-random": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_window_layers": 70,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 151936,
        "vision_config": {**_VISION, "out_hidden_size": 2048},
    },
    "7b-random": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_window_layers": 28,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 152064,
        "vision_config": {**_VISION, "out_hidden_size": 3584},
    },
}

#: Folders of the checkpoints in the package.
FOLDERS = {name: Path(__file__).parent / name.replace("-", "_") for name in ("tiny", "tiny-full")}
NAMES = (*FOLDERS, *_SHAPES)


def config(name: str) -> dict[str, Any]:
    """The configuration of a named model, as its ``config.json`` would read."""
    tiny = json.loads((HOME / "config.json").read_text(encoding="utf-8"))
    return {**tiny, **_SHAPES[name]}


def build(config_dict: dict[str, Any], *, seed: int, device: Any, dtype: Any) -> Any:
    """A ``Qwen2_5_VLForConditionalGeneration`` of this configuration with seeded weights, made in
    ``dtype`` on ``device`` with no copy elsewhere."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.initialization import no_init_weights

    from vicostream_kernels.models.random_init import fill_model_

    # Without it transformers draws its own weights first: a minute for 7B, on the meta device too.
    with no_init_weights(), torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config_dict)).to(dtype)
    model.to_empty(device=device)
    model.tie_weights()
    fill_model_(model, seed)
    _restore_buffers(model)
    return model.eval()


def _restore_buffers(model: Any) -> None:
    """Rotary frequencies are computed when a module is made, so on the meta device they are lost;
    ours come from the configuration, but transformers' own forward should work as well."""
    for module in model.modules():
        if "inv_freq" in module._buffers:
            device = module.inv_freq.device
            fresh = type(module)(module.config)
            for name, buffer in fresh.named_buffers():
                setattr(module, name, buffer.to(device))
