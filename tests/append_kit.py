"""What the tests of rope_append share: a call's arguments."""

from __future__ import annotations

import pytest
import torch

import vicostream_kernels as vk
from kit import interpreter, tensors
from vicostream_kernels.ops.append import KeySummary


class Call:
    """One call's arguments, odd and gapped, on a device."""

    def __init__(
        self, n=7, h=4, g=2, d=16, pages=5, page_size=3, dtype=torch.float32, device="cpu", *,
        kind="both", sub=2, source="rotated", raw=True, seed=0, sections=True, top=10_000_000,
        in_order=False,
    ):  # fmt: skip
        if interpreter.ACTIVE and dtype == torch.bfloat16:
            pytest.skip("Triton's interpreter computes bf16 wrongly")
        self.q = tensors.randn((n, h, d), dtype, seed=seed, device=device)
        self.k = tensors.randn((n, g, d), dtype, seed=seed + 1, device=device)
        self.v = tensors.randn((n, g, d), dtype, seed=seed + 2, device=device)
        self.positions = tensors.ints((3, n), 0, top, seed=seed + 3, device=device)
        self.inv_freq = (1e4 ** (-torch.arange(0, d, 2) / d)).to(device)
        half = d // 2
        quarter = half // 4
        self.mrope_section = (
            [quarter, (half - quarter) // 2, half - quarter - (half - quarter) // 2]
            if sections
            else None
        )
        self.k_pages = tensors.randn((pages, page_size, g, d), dtype, seed=seed + 4, device=device)
        self.v_pages = tensors.randn((pages, page_size, g, d), dtype, seed=seed + 5, device=device)
        self.raw_k_pages = (
            tensors.randn((pages, page_size, g, d), dtype, seed=seed + 6, device=device)
            if raw
            else None
        )
        generator = torch.Generator().manual_seed(seed + 7)
        order = torch.randperm(pages * page_size, generator=generator)[:n].int()
        if in_order:  # as a stream's tokens come, block after block; one of the first comes late
            order = torch.arange(n, dtype=torch.int32).roll(-1)
        order[n // 2] = -1
        self.slots = order.to(device)
        self.summary = (
            KeySummary.empty(3, g, d, kind=kind, sub=sub, source=source, device=device)
            if kind
            else None
        )
        self.block_of_page = (
            torch.tensor(
                [p * 3 // pages if in_order else (p * 2) % 5 - 1 for p in range(pages)],
                dtype=torch.int32,
                device=device,
            )  # fmt: skip
            if kind
            else None
        )

    def run(self, backend):
        return vk.rope_append(
            self.q, self.k, self.v, self.positions, self.inv_freq, self.mrope_section,
            self.k_pages, self.v_pages, self.slots, raw_k_pages=self.raw_k_pages,
            summary=self.summary, block_of_page=self.block_of_page, backend=backend,
        )  # fmt: skip

    def written(self):
        parts = {"k_pages": self.k_pages, "v_pages": self.v_pages, "raw": self.raw_k_pages}
        if self.summary is not None:
            for name in ("sum", "count", "kmin", "kmax"):
                parts[name] = getattr(self.summary, name)
        return {name: t for name, t in parts.items() if t is not None}

    def snapshot(self):
        return {name: t.clone() for name, t in self.written().items()}
