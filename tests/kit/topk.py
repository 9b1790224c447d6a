"""A top-k check that demands the right set where scores differ and allows any among equals."""

from __future__ import annotations

import torch


def assert_valid_topk(
    index: torch.Tensor, scores: torch.Tensor, k: int, *, lowest_index_ties: bool = True
) -> None:
    """``index`` [K] int32 (ascending, -1 padded) holds ``k`` of the highest ``scores`` [N].

    With ``lowest_index_ties`` (the contract of this package) equal scores at the boundary must go
    to the lowest indices, so the set is unique.
    """
    chosen = index[index >= 0].tolist()
    k = min(k, scores.numel())
    assert index[len(chosen) :].eq(-1).all(), f"-1 stands before an index in {index.tolist()}"
    assert len(chosen) == k, f"{len(chosen)} chosen, {k} wanted"
    assert chosen == sorted(set(chosen)), f"not ascending and unique: {chosen}"
    assert not chosen or chosen[-1] < scores.numel(), f"index {chosen[-1]} out of range"
    if k == 0:
        return
    values = scores.double().nan_to_num(nan=-torch.inf)
    rest = [i for i in range(scores.numel()) if i not in set(chosen)]
    lowest = float(values[chosen].min())
    if rest:
        assert float(values[rest].max()) <= lowest, "an unchosen score is higher than a chosen one"
    if lowest_index_ties:
        tied_out = [i for i in rest if float(values[i]) == lowest]
        tied_in = [i for i in chosen if float(values[i]) == lowest]
        assert not tied_out or max(tied_in) < min(tied_out), "a tie went to a higher index"
