"""Where the weights lie inside transformers' modules: the one place that knows their names.

The module stays whole and usable: projections that read the same input are fused into one matrix
(one GEMM instead of three), and the module's own parameters become views of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from vicostream_kernels.models.errors import UnsupportedCheckpoint


class Linear(NamedTuple):
    """A matrix [out, in] and its bias [out] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def rows(self, start: int, stop: int | None = None) -> Linear:
        """The part that computes the outputs from ``start`` on, up to ``stop``."""
        bias = None if self.bias is None else self.bias[start:stop]
        return Linear(self.weight[start:stop], bias)


class Norm(NamedTuple):
    """RMS norm: weight [D] and epsilon."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True)
class Mlp:
    """Gated MLP: ``down(act(gate(x)) * up(x))``, gate and up fused in this order."""

    gate_up: Linear
    down: Linear
    act: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


@dataclass(frozen=True)
class Block:
    """One transformer block, of the LLM or of the ViT (pre-norm attention, pre-norm MLP)."""

    attention_norm: Norm
    qkv: Linear
    out: Linear
    mlp_norm: Norm
    mlp: Mlp


@dataclass(frozen=True)
class TextWeights:
    """Embedding [V, D], blocks, final norm, head [V, D] (the embedding itself when tied)."""

    embedding: torch.Tensor
    blocks: tuple[Block, ...]
    norm: Norm
    head: Linear


@dataclass(frozen=True)
class VisionWeights:
    """Patch embedding as a matrix [C, 3*2*14*14], blocks, and the merger: norm, then an MLP over
    each square of merged patches."""

    patch: Linear
    blocks: tuple[Block, ...]
    merger_norm: Norm
    merger: Callable[[torch.Tensor], torch.Tensor]


def read_text(model: torch.nn.Module) -> TextWeights:
    """The LLM of a ``Qwen2_5_VLForConditionalGeneration``."""
    language = _find(model, "model.language_model", "language_model.model", "language_model")
    return TextWeights(
        embedding=_find(language, "embed_tokens").weight.data,
        blocks=tuple(
            Block(
                attention_norm=_norm(layer.input_layernorm),
                qkv=_fuse([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
                out=_linear(layer.self_attn.o_proj),
                mlp_norm=_norm(layer.post_attention_layernorm),
                mlp=_mlp(layer.mlp),
            )
            for layer in _find(language, "layers")
        ),
        norm=_norm(_find(language, "norm")),
        head=_linear(_find(model, "lm_head", "language_model.lm_head")),
    )


def read_vision(model: torch.nn.Module) -> VisionWeights:
    """The ViT and the merger of a ``Qwen2_5_VLForConditionalGeneration``."""
    visual = _find(model, "model.visual", "visual")
    merger = _find(visual, "merger")
    convolution = _find(visual, "patch_embed.proj")
    bias = convolution.bias
    return VisionWeights(
        # Kernel and stride of the convolution are equal, so it is a matrix over whole patches.
        patch=Linear(convolution.weight.data.flatten(1), None if bias is None else bias.data),
        blocks=tuple(
            Block(
                attention_norm=_norm(block.norm1),
                qkv=_linear(block.attn.qkv),
                out=_linear(block.attn.proj),
                mlp_norm=_norm(block.norm2),
                mlp=_mlp(block.mlp),
            )
            for block in _find(visual, "blocks")
        ),
        merger_norm=_norm(_find(merger, "ln_q")),
        merger=_find(merger, "mlp"),
    )


def _find(root: torch.nn.Module, *paths: str) -> Any:
    for path in paths:
        found: Any = root
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is not None:
            return found
    raise UnsupportedCheckpoint(
        f"{type(root).__name__} has no {' or '.join(paths)}: this layout of transformers' "
        "Qwen2.5-VL modules is not known here (tested with transformers 5.17 and 5.23)"
    )


def _linear(module: torch.nn.Module) -> Linear:
    if not isinstance(module, torch.nn.Linear):
        raise UnsupportedCheckpoint(
            f"a projection is a {type(module).__name__}: only plain linear layers are driven here "
            "(merge adapters into the weights first; quantised weights are not supported)"
        )
    return Linear(module.weight.data, None if module.bias is None else module.bias.data)


def _norm(module: torch.nn.Module) -> Norm:
    return Norm(module.weight.data, module.variance_epsilon)


def _mlp(module: torch.nn.Module) -> Mlp:
    return Mlp(_fuse([module.gate_proj, module.up_proj]), _linear(module.down_proj), module.act_fn)


def _fuse(modules: Sequence[torch.nn.Module]) -> Linear:
    parts = [_linear(module) for module in modules]
    has_bias = {part.bias is not None for part in parts}
    if len(has_bias) != 1:
        raise UnsupportedCheckpoint("some of the projections to fuse have a bias and some do not")
    weight = torch.cat([part.weight for part in parts])
    bias = torch.cat([part.bias for part in parts]) if has_bias == {True} else None
    start = 0
    for module, part in zip(modules, parts):
        stop = start + part.weight.shape[0]
        module.weight.data = weight[start:stop]
        if bias is not None:
            module.bias.data = bias[start:stop]
        start = stop
    return Linear(weight, bias)
