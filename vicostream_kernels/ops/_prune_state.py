"""PruneState: what a stream carries from one pruning call to the next."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vicostream_kernels.ops._prune_rule import PruneRule


@dataclass(frozen=True, eq=False)
class PruneState:
    """What a stream carries from call to call; ``prune_tokens`` updates the tensors in place.

    S streams (1 outside the packed form). Tensors that the rule does not need are None.

    Attributes:
        steps: [S] int32, steps seen so far; starts at 0.
        previous: [S, N, D], tokens of the last step; starts at NaN, which means none.
        last_kept: [S, N, D], the newest kept token of each location; starts at NaN.
        mean: [S, D] float32, the running mean; starts at 0.
        mean_count: [S] int32, how many steps (or chunks) are in it; starts at 0.
    """

    steps: torch.Tensor
    previous: torch.Tensor | None = None
    last_kept: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    mean_count: torch.Tensor | None = None

    @staticmethod
    def empty(
        rule: PruneRule,
        locations: int,
        width: int,
        *,
        streams: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> PruneState:
        """The state before the first step.

        Args:
            rule: says which tensors there are.
            locations: N, tokens in a step (the most over the streams).
            width: D.
            streams: S, segments of the packed form.
            dtype: that of the tokens. The mean is float32 (float64 for float64 tokens).
            device: where the tokens are.
        """
        made: dict[str, torch.Tensor] = {}
        for name in rule.needs & {"previous", "last_kept"}:
            made[name] = torch.full(
                (streams, locations, width), math.nan, dtype=dtype, device=device
            )
        if "mean" in rule.needs:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            made["mean"] = torch.zeros(streams, width, dtype=wide, device=device)
            made["mean_count"] = torch.zeros(streams, dtype=torch.int32, device=device)
        steps = torch.zeros(streams, dtype=torch.int32, device=device)
        return PruneState(steps=steps, **made)
