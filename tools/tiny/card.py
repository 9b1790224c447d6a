"""The model card."""

from __future__ import annotations

_HOW = {
    "tiny_full": "trained with full causal history",
    "tiny": "trained with full causal history, then tuned with the masks of a bounded stream "
    "(pruning, windows and retrieval at random)",
}


def text(name: str, seed: int, steps: int, wall_s: float, cpu_s: float) -> str:
    return f"""\
---
license: apache-2.0
library_name: transformers
pipeline_tag: video-text-to-text
---

# {name.replace("_", "-")}

A stock `Qwen2_5_VLForConditionalGeneration` of about one million parameters that answers one-word
questions about the synthetic clips of `vicostream_kernels.evaluation.streamqa`:
{_HOW[name]}. It exists so that a streaming pipeline can be seen to answer
rightly or wrongly with no GPU and no download. It knows nothing of real video.

- Frames of 84 x 84 px (the processor's limits bring any frame to about that area), two a step,
  nine tokens a step; a vocabulary of 96 words.
- Position ids: text after a video continues at the largest id + 1, as Qwen2.5-VL was trained.
  `get_rope_index` of transformers 5 counts differently; pass explicit ids.
- Made by `tools/train_tiny.py --seed {seed}`: {steps} steps in all, {wall_s / 60:.0f} minutes
  ({cpu_s / 60:.0f} minutes of CPU time), all data generated on the fly. No human data.
"""
