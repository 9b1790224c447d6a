"""What this device can do at best, measured: copy and read bandwidth, and matrix-product rate.

The floor of a case is ``max(bytes / bandwidth, flops / rate)``; no implementation runs much faster.
On a CPU its first half is timed in turn with the case, see `Ceiling`: shared machines change their
speed by more than what is asked about.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from vicostream_kernels.bench.timer import last_level_cache_bytes

_MIB = 1 << 20
#: A pass over memory takes at least so much at a time: beside that, starting it is nothing.
_PASS = 64 * _MIB


@dataclass
class Roofline:
    """Ceilings of one device at one thread count.

    Attributes:
        bandwidth: bytes/s (read + written) of a copy far larger than any cache.
        quick: shorter measurements, for a smoke run.
        memory: bytes that are far larger than any cache.
        rates: flop/s of a square matrix product, by dtype.
        reads: bytes/s of reading alone, by the size of what is read.
    """

    device: torch.device
    bandwidth: float
    quick: bool = False
    memory: int = 1024 * _MIB
    rates: dict[torch.dtype, float] = field(default_factory=dict)
    reads: dict[int, float] = field(default_factory=dict)
    _cached: dict[int, float] = field(default_factory=dict)

    @staticmethod
    def measure(device: torch.device, *, quick: bool = False) -> Roofline:
        """Measures the copy bandwidth now; the rest when first asked for."""
        if device.type == "cuda":
            size = (256 if quick else 1024) * _MIB
        else:
            size = min(8 * last_level_cache_bytes(), (256 if quick else 1024) * _MIB)
        copied = copy_bandwidth(device, size, repeats=5 if quick else 11)
        return Roofline(device, copied, quick, size)

    def bandwidth_at(self, moved_bytes: int, *, cold: bool, reads: bool = False) -> float:
        """Bytes/s of a copy: from memory when cold, else of as many bytes as the case moves.

        A working set that stays in cache is not bound by memory, so its ceiling is a copy of its
        own size, repeated. Work that ``reads`` and writes next to nothing may be faster than a
        copy: the larger of a copy and of reading alone then.
        """
        copied = self._copied(moved_bytes, cold)
        return max(copied, self._read(moved_bytes, cold)) if reads else copied

    def _read(self, moved_bytes: int, cold: bool) -> float:
        size = self.memory if cold else max(4096, 1 << (moved_bytes - 1).bit_length())
        if size not in self.reads:
            self.reads[size] = read_bandwidth(self.device, size, repeats=5 if self.quick else 11)
        return self.reads[size]

    def _copied(self, moved_bytes: int, cold: bool) -> float:
        if cold:
            return self.bandwidth
        size = max(4096, 1 << (max(2, moved_bytes) // 2 - 1).bit_length())
        if size not in self._cached:
            rate = copy_bandwidth(self.device, size, repeats=11 if self.quick else 31)
            self._cached[size] = max(rate, self.bandwidth)
        return self._cached[size]

    def ceiling(self, moved_bytes: int, *, cold: bool, reads: bool = False) -> Ceiling:
        """What moves ``moved_bytes`` as `bandwidth_at` says, to be timed in turn with a case."""
        reading = reads and self._read(moved_bytes, cold) > self._copied(moved_bytes, cold)
        at_once = max(moved_bytes, _PASS if cold else 4096)
        return Ceiling(
            at_once // (1 if reading else 2) // 8 * 8,
            max(self.memory, at_once) // at_once if cold else 1,
            reading,
            moved_bytes / at_once,
        )

    def rate(self, dtype: torch.dtype) -> float:
        """Flop/s that work in ``dtype`` can reach: on a CPU that has no instructions for it, those
        of float32, to which it may be widened."""
        own = self.own_rate(dtype)
        return max(own, self.own_rate(torch.float32)) if self.device.type == "cpu" else own

    def own_rate(self, dtype: torch.dtype) -> float:
        """Flop/s of torch's matrix product in ``dtype``."""
        if dtype not in self.rates:
            self.rates[dtype] = matmul_rate(self.device, dtype, quick=self.quick)
        return self.rates[dtype]

    def floor_us(
        self, moved_bytes: int, flops: int, dtype: torch.dtype, *, cold: bool, reads: bool = False
    ) -> float:
        """Microseconds below which no implementation of this work can be."""
        moving = moved_bytes / self.bandwidth_at(moved_bytes, cold=cold, reads=reads)
        return 1e6 * max(moving, flops / self.rate(dtype))

    def facts(self) -> dict[str, object]:
        """What was measured, for the results file: GB/s and TFLOP/s."""
        return {
            "copy_gb_s": round(self.bandwidth / 1e9, 2),
            "cached_copy_gb_s": {
                str(k): round(v / 1e9, 2) for k, v in sorted(self._cached.items())
            },
            "read_gb_s": {str(k): round(v / 1e9, 2) for k, v in sorted(self.reads.items())},
            "matmul_tflop_s": {
                str(dtype).removeprefix("torch."): round(rate / 1e12, 4)
                for dtype, rate in self.rates.items()
            },
        }


class Ceiling:
    """Calling it reads, or copies, the next ``size`` bytes of ``parts`` times as many on the CPU.

    ``scale`` times what a call takes is the time of the case's bytes.
    """

    def __init__(self, size: int, parts: int, reading: bool, scale: float) -> None:
        self.scale = scale
        self._from = torch.ones(parts, size // 4)
        self._to = None if reading else torch.zeros_like(self._from)
        self._turns = itertools.cycle(range(parts))
        self._pass = min(_PASSES, key=self._time_of) if reading else None

    def _time_of(self, read: Callable[[torch.Tensor], object]) -> float:
        return _seconds(lambda: read(self._from[next(self._turns)]), self._from.device, 3)

    def __call__(self) -> None:
        i = next(self._turns)
        if self._to is None:
            self._pass(self._from[i])
        else:
            self._to[i].copy_(self._from[i])


def _halves(x: torch.Tensor) -> torch.Tensor:
    """Two streams at once may be faster than one."""
    return torch.dot(*x.view(2, -1))


#: Passes that write no more than a number.
_PASSES = (torch.Tensor.sum, torch.Tensor.amax, _halves)


def copy_bandwidth(device: torch.device, size: int, *, repeats: int) -> float:
    """Bytes/s of ``copy_`` from one buffer of ``size`` bytes to another, read plus written."""
    source = torch.arange(size // 8, device=device)
    target = torch.zeros_like(source)
    size = source.nbytes
    return 2 * size / _seconds(lambda: target.copy_(source), device, repeats)


def read_bandwidth(device: torch.device, size: int, *, repeats: int) -> float:
    """Bytes/s of reading a buffer of ``size`` bytes: torch's fastest pass that writes no more than
    a number."""
    buffer = torch.ones(size // 8 * 2, device=device)
    return buffer.nbytes / min(_seconds(partial(run, buffer), device, repeats) for run in _PASSES)


def matmul_rate(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> float:
    """Flop/s of an n x n x n product on random values (zeros can run faster than real data)."""
    if device.type == "cuda":
        n = 4096 if quick or dtype == torch.float32 else 8192
    else:
        n = 512 if quick else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)
    out = torch.empty(n, n, dtype=dtype, device=device)
    run = lambda: torch.mm(a, b, out=out)  # noqa: E731
    return 2 * n**3 / _seconds(run, device, 5 if quick else 11)


#: Fewer repeats where these seconds are over: torch multiplies bfloat16 at a hundredth of float32's
#: rate on a CPU that has no instructions for it.
_PATIENCE = 3.0


def _seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest call (a ceiling is the best seen); short calls are timed in groups."""
    until = time.perf_counter() + _PATIENCE
    run()
    count = 1
    while _time(run, device, count) < 1e-4 and count < 4096:
        count *= 4
    best = _time(run, device, count)
    for _ in range(repeats - 1):
        if time.perf_counter() > until:
            break
        best = min(best, _time(run, device, count))
    return best / count


def _time(run: Callable[[], object], device: torch.device, count: int) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3
    start_ns = time.perf_counter_ns()
    for _ in range(count):
        run()
    return (time.perf_counter_ns() - start_ns) / 1e9
