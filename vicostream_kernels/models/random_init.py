"""Random weights that are the same on every machine, device and torch version.

Each value is a function of the seed, the parameter's name and the element's index, computed in
integers and made into a float by exact steps; no random generator is involved, whose stream could
differ. The weights are made where they stay and in their own dtype: the scratch space is a few
slices, never a second copy of the model.
"""

from __future__ import annotations

import hashlib
import math

import torch

#: Elements made at a time. On the CPU temporaries stay in its caches: those of 32 MiB would each
#: be new memory from the system. A GPU wants few launches.
_SLICES = {"cpu": 1 << 17, "cuda": 1 << 22}
_RESIDUAL = ("o_proj.weight", "down_proj.weight", "attn.proj.weight")


def fill_(tensor: torch.Tensor, name: str, seed: int, std: float) -> None:
    """Fills ``tensor`` in place with uniform values of standard deviation ``std``."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little", signed=True)
    flat = tensor.view(-1)
    step = _SLICES.get(tensor.device.type, 1 << 22)
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        index = torch.arange(start, start + part.numel(), dtype=torch.int64, device=tensor.device)
        # 24 bits b become the odd numerator 2b + 1 - 2^24, which float32 holds exactly, so the
        # product below is the only rounding.
        odd = (_mix(index.mul_(_GOLDEN).add_(key)) & 0xFFFFFF).mul_(2).add_(1 - (1 << 24))
        part.copy_(odd.to(torch.float32).mul_(std * math.sqrt(3.0) / (1 << 24)))


def fill_model_(model: torch.nn.Module, seed: int) -> None:
    """Fills all parameters of a Qwen2.5-VL module.

    Matrices have standard deviation 1 / sqrt(fan in), those that write into the residual stream
    1 / sqrt(2 x layers) of that; biases are small, norms are 1.

    What all visual tokens have in common would make any two of them alike, and pruning by
    similarity would see no change in any video. Hence no biases in the ViT, and a patch embedding
    of random edge filters: neighbouring columns have opposite weights, so brightness cancels.
    """
    depth = {
        "text": model.config.text_config.num_hidden_layers,
        "vision": model.config.vision_config.depth,
    }
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_q" in name:
            parameter.data.fill_(1.0)
        elif name.endswith("bias"):
            fill_(parameter.data, name, seed, 0.0 if "visual" in name else 0.1)
        else:
            std = 1.0 / math.sqrt(parameter[0].numel())
            if name.endswith(_RESIDUAL):
                std /= math.sqrt(2 * depth["vision" if "visual" in name else "text"])
            fill_(parameter.data, name, seed, std)
            if name.endswith("patch_embed.proj.weight"):
                parameter.data[..., 1::2] = -parameter.data[..., 0::2]


_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser (Steele, Lea, Flood: Fast splittable pseudorandom number generators,
    OOPSLA 2014) in int64, whose products wrap; shifts are made logical by masks."""
    x = (x ^ _shift(x, 30)).mul_(_MULTIPLIERS[0])
    x = (x ^ _shift(x, 27)).mul_(_MULTIPLIERS[1])
    return _shift(x ^ _shift(x, 31), 40)


def _shift(x: torch.Tensor, by: int) -> torch.Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)
