"""STC-Cacher in Qwen2.5-VL's ViT: patches that look as they did keep what was computed for them.

Source: STC (arXiv 2512.00891), published for SigLIP and CLIP. Every ``interval``-th call computes
all patches and its last step becomes the reference. In the calls between, each layer computes

    h = norm(x); K = Wk h                              all patches
    U = the patches whose K differs most from the reference's K
    q, v = Wq h[U], Wv h[U];  V = reference V with v at U
    x += reference attention output with out(attend(rope(q), rope(K), V)) at U
    x += reference MLP output with mlp(norm(x[U])) at U

K is compared before it is rotated, as it leaves the projection: a rotation by the patch's own place
changes neither its norm nor its product with the reference at the same place, so the cosine would
be the same and the keys would only be rounded once more.

What it takes to carry this over from SigLIP: a window layer's queries are the patches of U in each
window, its keys the whole window (``varlen_attention`` with fewer queries than keys, lengths found
by a search in the ascending index lists, on the device); lists, references and branches are in the
ViT's window order; a step is two frames, one temporal patch.

Nothing here waits for a GPU, and no shape depends on data there, so that a call can be captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from vicostream_kernels.methods.rules import ReuseRule
from vicostream_kernels.models.vision import (
    VisionGrid,
    VisionShape,
    Watch,
    embed_patches,
    merge_patches,
    vision_forward,
)
from vicostream_kernels.models.weights import VisionWeights
from vicostream_kernels.ops.append import rope_append
from vicostream_kernels.ops.attention import varlen_attention
from vicostream_kernels.ops.reuse import gather_rows, merge_rows, select_changed

#: What a layer keeps of each patch of the reference, in this order.
_KEY, _VALUE, _ATTENTION, _MLP = range(4)
_COUNTS = ("since_size", "calls", "full_calls", "steps", "skipped_steps", "patches", "h", "w")


class Vit(NamedTuple):
    """What does not change from call to call."""

    weights: VisionWeights
    shape: VisionShape
    inv_freq: torch.Tensor
    backend: str


class EncoderLayout(NamedTuple):
    """What of a model decides the shape of a state."""

    layers: int
    width: int
    hidden_size: int
    merge_size: int
    temporal_patch_size: int
    dtype: torch.dtype
    device: torch.device


class EncoderState:
    """What the encoder keeps of one stream; made by ``Qwen2_5_VLRunner.encoder_state``.

    Its size is fixed by the frames' size: L layers x 4 x N patches of a step x C, and the reference
    step's tokens, on the model's device; the reference step's frames on the host. One stream and
    one thread at a time.

    Attributes:
        rule: the ``ReuseRule``.
        grid: (h, w) in patches of the steps seen last; None before the first call.
        branches: [L, 4, N + 1, C]: K before rotation, V, attention and MLP output of the reference
            in window order. Row N takes what belongs nowhere.
        tokens: [N / 4, D], the reference's merged features in raster order.
        frames: [2, H, W, 3] uint8 on the host, the reference's frames, or None.
        phase: [] int32, whose turn it is by ``max_age``.
        recomputed: [L] int64, patches computed so far.
        counts: host numbers, as ``figures`` gives them.
    """

    def __init__(
        self,
        rule: ReuseRule,
        layout: EncoderLayout,
    ) -> None:
        self.rule, self.layout = rule, layout
        self.counts = dict.fromkeys(_COUNTS, 0)
        self.frames: torch.Tensor | None = None
        with torch.inference_mode(False):
            self.phase = torch.zeros((), dtype=torch.int32, device=layout.device)
            self.recomputed = torch.zeros(layout.layers, dtype=torch.int64, device=layout.device)
        self._allocate(0, 0)

    @property
    def grid(self) -> tuple[int, int] | None:
        size = self.counts["h"], self.counts["w"]
        return size if all(size) else None

    @property
    def places(self) -> int:
        """N, patches of a step."""
        return self.counts["h"] * self.counts["w"]

    @property
    def computed_most(self) -> int:
        """K: patches of a step that a call between full calls computes at most; known to the host,
        and the number itself unless there is a threshold."""
        rule, n = self.rule, self.places
        most = max(1, int(n * (rule.ratio or 0.0)))
        if rule.threshold is not None:
            most = n if rule.max_ratio is None else max(most, int(n * rule.max_ratio))
        return most if rule.max_age is None else max(most, -(-n // (rule.max_age + 1)))

    def figures(self) -> dict[str, Any]:
        """Calls, steps and, layer by layer, patches computed and reused so far, as the report has
        them. Patches of skipped steps count in neither. Waits for the device."""
        total = self.counts["patches"]
        named = ("calls", "full_calls", "steps", "skipped_steps")
        return {name: self.counts[name] for name in named} | {
            "layers": [
                {"recomputed": done, "reused": total - done} for done in self.recomputed.tolist()
            ]
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that the state holds, by name, without copies: the next call writes to them.
        ``load`` takes it back."""
        held = {
            "counts": torch.tensor(list(self.counts.values()), dtype=torch.int64),
            "phase": self.phase,
            "recomputed": self.recomputed,
        }
        if self.grid is not None:
            held |= {"branches": self.branches[:, :, : self.places], "tokens": self.tokens}
        if self.frames is not None:
            held["frames"] = self.frames
        return held

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes over (copies of) what ``tensors`` of a state for the same model gave.

        Raises ``ValueError`` for a name, shape or dtype that does not fit; then nothing changed.
        """
        counts = _take(tensors, "counts", torch.int64, (len(_COUNTS),)).tolist()
        if min(counts) < 0:
            raise ValueError(f"EncoderState.load: counts={counts} must not be negative")
        values = dict(zip(_COUNTS, counts))
        layers, dtype, n = self.layout.layers, self.layout.dtype, values["h"] * values["w"]
        known = {
            "counts": counts,
            "phase": (torch.int32, ()),
            "recomputed": (torch.int64, (layers,)),
        }
        if n:
            known["branches"] = dtype, (layers, 4, n, self.layout.width)
            known["tokens"] = dtype, (n // self.layout.merge_size**2, self.layout.hidden_size)
        taken = {name: _take(tensors, name, *known[name]) for name in known if name != "counts"}
        frames = tensors.get("frames")
        if frames is not None:
            shape = (self.layout.temporal_patch_size, None, None, 3)
            frames = _take(tensors, "frames", torch.uint8, shape).cpu().clone()
        unknown = set(tensors) - set(known) - {"frames"}
        if unknown:
            raise ValueError(f"EncoderState.load: unknown {', '.join(sorted(unknown))}")
        self.counts, self.frames = values, frames
        self._allocate(values["h"], values["w"])
        with torch.inference_mode(False):
            self.phase.copy_(taken["phase"])
            self.recomputed.copy_(taken["recomputed"])
            if n:
                self.branches[:, :, :n].copy_(taken["branches"])
                self.tokens.copy_(taken["tokens"])

    # -- what the encoder does with it -----------------------------------------------------------

    def settle(self, h: int, w: int) -> None:
        """Frames of another size have no reference: everything but the figures starts anew."""
        if self.grid != (h, w):
            self._allocate(h, w)
            self.counts |= {"since_size": 0, "h": h, "w": w}
            self.frames = None

    def full_call_due(self) -> bool:
        since, rule = self.counts["since_size"], self.rule
        due = since == 0 if rule.interval is None else since % rule.interval == 0
        everything = rule.ratio is not None and int(self.places * rule.ratio) >= self.places
        return due or everything

    def changed_steps(self, frames: torch.Tensor | None, steps: int) -> list[int]:
        """The steps whose frames are not the reference's."""
        tolerance = self.rule.skip_tolerance
        if tolerance is None or frames is None or self.frames is None:
            return list(range(steps))
        return [
            i for i in range(steps) if not _alike(self._step(frames, i), self.frames, tolerance)
        ]

    def refer_to(self, frames: torch.Tensor | None, steps: int, tokens: torch.Tensor) -> None:
        """The last step of a full call, whose branches ``keep`` stored, is the reference."""
        self.tokens.copy_(tokens)
        self.frames = None
        if frames is not None and self.rule.skip_tolerance is not None:
            self.frames = self._step(frames, steps - 1).clone()

    def keep(self, layer: int, *branches: torch.Tensor) -> None:
        """Stores what a layer computed for the last step."""
        n = self.places
        for kept, branch in zip(self.branches[layer], branches):
            kept[:n].copy_(branch.flatten(1)[-n:])

    def forced(self) -> torch.Tensor | None:
        """[N] bool, the patches whose turn it is, or None; the next call is others' turn."""
        if self.rule.max_age is None:
            return None
        turn = self.turns == self.phase
        self.phase.add_(1).remainder_(self.rule.max_age + 1)
        return turn

    def _step(self, frames: torch.Tensor, step: int) -> torch.Tensor:
        """A step's frames; an odd last one is repeated, as it is for the ViT."""
        temporal = self.layout.temporal_patch_size
        part = frames[step * temporal : (step + 1) * temporal]
        missing = temporal - part.shape[0]
        return torch.cat((part, part[-1:].expand(missing, -1, -1, -1))) if missing else part

    def _allocate(self, h: int, w: int) -> None:
        own, n = self.layout, h * w
        kind = {"dtype": own.dtype, "device": own.device}
        with torch.inference_mode(False):
            self.branches = torch.empty(own.layers, 4, n + 1, own.width, **kind)
            self.tokens = torch.empty(n // own.merge_size**2, own.hidden_size, **kind)
            if self.rule.max_age is not None:
                turns = torch.arange(n, dtype=torch.int32, device=own.device)
                self.turns = turns.remainder_(self.rule.max_age + 1)


def reuse_forward(
    vit: Vit,
    state: EncoderState,
    patches: torch.Tensor,
    steps: int,
    frames: torch.Tensor | None,
    grid_of: Callable[[int], VisionGrid],
    watch: Watch | None = None,
) -> torch.Tensor:
    """One call of the encoder: ``patches`` [T*N, 3*2*14*14] to tokens [T, N / 4, D].

    ``grid_of(t)`` gives the indices of t steps; ``state`` has settled on their size. ``frames`` are
    the uint8 frames on the host, or None, which skips no step. ``watch`` sees the steps that are
    not skipped.
    """
    changed = state.changed_steps(frames, steps)
    if len(changed) < steps:
        parts = patches.view(steps, state.places, -1).unbind(0)
        patches = torch.cat([parts[i] for i in changed]) if changed else patches[:0]
    # A due call that skips every step computes nothing; it keeps its place in the schedule.
    full = state.full_call_due() and bool(changed)
    encoded: dict[int, torch.Tensor] = {}
    if changed:
        grid = grid_of(len(changed))
        if full:
            # A reference whose frames are still the same stays.
            keep = state.keep if changed[-1] == steps - 1 else None
            tokens = vision_forward(*vit[:3], patches, grid, vit.backend, keep, watch)
            state.recomputed.add_(patches.shape[0])
        else:
            tokens = selective_forward(vit, state, patches, grid, watch)
        tokens = tokens.view(len(changed), -1, tokens.shape[-1])
        encoded = dict(zip(changed, tokens.unbind(0)))
    if len(changed) < steps:
        # These equal the reference so far: copied before the last step takes its place.
        tokens = torch.stack([encoded.get(i, state.tokens) for i in range(steps)])
    if full and changed[-1] == steps - 1:
        state.refer_to(frames, steps, tokens[-1])
    counts = state.counts
    counts["since_size"] += 1
    counts["calls"] += 1
    counts["full_calls"] += full
    counts["steps"] += steps
    counts["skipped_steps"] += steps - len(changed)
    counts["patches"] += patches.shape[0]
    return tokens


def selective_forward(
    vit: Vit,
    state: EncoderState,
    patches: torch.Tensor,
    grid: VisionGrid,
    watch: Watch | None = None,
) -> torch.Tensor:
    """A call between full calls: tokens [F*N / 4, D] of F steps' patches."""
    weights, shape, inv_freq, backend = vit
    n, heads, d = state.places, shape.heads, shape.head_dim
    steps, width = patches.shape[0] // n, heads * d
    force, shared = state.forced(), state.rule.selection == "shared"
    rotate = _Rotation(shape, inv_freq, backend)
    x = embed_patches(weights, shape, patches, grid).view(steps, n, width)
    chosen: _Chosen | None = None
    numbers = []
    for layer, block in enumerate(weights.blocks):
        reference = state.branches[layer, :, :n]
        h = block.attention_norm(x)
        keys = block.qkv.rows(width, 2 * width)(h)
        if chosen is None or not shared:
            chosen = _choose(state, keys, reference[_KEY], force, grid, backend)
        if chosen.count is not None:
            numbers.append(chosen.count)
        changed = gather_rows(h, chosen.index, backend=backend)
        rows = changed.shape[0] * changed.shape[1]
        q = block.qkv.rows(0, width)(changed).view(rows, heads, d)
        v = block.qkv.rows(2 * width)(changed)
        values = merge_rows(reference[_VALUE], v, chosen.index, backend=backend)

        full = layer in shape.full_layers
        ends = grid.frames if full else grid.windows
        longest = grid.longest_frame if full else grid.longest_window
        attended = varlen_attention(
            rotate(q, grid.positions.index_select(1, chosen.place)),
            rotate(keys.view(-1, heads, d), grid.positions),
            values.view(-1, heads, d),
            torch.searchsorted(chosen.place, ends, out_int32=True),
            ends,
            # Padding stands behind the last window's rows and counts as them.
            max_seqlen_q=chosen.longest if chosen.padded else min(chosen.longest, longest),
            max_seqlen_k=longest,
            backend=backend,
        )
        attended = block.out(attended.view(steps, -1, width))
        x = merge_rows(reference[_ATTENTION], attended, chosen.index, residual=x, backend=backend)
        fed = block.mlp(block.mlp_norm(gather_rows(x, chosen.index, backend=backend)))
        x = merge_rows(reference[_MLP], fed, chosen.index, residual=x, backend=backend)
        if force is not None:
            k = gather_rows(keys[-1:], chosen.index[-1:], backend=backend)
            _renew(state.branches[layer], force, chosen.index[-1], (k, v, attended, fed))
    state.recomputed.add_(torch.stack(numbers) if numbers else steps * chosen.longest)
    return merge_patches(weights, shape, x.view(-1, width), grid, watch)


class _Chosen(NamedTuple):
    """The patches that a layer computes.

    index [F, K] int32 ascending, -1 in the padding; place [F*K] int32, their rows among F*N
    (padding: the step's last row); count [] int64 of all steps, None where it is F*K; K; whether
    there may be padding.
    """

    index: torch.Tensor
    place: torch.Tensor
    count: torch.Tensor | None
    longest: int
    padded: bool


def _choose(
    state: EncoderState,
    keys: torch.Tensor,
    reference: torch.Tensor,
    force: torch.Tensor | None,
    grid: VisionGrid,
    backend: str,
) -> _Chosen:
    rule, n, most = state.rule, state.places, state.computed_most
    found = select_changed(
        keys, reference, **rule.kwargs(), max_changed=most, force=force, backend=backend
    )
    index, place, count = found.index, found.index, None
    padded = rule.threshold is not None or most > max(1, int(n * (rule.ratio or 0.0)))
    if padded:
        counts = found.count.clamp(max=most)
        count = counts.sum()
        if index.device.type == "cpu":
            # The count is on the host already: no work for rows that nobody needs.
            most = max(1, int(counts.max()))
            index = index[:, :most].contiguous()
        place = torch.where(index < 0, n - 1, index)
    place = (place + grid.frames[:-1, None]).flatten()
    return _Chosen(index, place, count, most, padded)


class _Rotation:
    """Rotates rows [M, H, d] by their positions [3, M]: ``rope_append`` with a key for nowhere."""

    def __init__(self, shape: VisionShape, inv_freq: torch.Tensor, backend: str) -> None:
        self._section, self._inv_freq, self._backend = shape.section, inv_freq, backend
        # Every layer rotates as many queries, and as many keys.
        self._nowhere: dict[int, tuple[torch.Tensor, ...]] = {}

    def __call__(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        count, key = rows.shape[0], rows[:, :1]
        if count not in self._nowhere:
            pages = rows.new_empty(2, 1, 1, 1, rows.shape[-1]).unbind(0)
            self._nowhere[count] = (*pages, positions.new_full((count,), -1))
        return rope_append(
            rows, key, key, positions, self._inv_freq, self._section, *self._nowhere[count],
            backend=self._backend,
        )  # fmt: skip


def _renew(
    branches: torch.Tensor,
    force: torch.Tensor,
    index: torch.Tensor,
    computed: tuple[torch.Tensor, ...],
) -> None:
    """Patches whose turn it was become their own reference, as the last step has them.

    Others, and padding, go to the row behind the last.
    """
    nowhere = branches.shape[1] - 1
    own = (index >= 0) & force.index_select(0, index.clamp_min(0))
    target = torch.where(own, index, nowhere).long()
    for kept, rows in zip(branches, computed):
        kept.index_copy_(0, target, rows[-1])


def _alike(step: torch.Tensor, reference: torch.Tensor, tolerance: int) -> bool:
    if step.shape != reference.shape:
        return False
    if tolerance == 0:
        return torch.equal(step, reference)
    return bool((step.short() - reference.short()).abs_().max() <= tolerance)


def _take(
    tensors: dict[str, torch.Tensor], name: str, dtype: torch.dtype, shape: tuple[int | None, ...]
) -> torch.Tensor:
    got = tensors.get(name)
    if got is None:
        raise ValueError(f"EncoderState.load: {name} is missing")
    fits = len(got.shape) == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, got.shape)
    )
    if not fits or got.dtype != dtype:
        raise ValueError(
            f"EncoderState.load: {name} is {got.dtype} {list(got.shape)}, "
            f"expected {dtype} {['any' if s is None else s for s in shape]}"
        )
    return got
