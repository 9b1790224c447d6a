"""What a run is told in words, and what it says of the machine and the video before it begins."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vicostream_kernels.backends import usable_device
from vicostream_kernels.cache import Block, PagedKVCache
from vicostream_kernels.methods import Method, RetrieveRule
from vicostream_kernels.models.sampling import DRAWING, FIELDS, unknown
from vicostream_kernels.pipeline.errors import InputError
from vicostream_kernels.pipeline.source import VideoInfo
from vicostream_kernels.pipeline.text import check_text


@dataclass(frozen=True)
class RunOptions:
    """What ``vicostream run`` was asked to do; strings as they were typed."""

    video: str
    model: str = "tiny"
    preset: str = "live"
    questions: Sequence[str] = ()
    fps: float | None = None
    device: str = "cpu"
    dtype: str | None = None
    report: str | None = None
    show_pruning: str | None = None
    explain: str | None = None
    restore: str | None = None
    save: str | None = None
    interactive: bool = False
    realtime: bool = False
    max_lag: float | None = None
    system: str | None = None
    sampler: Sequence[str] = ()
    input_format: str | None = None
    input_options: Sequence[str] = ()
    settings: Sequence[str] = ()
    debug: bool = False

    def opening(self) -> dict[str, Any]:
        """What FFmpeg is told of the video. Raises :class:`InputError` also for a ``system`` that
        cannot be."""
        if self.system is not None and self.restore is not None:
            raise InputError("--system: the session that --restore takes has its own")
        check_text("--system", self.system or "")
        if self.input_format is not None and self.video == "sample":
            raise InputError("--input-format: sample is made here (./sample is a file)")
        told = parse_settings(self.input_options, "--input-option", "rtsp_transport=tcp")
        return {"form": self.input_format, "options": told}


def parse_settings(
    settings: Sequence[str], option: str = "--set", example: str = "prune.threshold=0.15"
) -> dict[str, str]:
    """``["key=value", ...]`` as a mapping; raises :class:`InputError` for anything else."""
    parsed = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            shown = re.split(r"[=:\s]", setting.strip(), maxsplit=1)[0]  # the rest may be secret
            raise InputError(f"{option} {shown!r}: give key=value, as in {example}")
        parsed[key.strip()] = value.strip()
    return parsed


def parse_sampler(settings: Sequence[str]) -> dict[str, Any]:
    """Fields of a generation configuration, and ``seed``, as ``Sampler`` takes them.

    A field that only drawing reads switches it on, a temperature of 0 off, where ``do_sample`` does
    not say. Raises :class:`InputError` for another field, and for what is no number, true, false
    or none.
    """
    parsed: dict[str, Any] = {}
    for key, text in parse_settings(settings, "--sampler", "temperature=0.7").items():
        if key not in FIELDS | {"seed"}:
            raise InputError(f"--{unknown(key)}")
        parsed[key] = _value(key, text)
    for key, kind, said in (("do_sample", bool, "true or false"), ("seed", int, "an int")):
        if key in parsed and type(parsed[key]) is not kind:
            raise InputError(f"--sampler {key}={parsed[key]!r}: give {said}")
    if parsed.get("temperature") == 0:
        if parsed.setdefault("do_sample", False):
            raise InputError("--sampler temperature=0 draws nothing: leave do_sample=true out")
        del parsed["temperature"]
    elif DRAWING.intersection(parsed):
        parsed.setdefault("do_sample", True)
    return parsed


def _value(key: str, text: str) -> Any:
    try:
        value = None if text.lower() == "none" else json.loads(text.lower())
    except (ValueError, RecursionError):
        value = text
    if isinstance(value, str) or (isinstance(value, float) and not math.isfinite(value)):
        raise InputError(f"--sampler {key}={text:.60}: give a number, true, false or none")
    return value


def parse_device(name: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:N``; raises :class:`InputError` where it is not there."""
    try:
        device = usable_device(name)
    except ValueError as error:
        raise InputError(f"--{error}") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device={name!r}: give cpu, cuda or cuda:N")
    return device


_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def parse_dtype(name: str | None) -> torch.dtype | None:
    """Of weights and activations; None leaves it to the checkpoint and the device."""
    if name is None:
        return None
    if name not in _DTYPES:
        raise InputError(f"--dtype {name!r}: give {', '.join(_DTYPES)}")
    return _DTYPES[name]


def gpu_hint(device: torch.device) -> str | None:
    """Where a GPU is there and nobody uses it."""
    if device.type != "cpu" or not torch.cuda.is_available():
        return None
    return f"this machine has a GPU ({torch.cuda.get_device_name()}): --device cuda uses it"


#: Below, a model is fast enough to leave its type alone.
_LARGE_PARAMETERS = 500_000_000


def dtype_hint(model: torch.nn.Module, dtype: torch.dtype | None) -> str | None:
    """Where a large model was left in float32 on a processor that multiplies bfloat16."""
    first = next(model.parameters())
    if dtype is not None or first.device.type != "cpu" or first.dtype != torch.float32:
        return None
    if sum(p.numel() for p in model.parameters()) < _LARGE_PARAMETERS or not _multiplies_bfloat16():
        return None
    return (
        "this processor multiplies bfloat16: --dtype bfloat16 takes half the memory and a fraction "
        "of the time of float32"
    )


def _multiplies_bfloat16() -> bool:
    """Not every torch can tell."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def busy_hint() -> str | None:
    """What helps where other work keeps the cores busy: threads that spin while they wait for each
    other then cost most of the speed."""
    if not hasattr(os, "getloadavg") or os.environ.get("OMP_WAIT_POLICY"):
        return None
    load, cores, threads = os.getloadavg()[0], os.cpu_count() or 1, torch.get_num_threads()
    if threads == 1 or load < cores:
        return None
    return (
        f"this machine is busy (load {load:.1f} on {cores} cores): OMP_WAIT_POLICY=passive makes "
        "threads wait without spinning"
    )


def memory_hint(method: Method, info: VideoInfo) -> str | None:
    """What nobody should learn from a machine that is out of memory after days."""
    rule = method.engine
    bounded = rule.max_pages is not None or rule.history_bytes is not None
    if info.duration_s is not None or rule.history != "all" or bounded:
        return None
    return (
        "this video states no end and all of its history is kept: memory grows with it, unless "
        "--set engine.history_bytes=2GB (the rest goes to files) or engine.max_pages=N bounds it"
    )


def room_hint(rule: RetrieveRule, cache: PagedKVCache, chunks: Sequence[Block]) -> str | None:
    """Before a question finds out: what it reads must be in memory all at once."""
    if rule.k is None or cache.tiers is None:
        return None
    pages = rule.k
    if rule.unit == "chunk":
        held = sum(cache.pages_for(tokens) for chunk in chunks for tokens in chunk.counts)
        pages = round(rule.k * held / len(chunks))
    room = cache.total_pages
    if pages <= room:
        return None
    enough = cache.tiers.memory_bytes * 1.25 * pages / room
    return (
        f"a question that reads {rule.k} {rule.unit}s (retrieve.k) needs about {pages} pages at "
        f"once, and engine.history_bytes has room for {room}: it will fail. "
        f"{math.ceil(enough / 2**20)}MiB would do, or a smaller retrieve.k"
    )


@contextmanager
def quiet_transformers(quiet: bool = True) -> Iterator[None]:
    """Keeps transformers' progress bars and hints off a screen that shows its own."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    if quiet:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
