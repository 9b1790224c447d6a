"""What the tests of prune_tokens share: scenes, a run that checks the compaction, a rule."""

from __future__ import annotations

import math

import torch

from kit import tensors
from kit.compare import assert_same_bits
from vicostream_kernels import PrunedTokens, PruneRule, prune_tokens

CHUNK_INTRA = PruneRule(
    reference="previous", metric="cosine", threshold=0.25, reduce="any", always_keep="first"
)


def moving(t, n, d, *, dtype=torch.float32, seed=0, device="cpu", noise=0.6):
    """Tokens of a static scene in which a third of the places change at each step."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, n, d, generator=generator).repeat(t, 1, 1)
    for step in range(1, t):
        changed = torch.rand(n, generator=generator) < 1 / 3
        x[step:, changed] = torch.randn(int(changed.sum()), d, generator=generator)
    x += noise * torch.randn(t, n, d, generator=generator)
    return tensors.strided(x.to(dtype)).to(device)


def positions_of(t, n, device="cpu"):
    return tensors.ints((3, t, n), 0, 100_000, seed=9).to(device)


def run(backend, x, rule, **kwargs):
    name, device = backend
    kwargs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    if "shapes" in kwargs:
        positions = tensors.ints((3, x.shape[0]), 0, 100_000, seed=9, device=device)
    else:
        positions = positions_of(*x.shape[:2], device=device)
    out = prune_tokens(x.to(device), positions, rule, backend=name, **kwargs)
    assert_compacted(out, x.to(device), positions)
    return out


def assert_compacted(out: PrunedTokens, x, positions):
    """tokens, positions and index are those of the mask, in order, padded."""
    flat_mask = out.mask.flatten()
    kept = flat_mask.nonzero().flatten()
    capacity = out.index.numel()
    assert int(out.count) == kept.numel() == int(out.cu_count[-1])
    kept, used = kept[:capacity], min(kept.numel(), capacity)
    assert out.index[:used].tolist() == kept.tolist()
    assert (out.index[used:] == -1).all()
    assert_same_bits(out.tokens[:used], x.reshape(-1, x.shape[-1])[kept], name="tokens")
    assert_same_bits(out.positions[:, :used], positions.reshape(3, -1)[:, kept], name="positions")
    assert (out.tokens[used:] == 0).all() and (out.positions[:, used:] == 0).all()


def cosine(a, b):
    """Of two lists of floats."""
    dot = sum(p * q for p, q in zip(a, b))
    return dot / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))


def rows(x):
    """Nested lists of a tensor, in float64."""
    return x.double().tolist()


def smallest(values, k):
    """Indices of the k smallest, ties to the lowest index."""
    return set(sorted(range(len(values)), key=lambda i: (values[i], i))[:k])


def video_patches(frames, height, width, seed=0):
    """Raw RGB frames [F, 28 * height, 28 * width, 3] in [0, 1], and their patches as the
    preprocessor orders them, normalised."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.rand(1, height, width, 3, generator=generator).repeat(frames, 1, 1, 1)
    for f in range(1, frames):
        changed = torch.rand(height, width, generator=generator) < 0.4
        raw[f:, changed] = torch.rand(int(changed.sum()), 3, generator=generator)
    raw = raw.repeat_interleave(28, 1).repeat_interleave(28, 2)
    raw = (raw + 0.05 * torch.rand(raw.shape, generator=generator)).clamp(0, 1)
    mean, std = (0.48, 0.45, 0.40), (0.26, 0.25, 0.27)
    x = (raw - torch.tensor(mean)) / torch.tensor(std)
    # [t, temporal, gh, merge, 14, gw, merge, 14, c] -> [t, gh, gw, merge, merge, c, temporal, ...]
    x = x.view(frames // 2, 2, height, 2, 14, width, 2, 14, 3)
    patches = x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3 * 2 * 14 * 14)
    return raw, patches, mean, std
