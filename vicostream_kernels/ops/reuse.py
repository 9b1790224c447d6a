"""reuse: which rows of a feature changed, and putting recomputed rows back among reused ones."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vicostream_kernels import backends, checks
from vicostream_kernels.ops._registry import register

__all__ = ["Changed", "gather_rows", "merge_rows", "select_changed"]

METRICS = ("cosine", "l1", "l2", "dot")
#: Similarities that a metric can give; a threshold outside would take all or none.
SIMILARITY_RANGE = {
    "cosine": (-1.0, 1.0),
    "l1": (None, 0.0),
    "l2": (None, 0.0),
    "dot": (None, None),
}

for _name in ("select_changed", "gather_rows", "merge_rows"):
    backends.declare(
        "reuse",
        _name,
        triton=f"vicostream_kernels.triton_kernels.reuse:{_name}",
        reference=f"vicostream_kernels.reference.reuse:{_name}",
        cpu=f"vicostream_kernels.native.reuse:{_name}_cpu",
    )


class Changed(NamedTuple):
    """The rows of each frame that changed.

    Attributes:
        index: [F, K] int32, ascending, -1 in the padding.
        count: [F] int32, how many changed; the lists hold ``min(count, K)`` of them.
        similarity: [F, N] float32, of each row with its reference.
    """

    index: torch.Tensor
    count: torch.Tensor
    similarity: torch.Tensor


def select_changed(
    feature: torch.Tensor,
    reference: torch.Tensor,
    *,
    ratio: float | None = None,
    threshold: float | None = None,
    max_changed: int | None = None,
    metric: str = "cosine",
    force: torch.Tensor | None = None,
    backend: str = "auto",
) -> Changed:
    """Lists the rows of each frame that are least like their reference, in one pass.

    Args:
        feature: [F, N, C], float32, float16 or bfloat16; F, N and C at least 1.
        reference: [N, C] for all frames, or [F, N, C]; same dtype.
        ratio: in [0, 1]. Alone, the ``max(1, int(N * ratio))`` least similar rows changed.
        threshold: alone, the rows with a similarity below it changed. With a ratio, those below it
            and the ``int(N * ratio)`` least similar. At least one of the two must be given.
        max_changed: K, the length of the lists, 1 to N. None is the number that the ratio alone
            takes, or N with a threshold. Where more changed, the K least similar are listed and
            ``count`` stays true.
        metric: "cosine"; "dot"; "l1", minus the mean absolute difference over C; "l2", minus the
            root of the mean square difference. The cosine of two zero rows is 1 (unchanged), of a
            zero row and another 0, of equal rows exactly 1. A threshold is in [-1, 1] for
            "cosine" and at most 0 for "l1" and "l2".
        force: [N] or [F, N] bool?, rows that changed whatever they look like (a bound on how long
            a row may be reused). They rank as the least similar, so they are part of a ratio's
            number; give ``max_changed`` where there may be more of them than that.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        Changed(index [F, K] int32, count [F] int32, similarity [F, N] float32). Rows whose
        similarity is NaN (they hold NaN or inf) come first and changed at every threshold; ties go
        to the lowest index. Each frame's result depends on that frame only.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is wrong.
        BackendUnavailable: the backend asked for can't serve this; the message says what can.
        RuntimeError: an input requires grad (there is no backward).

    Source: the selector of STC-Cacher (arXiv 2512.00891), which takes the ratio alone and the
    cosine; the threshold is this package's.
    """
    if ratio is None and threshold is None:
        raise ValueError("select_changed: give ratio, threshold or both, got neither")
    if not isinstance(feature, torch.Tensor) or feature.dim() != 3:
        got = tuple(feature.shape) if isinstance(feature, torch.Tensor) else type(feature).__name__
        raise ValueError(f"select_changed: feature must be a tensor [F, N, C], got {got}")
    if ratio is not None:
        checks.check_range("select_changed", "ratio", ratio, 0, 1)
    places = feature.shape[1]
    k = 0 if ratio is None else int(places * ratio)
    if threshold is None:
        k = max(1, k)
    capacity = max_changed
    if max_changed is not None:
        checks.check_int("select_changed", "max_changed", max_changed)
    else:
        capacity = k if threshold is None else places
    return Changed(
        *_select_changed(feature, reference, k, threshold, capacity, metric, force, backend)
    )


def gather_rows(x: torch.Tensor, index: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Takes the listed rows of each frame.

    Args:
        x: [F, N, C], float32, float16 or bfloat16; every size at least 1, K below too.
        index: [F, K] int32. An entry outside [0, N), -1 among them, gives a row of zeros.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        [F, K, C] in x's dtype, freshly allocated.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is wrong; with VICO_CHECK=1 also
            an index that is neither -1 nor in range.
        BackendUnavailable: the backend asked for can't serve this; the message says what can.
        RuntimeError: an input requires grad (there is no backward).
    """
    return _gather_rows(x, index, backend)


def merge_rows(
    base: torch.Tensor,
    rows: torch.Tensor,
    index: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """``base`` with the listed rows replaced, plus ``residual``, in one pass.

    Args:
        base: [N, C] for all frames, or [F, N, C]; float32, float16 or bfloat16; every size at least
            1, K below too.
        rows: [F, K, C], same dtype; row k of frame f replaces row ``index[f, k]``.
        index: [F, K] int32, no index twice in a frame. An entry outside [0, N), -1 among them,
            replaces nothing.
        residual: [F, N, C]?, same dtype, added in float32 and rounded once.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        [F, N, C] in base's dtype, freshly allocated; base is not written.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is wrong; with VICO_CHECK=1 also
            an index that is neither -1 nor in range, or that stands twice in a frame.
        BackendUnavailable: the backend asked for can't serve this; the message says what can.
        RuntimeError: an input requires grad (there is no backward).

    Source: the scatter of STC-Cacher (arXiv 2512.00891) into the reference frame's branch output.
    """
    return _merge_rows(base, rows, index, residual, backend)


def _refuse_empty(op: str, **tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if 0 in tensor.shape:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, allowed: sizes >= 1")


def _check_index(op: str, index: torch.Tensor, places: int, unique: bool) -> None:
    wrong = (index < -1) | (index >= places)
    if bool(wrong.any()):
        raise ValueError(
            f"{op}: index holds {int(index[wrong][0])}, allowed: -1 or 0 to N-1={places - 1}"
        )
    ordered = index.sort(dim=1).values
    if unique and bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        raise ValueError(f"{op}: index holds the same row twice in a frame, allowed: each once")


def _check_select(feature, reference, k, threshold, capacity, metric, force) -> None:
    op = "select_changed"
    checks.check_choice(op, "metric", metric, METRICS)
    dims = checks.Dims(op)
    dims.bind("feature", feature, "F N C", checks.FLOAT_DTYPES)
    _refuse_empty(op, feature=feature)
    shared = isinstance(reference, torch.Tensor) and reference.dim() == 2
    dims.bind("reference", reference, "N C" if shared else "F N C", feature.dtype, feature.device)
    if force is not None:
        shared = isinstance(force, torch.Tensor) and force.dim() == 1
        dims.bind("force", force, "N" if shared else "F N", torch.bool, feature.device)
    checks.check_range(op, "k", k, 0, dims["N"])
    checks.check_range(op, "max_changed", capacity, 1, dims["N"])
    if threshold is not None:
        checks.check_range(op, "threshold", threshold, *SIMILARITY_RANGE[metric])


@checks.remember
def _serve_select(feature, reference, k, threshold, capacity, metric, force, backend):
    """Checks; returns what takes the tensors."""
    _check_select(feature, reference, k, threshold, capacity, metric, force)
    op, settled = "select_changed", (k, threshold, capacity, metric)
    if force is None:
        return backends.prepared(op, backend, feature, (feature, reference), *settled)
    run = backends.resolve(op, backend, feature)
    return lambda feature, reference, force: run(feature, reference, *settled, force)


def _select(
    feature, reference, k, threshold, capacity, metric="cosine", force=None, backend="auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    run = _serve_select(feature, reference, k, threshold, capacity, metric, force, backend)
    return run(feature, reference) if force is None else run(feature, reference, force)


def _select_fake(
    feature, reference, k, threshold, capacity, metric="cosine", force=None, backend="auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_select(feature, reference, k, threshold, capacity, metric, force)
    frames, places = feature.shape[:2]
    return (
        feature.new_empty((frames, capacity), dtype=torch.int32),
        feature.new_empty((frames,), dtype=torch.int32),
        feature.new_empty((frames, places), dtype=torch.float32),
    )


def _check_gather(x, index) -> None:
    dims = checks.Dims("gather_rows")
    dims.bind("x", x, "F N C", checks.FLOAT_DTYPES)
    dims.bind("index", index, "F K", torch.int32, x.device)
    _refuse_empty("gather_rows", x=x, index=index)


@checks.remember
def _serve_gather(x, index, backend):
    _check_gather(x, index)
    return backends.prepared("gather_rows", backend, x, (x, index))


def _gather(x, index, backend="auto") -> torch.Tensor:
    run = _serve_gather(x, index, backend)
    if checks.CHECK_VALUES:
        _check_index("gather_rows", index, x.shape[1], unique=False)
    return run(x, index)


def _gather_fake(x, index, backend="auto") -> torch.Tensor:
    _check_gather(x, index)
    return x.new_empty((*index.shape, x.shape[-1]))


def _check_merge(base, rows, index, residual) -> None:
    op = "merge_rows"
    dims = checks.Dims(op)
    shared = isinstance(base, torch.Tensor) and base.dim() == 2
    dims.bind("base", base, "N C" if shared else "F N C", checks.FLOAT_DTYPES)
    dims.bind("rows", rows, "F K C", base.dtype, base.device)
    dims.bind("index", index, "F K", torch.int32, base.device)
    if residual is not None:
        dims.bind("residual", residual, "F N C", base.dtype, base.device)
    _refuse_empty(op, base=base, rows=rows)


@checks.remember
def _serve_merge(base, rows, index, residual, backend):
    _check_merge(base, rows, index, residual)
    return backends.prepared("merge_rows", backend, base, (base, rows, index, residual))


def _merge(base, rows, index, residual=None, backend="auto") -> torch.Tensor:
    run = _serve_merge(base, rows, index, residual, backend)
    if checks.CHECK_VALUES:
        _check_index("merge_rows", index, base.shape[-2], unique=True)
    return run(base, rows, index, residual)


def _merge_fake(base, rows, index, residual=None, backend="auto") -> torch.Tensor:
    _check_merge(base, rows, index, residual)
    return base.new_empty((rows.shape[0], *base.shape[-2:]))


_select_changed = register(
    "select_changed(Tensor feature, Tensor reference, SymInt k, float? threshold, SymInt capacity, "
    'str metric="cosine", Tensor? force=None, str backend="auto") -> (Tensor, Tensor, Tensor)',
    _select,
    _select_fake,
)
_gather_rows = register(
    'gather_rows(Tensor x, Tensor index, str backend="auto") -> Tensor', _gather, _gather_fake
)
_merge_rows = register(
    "merge_rows(Tensor base, Tensor rows, Tensor index, Tensor? residual=None, "
    'str backend="auto") -> Tensor',
    _merge,
    _merge_fake,
)
