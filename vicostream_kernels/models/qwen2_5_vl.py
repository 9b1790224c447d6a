"""Qwen2.5-VL: the weights of an unmodified Hugging Face checkpoint, driven through our ops."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from vicostream_kernels import backends, checks
from vicostream_kernels.methods.rules import ReuseRule
from vicostream_kernels.models import positions as ids
from vicostream_kernels.models.checkpoint import Checkpoint, load_checkpoint
from vicostream_kernels.models.errors import UnsupportedCheckpoint
from vicostream_kernels.models.prompt import Prompt
from vicostream_kernels.models.reuse import EncoderLayout, EncoderState, Vit, reuse_forward
from vicostream_kernels.models.sampling import Sampler
from vicostream_kernels.models.text import Attend, Heads, Outputs, text_forward
from vicostream_kernels.models.vision import (
    VisionGrid,
    VisionShape,
    Watch,
    vision_forward,
    vision_grid,
)
from vicostream_kernels.models.weights import read_text, read_vision

#: Grid shapes and segment shapes whose indices are kept. A stream has one or two.
_SHAPES_KEPT = 16


def load_model(
    name_or_path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    seed: int = 0,
) -> Qwen2_5_VLRunner:
    """Loads Qwen2.5-VL by name.

    Args:
        name_or_path: "tiny" or "tiny-full" (in the package, trained), "tiny-random", "3b-random",
            "7b-random" (made from ``seed``), a folder with an unmodified checkpoint, or a hub name.
            Safetensors only.
        device: where the weights go.
        dtype: of weights and activations; None means float32 on the CPU and the checkpoint's own
            elsewhere (random models: tiny-random float32, the others bfloat16).
        backend: of our ops: "auto", "cuda", "triton", "cpu" or "reference".
        seed: of the random weights of the named models.

    Raises ``CheckpointError`` (a ``ValueError``) with one line that says what would serve.
    """
    return Qwen2_5_VLRunner(
        load_checkpoint(name_or_path, device=device, dtype=dtype, seed=seed), backend=backend
    )


class Qwen2_5_VLRunner:
    """Runs Qwen2.5-VL part by part: embed, encode, forward, logits.

    Holds no state of any stream: what a call reads and writes is in its arguments, so that several
    streams, and several threads, can share a runner.

    Attributes:
        model: transformers' module, whole and usable (fused projections are views of ours).
        tokenizer, prompt, generation_config, name: of the checkpoint.
        layers, heads, kv_heads, head_dim, hidden_size, vocab_size: of the LLM.
        mrope_section, inv_freq: sizes of the (t, h, w) shares; [head_dim / 2] float32.
        patch_size, merge_size, temporal_patch_size, tokens_per_second: of the vision side.
        image_mean, image_std, min_pixels, max_pixels: of the checkpoint's processor.
        vision_start_id, vision_end_id, image_id, video_id, eos_ids: token ids.
        device, dtype, backend.
    """

    def __init__(self, checkpoint: Checkpoint, *, backend: str = "auto") -> None:
        checks.check_choice("Qwen2_5_VLRunner", "backend", backend, ("auto", *backends.BACKENDS))
        model, config = checkpoint.model, checkpoint.model.config
        text, vision = config.text_config, config.vision_config
        self.model, self.name, self.backend = model, checkpoint.name, backend
        self.tokenizer, self.generation_config = checkpoint.tokenizer, checkpoint.generation_config

        self.layers: int = text.num_hidden_layers
        self.heads: int = text.num_attention_heads
        self.kv_heads: int = text.num_key_value_heads
        self.hidden_size: int = text.hidden_size
        self.head_dim: int = getattr(text, "head_dim", None) or self.hidden_size // self.heads
        self.vocab_size: int = text.vocab_size
        self.patch_size: int = vision.patch_size
        self.merge_size: int = vision.spatial_merge_size
        self.temporal_patch_size: int = vision.temporal_patch_size
        self.tokens_per_second: float = vision.tokens_per_second
        images = checkpoint.images
        self.image_mean, self.image_std = images.mean, images.std
        self.min_pixels, self.max_pixels = images.min_pixels, images.max_pixels
        self.vision_start_id: int = config.vision_start_token_id
        self.vision_end_id: int = config.vision_end_token_id
        self.image_id: int = config.image_token_id
        self.video_id: int = config.video_token_id
        self.eos_ids = _eos_ids(checkpoint)
        self.prompt = Prompt(
            self.tokenizer,
            vision_start_id=self.vision_start_id,
            video_id=self.video_id,
            vision_end_id=self.vision_end_id,
        )

        self._text, vision_weights = read_text(model), read_vision(model)
        self.dtype, self.device = self._text.embedding.dtype, self._text.embedding.device
        self.mrope_section, inv_freq = _rotary(text, self.head_dim)
        self.inv_freq = inv_freq.to(self.device)
        self._heads = Heads(
            self.heads, self.kv_heads, self.head_dim, self.inv_freq, self.mrope_section
        )
        shape = VisionShape(
            heads=vision.num_heads,
            head_dim=vision.hidden_size // vision.num_heads,
            merge_size=self.merge_size,
            window=vision.window_size // self.merge_size // self.patch_size,
            full_layers=frozenset(vision.fullatt_block_indexes),
            rope_theta=(getattr(vision, "rope_parameters", None) or {}).get("rope_theta", 10000.0),
        )
        self._vit = Vit(vision_weights, shape, shape.inv_freq().to(self.device), backend)
        self._encoder_layout = EncoderLayout(
            layers=len(vision_weights.blocks),
            width=shape.heads * shape.head_dim,
            hidden_size=self.hidden_size,
            merge_size=self.merge_size,
            temporal_patch_size=self.temporal_patch_size,
            dtype=self.dtype,
            device=self.device,
        )
        self._grid = lru_cache(maxsize=_SHAPES_KEPT)(self._make_grid)
        self._segment = lru_cache(maxsize=_SHAPES_KEPT)(self._make_segment)

    @torch.inference_mode()
    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings [N, D] of ``token_ids`` [N] int64 on the model's device."""
        return F.embedding(token_ids, self._text.embedding)

    @torch.inference_mode()
    def encode(
        self,
        patches: torch.Tensor,
        grid_thw: tuple[int, int, int],
        *,
        state: EncoderState | None = None,
        frames: torch.Tensor | None = None,
        watch: Watch | None = None,
    ) -> torch.Tensor:
        """LLM tokens of one chunk, [T, N, D] with N = h * w / merge_size^2 in raster order.

        Without a state each call is encoded on its own.

        Args:
            patches: [T*h*w, 3*2*14*14] as ``preprocess_frames`` returns them.
            grid_thw: three ints, in patches.
            state: of one stream, from ``encoder_state``: patches that look as they did are reused.
                Frames of another size start it anew.
            frames: [F, H, W, 3] uint8, the frames of ``patches`` (two a step): steps that show what
                the reference shows are skipped. Only with a state; frames on a GPU count as None.
            watch: called with what the merger reads, [T'*h*w, C], merge square by merge square in
                raster order, of the T' steps that are not skipped (not at all where all are).

        Raises ``ValueError`` when they disagree, or when the state is another model's.
        """
        t, h, w = (int(size) for size in grid_thw)
        if patches.dim() != 2 or patches.shape[0] != t * h * w:
            raise ValueError(
                f"patches: shape {tuple(patches.shape)} does not fit grid_thw ({t}, {h}, {w}), "
                f"which needs {t * h * w} rows"
            )
        patches = patches.to(self.dtype)
        if state is not None:
            self._check_state(state, frames, t)
            state.settle(h, w)
            if frames is not None and frames.device.type != "cpu":
                frames = None
            return reuse_forward(
                self._vit, state, patches, t, frames, lambda steps: self._grid(steps, h, w), watch
            )
        weights, shape, inv_freq, backend = self._vit
        grid = self._grid(t, h, w)
        tokens = vision_forward(weights, shape, inv_freq, patches, grid, backend, watch=watch)
        return tokens.view(t, -1, self.hidden_size)

    def encoder_state(self, rule: ReuseRule) -> EncoderState:
        """What ``encode`` keeps of one stream to reuse features by ``rule``; empty."""
        return EncoderState(rule, self._encoder_layout)

    @torch.inference_mode()
    def forward(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        attend: Attend,
        outputs: Outputs = "all",
    ) -> torch.Tensor | None:
        """Runs the LLM on a stream's new tokens: K and V go to the cache, hidden states come back.

        Args:
            embeds: [N, D] input embeddings, of text and video tokens alike; rows beyond
                ``attend.cu_seqlens_q[1]`` are padding.
            positions: [3, N] int32 ids.
            attend: where K and V go and what is visible.
            outputs: "all" returns [N, D]; "last" only the last row [1, D], for which the last layer
                does its attention and MLP on that row alone (no padding rows allowed); "none"
                returns None and ends once the last layer's K and V are written (video chunks).

        Returns hidden states after the final norm.
        """
        return text_forward(
            self._text, self._heads, embeds, positions, attend, outputs, self.backend
        )

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [M, V] float32 of hidden states [M, D]."""
        return self._text.head(hidden).float()

    def text_positions(self, n: int, base: int) -> torch.Tensor:
        """Ids of ``n`` text tokens from ``base`` on: [3, n] int32 on the model's device."""
        return ids.text_positions(n, base, device=self.device)

    def video_positions(
        self, t: int, h: int, w: int, base: int, seconds_per_step: float
    ) -> torch.Tensor:
        """Ids of a video segment: [3, t, N] int32 on the model's device; ``t, h, w`` in patches,
        as ``grid_thw`` has them. No host copy after the first call of a shape."""
        return self._segment(t, h, w, seconds_per_step) + base

    def video_span(self, t: int, h: int, w: int, seconds_per_step: float) -> int:
        """How many ids the segment uses: the next token has id ``base + span``."""
        return ids.video_span(
            t,
            h,
            w,
            seconds_per_step,
            tokens_per_second=self.tokens_per_second,
            merge_size=self.merge_size,
        )

    def system_ids(self, system: str | None = None) -> list[int]:
        """Token ids of all that comes before the first chunk."""
        return self.prompt.system_ids(system)

    def question_ids(self, text: str) -> list[int]:
        """Token ids of a question and of what opens the answer."""
        return self.prompt.question_ids(text)

    def sampler(self, *, seed: int = 0, **overrides: Any) -> Sampler:
        """A sampler by the checkpoint's generation configuration, with fields overridden."""
        return Sampler(self.generation_config, seed=seed, device=self.device, **overrides)

    def _check_state(self, state: EncoderState, frames: torch.Tensor | None, t: int) -> None:
        own = self._encoder_layout
        if state.layout != own:
            raise ValueError(f"state: made for another model's {state.layout}, this one has {own}")
        if frames is None:
            return
        held = (frames.shape[0] + self.temporal_patch_size - 1) // self.temporal_patch_size
        if frames.dtype != torch.uint8 or frames.dim() != 4 or held != t:
            raise ValueError(
                f"frames: {frames.dtype} {list(frames.shape)}, expected uint8 [F, H, W, 3] with "
                f"{self.temporal_patch_size} frames for each of the {t} steps"
            )

    def _make_grid(self, t: int, h: int, w: int) -> VisionGrid:
        return vision_grid(t, h, w, self.merge_size, self._vit.shape.window, self.device)

    def _make_segment(self, t: int, h: int, w: int, seconds_per_step: float) -> torch.Tensor:
        return ids.video_positions(
            t,
            h,
            w,
            0,
            seconds_per_step,
            tokens_per_second=self.tokens_per_second,
            merge_size=self.merge_size,
            device=self.device,
        )


def _rotary(text: Any, head_dim: int) -> tuple[tuple[int, int, int], torch.Tensor]:
    """M-RoPE sections and inverse frequencies, bit for bit those that transformers computes."""
    rope = text.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise UnsupportedCheckpoint(f"rope_type {kind!r} is not supported, only 'default' (M-RoPE)")
    if any(layer != "full_attention" for layer in text.layer_types or ()):
        raise UnsupportedCheckpoint("layers with sliding attention are not supported")
    section = tuple(rope.get("mrope_section", (16, 24, 24)))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
    return section, 1.0 / (rope["rope_theta"] ** exponents)


def _eos_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    found = checkpoint.generation_config.eos_token_id
    if found is None:
        found = checkpoint.model.config.text_config.eos_token_id
    if found is None:
        found = checkpoint.tokenizer.eos_token_id
    return (found,) if isinstance(found, int) else tuple(found or ())
