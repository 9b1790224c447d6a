"""Qwen2.5-VL over our ops: checkpoints, positions, prompts, sampling. Imports transformers late."""

from __future__ import annotations

from vicostream_kernels.models.errors import CheckpointError
from vicostream_kernels.models.qwen2_5_vl import Attend, Qwen2_5_VLRunner, load_model
from vicostream_kernels.models.reuse import EncoderState
from vicostream_kernels.models.sampling import Sampler

__all__ = ["Attend", "CheckpointError", "EncoderState", "Qwen2_5_VLRunner", "Sampler", "load_model"]
