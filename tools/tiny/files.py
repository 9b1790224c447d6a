"""The files beside the weights: tokenizer, chat template, configurations, model card.

A vocabulary of whole words: a question is 5 to 7 tokens and an answer is one. The template is as
short as Qwen2.5-VL's order of things allows: ``<|im_start|>user``, video, question,
``<|im_end|>assistant``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vicostream_kernels.evaluation._draw import FRAME
from vicostream_kernels.evaluation._questions import FORMS, NEVER, NOTHING, NUMBERS
from vicostream_kernels.evaluation._world import COLOURS, MOVES, PLACES, SHAPES

# The order fixes the ids; the names are Qwen2.5-VL's.
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
UNKNOWN = "<unk>"
VOCABULARY = 96


def words() -> list[str]:
    """Every token in the order of its id, specials first, spares last."""
    texts = " ".join(text.format("", "") for _, text in FORMS.values())
    plain = texts.lower().replace("?", " ? ").replace(",", " ").split()
    moves = [name for name, _, _ in MOVES]
    known = [
        *SPECIAL, UNKNOWN, "user", "assistant", "system", *plain,
        *SHAPES, *COLOURS, *PLACES, *NUMBERS, *moves, NOTHING, NEVER,
    ]  # fmt: skip
    known = list(dict.fromkeys(known))
    if len(known) > VOCABULARY:
        raise RuntimeError(f"{len(known)} words, the vocabulary has {VOCABULARY}")
    return known + [f"<spare{i}>" for i in range(VOCABULARY - len(known))]


def ids() -> dict[str, int]:
    return {word: index for index, word in enumerate(words())}


def tokenizer() -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    table = ids()
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": table[token], "content": token, **flags, "special": True} for token in SPECIAL
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Lowercase"},
                {"type": "Replace", "pattern": {"Regex": "[,;:.!\"']"}, "content": " "},
            ],
        },
        # Words, and runs of anything else.
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": table, "unk_token": UNKNOWN},
    }


CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first -%}
{{ '<|im_start|>' }}
{%- endif -%}
{{ message.role + ' ' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'video' -%}
{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- elif part.type == 'text' -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ 'assistant' }}
{%- endif -%}
"""


def config() -> dict[str, Any]:
    table = ids()
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": table["<|endoftext|>"],
        "eos_token_id": table["<|im_end|>"],
        "vision_start_token_id": table["<|vision_start|>"],
        "vision_end_token_id": table["<|vision_end|>"],
        "vision_token_id": table["<|vision_pad|>"],
        "image_token_id": table["<|image_pad|>"],
        "video_token_id": table["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128000,
        "max_window_layers": 4,
        "use_sliding_window": False,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [12, 2, 2]},
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": VOCABULARY,
        "vision_config": {
            "depth": 2,
            "hidden_act": "silu",
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_heads": 2,
            "in_channels": 3,
            "out_hidden_size": 128,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
    }


MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def side_files() -> dict[str, str]:
    """Name and content of everything but weights, ``config.json`` and the model card."""
    table = ids()
    generation = {
        "bos_token_id": table["<|endoftext|>"],
        "pad_token_id": table["<|endoftext|>"],
        "eos_token_id": [table["<|im_end|>"], table["<|endoftext|>"]],
        "do_sample": False,
    }
    # Trained at one size: whatever comes is brought to it.
    preprocessor = {
        "min_pixels": FRAME * FRAME,
        "max_pixels": FRAME * FRAME,
        "size": {"shortest_edge": FRAME * FRAME, "longest_edge": FRAME * FRAME},
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": UNKNOWN,
        "additional_special_tokens": [t for t in SPECIAL if t != "<|endoftext|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
    }
    return {
        "generation_config.json": dump(generation),
        "preprocessor_config.json": dump(preprocessor),
        "tokenizer.json": dump(tokenizer()),
        "tokenizer_config.json": dump(tokenizer_config),
        "chat_template.jinja": CHAT_TEMPLATE,
    }


def dump(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=True) + "\n"


def export(model: Any, folder: Path, card: str) -> None:
    """A folder that transformers loads: bfloat16 safetensors and the files above."""
    import copy

    import torch

    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    for name, text in side_files().items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "config.json").write_text(dump(config()), encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
