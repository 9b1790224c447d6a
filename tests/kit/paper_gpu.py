"""A GPU on paper: the engine on torch's fake tensors of device "cuda", in a process of its own.

`run` streams two chunks and asks a question there. Nothing is computed, and no kernel is launched:
what would be is recorded. So this shows tensors on a wrong device, waits for the device, launches
beyond the limits of a grid and calls that fail, all in code that otherwise only a GPU reaches.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
_HEADERS = Path(torch.__file__).parent / "include"
#: Blocks along x, and along y and z.
_GRID = (2**31 - 1, 65_535, 65_535)


def missing() -> str | None:
    """Why this can't be done here, or None."""
    if torch.backends.cuda.is_built():
        return "this torch knows CUDA itself"
    if shutil.which("g++") is None or not _HEADERS.is_dir():
        return "needs g++ and torch's headers"
    return None


def run(cases: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """For each preset with its overrides: ``launches`` by op, ``faults`` and ``waits`` (of the
    second chunk) with the lines that made them, ``answer``, or ``error``."""
    done = subprocess.run(
        [sys.executable, "-m", "kit.paper_gpu", json.dumps(cases), str(_guard())],
        cwd=ROOT / "tests",
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-8000:])
    return json.loads(done.stdout.splitlines()[-1])


def _guard() -> Path:
    source = Path(__file__).with_name("cuda_guard.cpp")
    digest = hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    made = ROOT / "build" / "paper-gpu" / f"guard-{digest}.so"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        new, library = f"{made}.{os.getpid()}", _HEADERS.parent / "lib"
        command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{_HEADERS}", str(source)]
        command += [f"-L{library}", "-lc10", f"-Wl,-rpath,{library}", "-o", new]
        subprocess.run(command, check=True)
        os.replace(new, made)
    return made


# -- in that process -----------------------------------------------------------------------------

_launches: Counter[str] = Counter()
_faults: list[str] = []
_waits: list[str] = []


class _Event:
    def __init__(self, enable_timing: bool = False) -> None: ...
    def record(self, stream: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        return 1.0


class _Stream:
    def __init__(self, device: Any = None) -> None: ...
    def wait_stream(self, stream: _Stream) -> None: ...
    def wait_event(self, event: _Event) -> None: ...


def _stand_in() -> None:
    """What of ``torch.cuda`` has no meaning for fake tensors. Memory is pinned by name only."""
    stream = _Stream()
    for name, value in {
        "Event": _Event,
        "Stream": _Stream,
        "current_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "paper",
        "max_memory_allocated": lambda device=None: 0,
    }.items():
        setattr(torch.cuda, name, value)

    def unpinned(make: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, pin_memory=False, **options: make(*args, **options)

    torch.tensor, torch.empty = unpinned(torch.tensor), unpinned(torch.empty)
    torch.Tensor.pin_memory = lambda self: self
    torch.Tensor.record_stream = lambda self, stream: None


def _record_launches() -> None:
    """Has each op's fake run the op itself, as far as its launches. To be called before the ops are
    registered."""
    from kit.cubin import record_launches

    ops: dict[str, Callable[..., Any]] = {}
    impl, register_fake = torch.library.Library.impl, torch.library.register_fake

    def keeping(self: Any, name: Any, function: Any, key: str = "", **options: Any) -> None:
        if key == "CUDA":
            ops[name] = function
        impl(self, name, function, key, **options)

    def launching(op: Any, fake: Callable[..., Any] | None = None, **options: Any) -> Any:
        if fake is None or not str(op).startswith("vicostream::"):
            return register_fake(op, fake, **options)
        name = op.partition("::")[2]

        def both(*args: Any, **kwargs: Any) -> Any:
            for launch in record_launches(lambda: ops[name](*args, **kwargs)):
                _launches[name] += 1
                _check(launch)
            return fake(*args, **kwargs)

        return register_fake(op, both, **options)

    torch.library.Library.impl, torch.library.register_fake = keeping, launching


def _check(launch: Any) -> None:
    what = launch.kernel.__name__
    for size, most in zip(launch.grid, _GRID):
        if not 1 <= size <= most:
            _faults.append(f"{what}: grid {launch.grid}")
    for name, value in launch.arguments.items():
        if isinstance(value, torch.Tensor) and value.device.type != "cuda":
            _faults.append(f"{what}: {name} is on {value.device}")


def _line() -> str:
    frames = [f for f in traceback.extract_stack() if f"{ROOT}/vicostream_kernels" in f.filename]
    return "; ".join(f"{Path(f.filename).name}:{f.lineno} {f.line}" for f in frames[-2:])


class _Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes what makes the host wait: copies that are not asked to go on by themselves, masks whose
    length it must know, numbers that travel with an assignment."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, source = op.name().partition("::")[2], args[0] if args else None
        if name == "copy_" and _crosses(args[0], args[1].device):
            if not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
                _waits.append(f"copy_ at {_line()}")
        elif name == "_to_copy" and _crosses(source, kwargs.get("device")):
            if not kwargs.get("non_blocking"):
                _waits.append(f"to at {_line()}")
        elif name in ("index.Tensor", "index_put_") and source.device.type == "cuda":
            given = [x for x in args[1] if x is not None] + list(args[2:3])
            masks = any(x.dtype == torch.bool for x in args[1] if x is not None)
            if masks or any(x.device.type != "cuda" for x in given):
                _waits.append(f"{name} at {_line()}")
        return op(*args, **kwargs)


def _crosses(tensor: torch.Tensor, device: torch.device | None) -> bool:
    kinds = {tensor.device.type, tensor.device.type if device is None else device.type}
    return len(kinds) == 2 and "cuda" in kinds


class _Fixed:
    """A sampler that needs no logits."""

    def next_token(self, ids: torch.Tensor, logits: torch.Tensor) -> int:
        return 65


@contextlib.contextmanager
def _paper() -> Iterator[Any]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Asked of torch.cuda, which stands in here: there is no device to initialise.
    FakeTensorMode.avoid_device_init = property(lambda self: True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        yield mode


def _runner(mode: Any) -> Any:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from vicostream_kernels.models import qwen2_5_vl
    from vicostream_kernels.models.checkpoint import load_checkpoint

    with unset_fake_temporarily():
        checkpoint = load_checkpoint("tiny-random", device="cpu", dtype=torch.float32, seed=0)
    for module in checkpoint.model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                fake = mode.from_tensor(parameter.data).to("cuda")
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
    make = qwen2_5_vl.vision_grid

    def grid(*sizes: Any) -> Any:
        """Made on the host, where its numbers count."""
        with unset_fake_temporarily():
            made = make(*sizes[:-1], "cpu")
        values = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
        moved = {
            name: mode.from_tensor(value).to("cuda")
            for name, value in values.items()
            if isinstance(value, torch.Tensor)
        }
        return dataclasses.replace(made, **moved)

    qwen2_5_vl.vision_grid = grid
    return qwen2_5_vl.Qwen2_5_VLRunner(checkpoint)


def _stream(runner: Any, preset: str, overrides: dict[str, Any]) -> str:
    """``overrides`` may say where the frames are, which is no setting: "frames": "cuda"."""
    from pipeline_kit import SMALL, pictures

    from vicostream_kernels import methods
    from vicostream_kernels.pipeline.engine import StreamEngine

    _launches.clear(), _faults.clear(), _waits.clear()
    where = overrides.pop("frames", "cpu")
    method = methods.get(preset, {**SMALL, **overrides})
    frames = torch.from_numpy(pictures(method.engine.frames_per_chunk)).to(where)
    with StreamEngine(runner, method) as engine, engine.open(fps=4) as stream:
        stream.ingest(frames)
        with _Watch():
            stream.ingest(frames)
        return "".join(stream.ask("What?", sampler=_Fixed(), max_new_tokens=3))


def main(cases: str, guard: str) -> None:
    ctypes.CDLL(guard)
    _stand_in()
    _record_launches()
    from vicostream_kernels import checks
    from vicostream_kernels.pipeline import answer, reading, stages

    checks.check_apart = lambda op, **tensors: None  # fake tensors are at no address
    # Numbers that the host waits for, as it should.
    stages.HostCount.get = lambda self: self._value if isinstance(self._value, int) else 5
    answer.Answer._account = lambda self: None
    reading.Reading.relevance = lambda self: []
    found = []
    with _paper() as mode:
        runner = _runner(mode)
        for preset, overrides in json.loads(cases):
            made: dict[str, Any] = {}
            try:
                made["answer"] = _stream(runner, preset, overrides)
            except Exception:
                made["error"] = traceback.format_exc(limit=-12)
            found.append(
                made | {"launches": _launches.copy(), "faults": _faults[:], "waits": _waits[:]}
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
