"""prune: score visual tokens, decide which stay, compact them in order with their positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vicostream_kernels import backends, checks
from vicostream_kernels.ops._prune_rule import PruneRule, Term
from vicostream_kernels.ops._prune_state import PruneState
from vicostream_kernels.ops._registry import register

__all__ = ["PruneRule", "PruneState", "PrunedTokens", "Term", "prune_tokens"]

_OP = "prune_tokens"

backends.declare(
    "prune",
    _OP,
    triton="vicostream_kernels.triton_kernels.prune:prune_tokens",
    reference="vicostream_kernels.reference.prune:prune_tokens",
    cpu="vicostream_kernels.native.prune:prune_tokens_cpu",
)

_SCHEMA = (
    "prune_tokens(Tensor x, Tensor positions, str rule, int[]? shapes, Tensor(a!) tokens, "
    "Tensor(b!) out_positions, Tensor(c!) index, Tensor(d!) cu_count, Tensor(e!) mask, "
    "Tensor(f!)? steps=None, Tensor(g!)? previous=None, Tensor(h!)? last_kept=None, "
    "Tensor(i!)? mean=None, Tensor(j!)? mean_count=None, Tensor? external_score=None, "
    "Tensor? external_mask=None, Tensor? group_ids=None, Tensor? group_k=None, "
    'str backend="auto") -> ()'
)


class PrunedTokens(NamedTuple):
    """What ``prune_tokens`` kept. C is the capacity, M = T*N the tokens given, S the segments.

    Attributes:
        tokens: [C, D], the kept tokens in order; rows at and after ``min(count, C)`` are 0.
        positions: [3, C] int32, their position ids; 0 in the padding.
        index: [C] int32, their rows in the flattened input (``t * N + n``, or the packed row);
            -1 in the padding.
        count: [] int32, how many are kept, which may exceed C.
        mask: [T, N] (or [M]) bool, what is kept, before C cuts it.
        cu_count: [S + 1] int32, the kept tokens of segment s are ``cu_count[s]`` to
            ``cu_count[s+1]`` (before C cuts them).
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    index: torch.Tensor
    count: torch.Tensor
    mask: torch.Tensor
    cu_count: torch.Tensor


def prune_tokens(
    x: torch.Tensor,
    positions: torch.Tensor,
    rule: PruneRule,
    *,
    shapes: Sequence[tuple[int, int]] | None = None,
    state: PruneState | None = None,
    external_score: torch.Tensor | None = None,
    external_mask: torch.Tensor | None = None,
    group_ids: torch.Tensor | None = None,
    group_k: torch.Tensor | None = None,
    capacity: int | None = None,
    backend: str = "auto",
) -> PrunedTokens:
    """Keeps the visual tokens that a rule chooses, in order, with their position ids.

    One pass, no host sync, no shape that depends on data. A call is one chunk [T, N], or with
    ``shapes`` several segments (chunks or streams) packed one after the other, each as if alone but
    for ``rule.scope="call"``.

    Args:
        x: [T, N, D] tokens of T steps with N locations, or packed [M, D]; float32, float16 or
            bfloat16. T, N and D at least 1.
        positions: [3, T, N] int32 (t, h, w) ids, or packed [3, M].
        rule: what is kept; see :class:`PruneRule` for every definition.
        shapes: host ``((T0, N0), ...)`` of the packed segments; their products add up to M.
        state: PruneState?, updated in place: the last step, the last kept tokens, the running mean
            of each segment's stream (row s of the state for segment s). None: nothing came before.
            Must be the rule's (``PruneState.empty(rule, N, D)``), in x's dtype.
        external_score: [T, N] or [M], float32, float16 or bfloat16; goes into the score with weight
            ``rule.external``. Given exactly when that is not 0.
        external_mask: [T, N] or [M] bool, joined as ``rule.mask`` says.
        group_ids: [T, N] or [M] int32, for rules with k or a ratio: the count holds for each group
            of a scope. A token with a negative id (or one beyond the quotas) stays only if it must.
        group_k: [groups] or [units, groups] int32 on the device, quotas in place of ``rule.k``;
            units are the steps, chunks or the call, by ``rule.scope``. Needs ``group_ids``.
        capacity: C, at least 1; None is M. On overflow the first C kept tokens in order are given.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        PrunedTokens. Consumers use ``min(count, C)`` rows.

    Scores are accumulated in float32. Tokens with NaN or inf (a sum of squares that is not finite)
    are kept by every rule that compares tokens, also beyond its k.

    Streaming: for rules with ``rule.causal`` steps fed in any pieces with one state give the bits
    of one call; for other rules chunks fed one by one give the bits of the packed chunks.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is wrong; nothing has
            been written.
        BackendUnavailable: the backend asked for can't serve this; the message says what can.
        RuntimeError: an input requires grad (there is no backward).

    Source: the family of ViCoStream's chunk-intra dropping (arXiv 2606.19849), TimeChat-Online's
    DTD (2504.17343), STC-Pruner (2512.00891) and EVS (2510.14624); the published settings are
    values in ``vicostream_kernels.methods``.
    """
    if not isinstance(rule, PruneRule):
        raise TypeError(f"{_OP}: rule must be a PruneRule, got {type(rule).__name__}")
    dims = 3 if shapes is None else 2
    if not isinstance(x, torch.Tensor) or x.dim() != dims:
        raise ValueError(
            f"{_OP}: x must be a tensor "
            f"{'[T, N, D], or [M, D] with shapes' if dims == 3 else '[M, D] (with shapes)'}, "
            f"got {tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__}"
        )
    total = x.shape[:-1].numel()
    if capacity is None:
        capacity = max(1, total)  # what has no tokens is refused for its shape
    checks.check_int(_OP, "capacity", capacity)
    checks.check_range(_OP, "capacity", capacity, 1)
    if not isinstance(state, PruneState | None):
        raise TypeError(f"{_OP}: state must be a PruneState or None, got {type(state).__name__}")
    pairs = None if shapes is None else _flat_shapes(shapes)
    segments = 1 if pairs is None else len(pairs) // 2
    tokens = x.new_empty((capacity, x.shape[-1]))
    kept_positions = x.new_empty((3, capacity), dtype=torch.int32)
    index = x.new_empty(capacity, dtype=torch.int32)
    cu_count = x.new_empty(segments + 1, dtype=torch.int32)
    mask = x.new_empty(x.shape[:-1], dtype=torch.bool)
    _prune_tokens(
        x,
        positions,
        rule.text(),
        pairs,
        tokens,
        kept_positions,
        index,
        cu_count,
        mask,
        *((None,) * 5 if state is None else _tensors_of(state)),
        external_score,
        external_mask,
        group_ids,
        group_k,
        backend,
    )
    count = cu_count.select(0, segments)
    return PrunedTokens(tokens, kept_positions, index, count, mask, cu_count)


def _flat_shapes(shapes: Sequence[tuple[int, int]]) -> list[int]:
    if isinstance(shapes, torch.Tensor):
        raise TypeError(f"{_OP}: shapes must be pairs of ints on the host, got a tensor")
    if not shapes or any(len(pair) != 2 for pair in shapes):
        raise ValueError(f"{_OP}: shapes={shapes!r} must be ((T0, N0), ...), at least one pair")
    return [size for pair in shapes for size in pair]


def _tensors_of(state: PruneState) -> tuple[torch.Tensor | None, ...]:
    return state.steps, state.previous, state.last_kept, state.mean, state.mean_count


def _check(
    x, positions, rule, shapes, tokens, out_positions, index, cu_count, mask, steps, previous,
    last_kept, mean, mean_count, external_score, external_mask, group_ids, group_k,
) -> None:  # fmt: skip
    parsed = PruneRule.parse(rule)
    dims = checks.Dims(_OP)
    rows = "T N" if shapes is None else "M"
    dims.bind("x", x, f"{rows} D", checks.FLOAT_DTYPES)
    dims.bind("positions", positions, f"3 {rows}", torch.int32, x.device)
    if 0 in x.shape:
        raise ValueError(f"{_OP}: x has shape {tuple(x.shape)}, allowed: sizes of at least 1")
    chunks = _chunks(x, shapes)
    dims.bind("tokens", tokens, "C D", x.dtype, x.device)
    dims.bind("out_positions", out_positions, "3 C", torch.int32, x.device)
    dims.bind("index", index, "C", torch.int32, x.device)
    dims.bind("mask", mask, rows, torch.bool, x.device)
    dims.bind("cu_count", cu_count, str(len(chunks) + 1), torch.int32, x.device)
    checks.check_range(_OP, "capacity", dims["C"], 1)
    state = {"previous": previous, "last_kept": last_kept, "mean": mean, "mean_count": mean_count}
    _check_state(dims, x, parsed, chunks, steps, state)
    if (external_score is not None) != bool(parsed.external):
        raise ValueError(
            f"{_OP}: external_score is {'missing' if external_score is None else 'given'}, but the "
            f"rule has external={parsed.external}; it takes one exactly when that is not 0"
        )
    if external_score is not None:
        dims.bind("external_score", external_score, rows, checks.FLOAT_DTYPES, x.device)
    if external_mask is not None:
        dims.bind("external_mask", external_mask, rows, torch.bool, x.device)
    _check_groups(dims, x, parsed, chunks, rows, group_ids, group_k)
    checks.check_last_dim_dense(
        _OP, tokens=tokens, out_positions=out_positions, index=index, mask=mask, cu_count=cu_count,
        steps=steps, **state,
    )  # fmt: skip


def _chunks(x: torch.Tensor, shapes: Sequence[int] | None) -> list[tuple[int, int]]:
    if shapes is None:
        return [(x.shape[0], x.shape[1])]
    if len(shapes) % 2 or not shapes or min(shapes) < 1:
        raise ValueError(f"{_OP}: shapes={list(shapes)} must be pairs (T, N) of at least 1")
    chunks = list(zip(shapes[::2], shapes[1::2]))
    if sum(t * n for t, n in chunks) != x.shape[0]:
        raise ValueError(
            f"{_OP}: shapes={chunks} add up to {sum(t * n for t, n in chunks)} tokens, "
            f"x has M={x.shape[0]}"
        )
    return chunks


def _check_state(dims, x, rule: PruneRule, chunks, steps, state) -> None:
    given = {name for name, tensor in state.items() if tensor is not None}
    if steps is None and not given:
        return
    if steps is None or given != rule.needs:
        raise ValueError(
            f"{_OP}: state holds {', '.join(sorted(given)) or 'no tensors'}"
            f"{'' if steps is not None else ' and no steps'}, this rule needs "
            f"{', '.join(['steps', *sorted(rule.needs)])}: make it with PruneState.empty(rule, ...)"
        )
    segments, locations = len(chunks), max(n for _, n in chunks)
    dims.bind("state.steps", steps, str(segments), torch.int32, x.device)
    for name in given & {"previous", "last_kept"}:
        dims.bind(f"state.{name}", state[name], f"{segments} _ D", x.dtype, x.device)
        if state[name].shape[1] < locations or (
            len(chunks) == 1 and state[name].shape[1] != locations
        ):
            raise ValueError(
                f"{_OP}: state.{name} has {state[name].shape[1]} locations, x has N={locations}"
            )
    if "mean" in given:
        dims.bind("state.mean", state["mean"], f"{segments} D", torch.float32, x.device)
        dims.bind("state.mean_count", state["mean_count"], f"{segments}", torch.int32, x.device)


def _check_groups(dims, x, rule: PruneRule, chunks, rows, group_ids, group_k) -> None:
    if group_ids is None:
        if group_k is not None or isinstance(rule.k, tuple):
            what = "group_k" if group_k is not None else f"k={rule.k}"
            raise ValueError(f"{_OP}: {what} counts groups and needs group_ids, got none")
        return
    if not rule.ranked:
        raise ValueError(
            f"{_OP}: group_ids is given, but the rule has no k or ratio to count in groups"
        )
    dims.bind("group_ids", group_ids, rows, torch.int32, x.device)
    if group_k is None:
        return
    if rule.k is None:
        raise ValueError(f"{_OP}: group_k takes the place of the rule's k, but the rule has none")
    units = {"step": sum(t for t, _ in chunks), "chunk": len(chunks), "call": 1}[rule.scope]
    spec = (
        "groups" if isinstance(group_k, torch.Tensor) and group_k.dim() == 1 else f"{units} groups"
    )
    dims.bind("group_k", group_k, spec, torch.int32, x.device)
    if dims["groups"] < 1:
        raise ValueError(f"{_OP}: group_k has shape {tuple(group_k.shape)}, needs a group")


@checks.remember
def _serve(x, positions, rule, shapes, *rest):
    """Checks; returns what takes the tensors. ``rest``: the other tensors and the backend."""
    *tensors, backend = rest
    _check(x, positions, rule, shapes, *tensors)
    parsed, shapes = PruneRule.parse(rule), None if shapes is None else list(shapes)
    run = backends.resolve(_OP, backend, x)
    prepare = getattr(run, "prepare", None)
    made = None if prepare is None else prepare(x, positions, parsed, shapes, *tensors)
    return made or (lambda x, positions, *given: run(x, positions, parsed, shapes, *given))


def _run(
    x, positions, rule, shapes, tokens, out_positions, index, cu_count, mask, steps=None,
    previous=None, last_kept=None, mean=None, mean_count=None, external_score=None,
    external_mask=None, group_ids=None, group_k=None, backend="auto",
) -> None:  # fmt: skip
    rest = (
        tokens, out_positions, index, cu_count, mask, steps, previous, last_kept, mean, mean_count,
        external_score, external_mask, group_ids, group_k,
    )  # fmt: skip
    _serve(x, positions, rule, shapes, *rest, backend)(x, positions, *rest)


def _fake(
    x, positions, rule, shapes, tokens, out_positions, index, cu_count, mask, steps=None,
    previous=None, last_kept=None, mean=None, mean_count=None, external_score=None,
    external_mask=None, group_ids=None, group_k=None, backend="auto",
) -> None:  # fmt: skip
    _check(
        x, positions, rule, shapes, tokens, out_positions, index, cu_count, mask, steps, previous,
        last_kept, mean, mean_count, external_score, external_mask, group_ids, group_k,
    )  # fmt: skip


_prune_tokens = register(_SCHEMA, _run, _fake)
