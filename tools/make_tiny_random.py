"""Write the files of the embedded `tiny-random` model; its weights come from a seed at load.

Everything is computed here in plain Python, byte-pair merges included, so the output does not
depend on the version of any library: `python tools/make_tiny_random.py` in a clean tree changes
nothing, and a test holds it to that. `--out FOLDER` writes elsewhere.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent / "vicostream_kernels" / "models" / "tiny_random"

# The order fixes the ids; the names are Qwen2.5-VL's.
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
VOCABULARY = 640

# Qwen's pre-tokenizer; the corpus is ASCII, so \p{L} and \p{N} have plain equivalents here.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ASCII_SPLIT = (
    SPLIT.replace(r"[^\r\n\p{L}\p{N}]", r"[^\r\na-zA-Z0-9]")
    .replace(r"[^\s\p{L}\p{N}]", r"[^\sa-zA-Z0-9]")
    .replace(r"\p{L}", "[a-zA-Z]")
    .replace(r"\p{N}", "[0-9]")
)

CORPUS = """
You are a helpful assistant. system user assistant
What is happening in the video now? What happened at the start? What happened before that?
What color is the car? What color was the ball at the end? Where is the person standing?
How many people are in the room? How many objects are visible now? How many cars have passed?
Who is speaking? Which object came first? Which one moved to the left? When did the scene change?
Describe the scene in one sentence. Describe what the person does next. Answer with one word.
Is there a dog in the video? Was there a red square before the blue circle? Count the frames.
The camera moves slowly from left to right. The light changes and the background stays the same.
A person walks across the street, opens the door and goes into the house.
A woman in a white shirt puts the cup on the table and looks at the screen.
A man with a black hat is riding a bicycle along the road near the river.
Two children are playing with a yellow ball in the garden behind the building.
The red square moves up, the green triangle moves down, and the blue circle stays in the middle.
There are three chairs around the table, a lamp in the corner, and a window on the wall.
The text on the sign says open. The number on the screen is zero one two three four five six.
The cat jumps from the sofa onto the floor and runs under the bed.
At the beginning the room is empty. After a few seconds someone turns on the light.
Then the car stops, the driver gets out, and the other people start to talk.
It is not clear from the video. I can see a small object, but it is too far from the camera.
The video shows a kitchen where a person is cooking: first they cut the vegetables, then they add
water, and finally they put everything together. Nothing moves in the last part of the video.
Yes, it does. No, it does not. There is nothing at the top left. The answer is on the bottom right.
The orange box was last seen near the purple star; the gray cross never came back.
"""


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte: printable bytes stand for themselves, the others
    follow from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table.update({byte: chr(256 + rank) for rank, byte in enumerate(others)})
    return table


def merges(count: int) -> list[tuple[str, str]]:
    """The first ``count`` byte-pair merges of the corpus; ties go to the lexically first pair."""
    alphabet = byte_alphabet()
    words = Counter(
        tuple(alphabet[byte] for byte in piece.group().encode())
        for piece in re.finditer(ASCII_SPLIT, CORPUS)
    )
    found: list[tuple[str, str]] = []
    while len(found) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += times
        if not pairs:
            raise RuntimeError(f"the corpus yields only {len(found)} merges, {count} wanted")
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        found.append(best)
        joined: Counter[tuple[str, ...]] = Counter()
        for word, times in words.items():
            joined[join(word, best)] += times
        words = joined
    return found


def join(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    at = 0
    while at < len(word):
        if word[at : at + 2] == pair:
            out.append(pair[0] + pair[1])
            at += 2
        else:
            out.append(word[at])
            at += 1
    return tuple(out)


def special_ids() -> dict[str, int]:
    first = VOCABULARY - len(SPECIAL)
    return {token: first + rank for rank, token in enumerate(SPECIAL)}


def tokenizer() -> dict:
    pairs = merges(VOCABULARY - 256 - len(SPECIAL))
    alphabet = byte_alphabet()
    tokens = [alphabet[byte] for byte in range(256)] + [a + b for a, b in pairs]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": token, **flags, "special": True}
            for token, id in special_ids().items()
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": SPLIT},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {**byte_level, "use_regex": False},
            ],
        },
        "post_processor": {**byte_level, "use_regex": False},
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: id for id, token in enumerate(tokens)},
            "merges": [list(pair) for pair in pairs],
        },
    }


def unprintable_ids() -> list[int]:
    """Tokens that a terminal should not be sent: control bytes and parts of multi-byte characters.
    A model of random weights would say them as often as any other."""
    return [byte for byte in range(256) if not (0x20 <= byte < 0x7F or byte == 0x0A)]


CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\\n' }}
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
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


def files() -> dict[str, str]:
    ids = special_ids()
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
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
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 4, 4]},
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": VOCABULARY,
        "vision_config": {
            "depth": 3,
            "hidden_act": "silu",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "in_channels": 3,
            "out_hidden_size": 128,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [2],
            "tokens_per_second": 2,
        },
    }
    generation = {
        "bos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "do_sample": False,
        "repetition_penalty": 1.3,
        "suppress_tokens": unprintable_ids(),
    }
    preprocessor = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "additional_special_tokens": [t for t in SPECIAL if t != "<|endoftext|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
    }
    return {
        "config.json": dump(config),
        "generation_config.json": dump(generation),
        "preprocessor_config.json": dump(preprocessor),
        "tokenizer.json": dump(tokenizer()),
        "tokenizer_config.json": dump(tokenizer_config),
        "chat_template.jinja": CHAT_TEMPLATE,
    }


def dump(value: dict) -> str:
    return json.dumps(value, indent=1, ensure_ascii=True) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HOME)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (out / name).write_bytes(text.encode("utf-8"))


if __name__ == "__main__":
    main()
