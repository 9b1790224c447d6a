"""Endless generation with transformers in bounded memory: sinks, a window, no growth.

python examples/streaming_generate.py                                  # a random model, no download
python examples/streaming_generate.py --model Qwen/Qwen2.5-0.5B-Instruct --turns 50

Each turn feeds the next text of a conversation that is never cut, and generates. Every turn sees
the first tokens and the last ``--window``; the pages are the same ones from the first to the last.
"""

from __future__ import annotations

import argparse
import inspect
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vicostream_kernels.integrations.transformers import SinkWindowCache, register


def load(name: str | None, device: str) -> tuple[torch.nn.Module, AutoTokenizer | None]:
    """A checkpoint with its tokenizer, or a small random Llama without one."""
    if name is None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            eos_token_id=None,
        )
        config._attn_implementation = "vicostream"
        return LlamaForCausalLM(config).eval().to(device), None
    model = AutoModelForCausalLM.from_pretrained(
        name, attn_implementation="vicostream", dtype="auto", use_safetensors=True
    )
    return model.eval().to(device), AutoTokenizer.from_pretrained(name)


def turn_ids(turn: int, tokenizer: AutoTokenizer | None) -> torch.Tensor:
    """[1, n] ids of what the user says in this turn."""
    text = f"Tell me one thing about the number {turn}."
    if tokenizer is None:
        return torch.tensor([list(text.encode())])
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]


@torch.inference_mode()
def stream(
    model: torch.nn.Module, cache: SinkWindowCache, ids: torch.Tensor, new: int
) -> list[int]:
    """Feeds a turn and decodes greedily. No mask and no history: what is fed is all there is."""
    known = inspect.signature(model.forward).parameters
    at = {"cache" if "cache" in known else "past_key_values": cache}  # cache= since 5.24
    made: list[int] = []
    for _ in range(new):
        logits = model(ids, **at, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)
        made.append(int(ids))
    model(ids, **at, logits_to_keep=1)  # the last token belongs to the past too
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="checkpoint folder or hub name; random weights without")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--sink-tokens", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    options = parser.parse_args()

    register()
    model, tokenizer = load(options.model, options.device)
    cache = SinkWindowCache(options.sink_tokens, options.window)
    for turn in range(options.turns):
        start = time.perf_counter()
        ids = turn_ids(turn, tokenizer).to(options.device)
        made = stream(model, cache, ids, options.new_tokens)
        elapsed = time.perf_counter() - start
        pages = sum(x.k_pages.nbytes + x.v_pages.nbytes for x in cache.layers)
        text = "" if tokenizer is None else tokenizer.decode(made, skip_special_tokens=True)
        print(
            f"turn {turn}: {cache.get_seq_length()} tokens seen, {pages / 2**20:.1f} MiB of pages, "
            f"{1e3 * elapsed / len(made):.1f} ms a token  {text}"
        )


if __name__ == "__main__":
    main()
