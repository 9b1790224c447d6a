"""The CUDA kernels on the CPU: `csrc/cuda` compiled over `tests/emulator`, in a process of its own.

`run` starts pytest with VICO_EMULATE=1; there this module is a plugin under which the cuda backend
takes CPU tensors. The kernels, their bindings and `vicostream_kernels.native` are what ships; only
the CUDA runtime and the header of named instructions are others.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from kit import interpreter
from vicostream_kernels import backends

ROOT = Path(__file__).resolve().parents[2]
ACTIVE = os.environ.get("VICO_EMULATE", "0") == "1"
#: Settles the order in which threads run and copies arrive.
SEED = int(os.environ.get("VICO_EMULATE_SEED", "1"))
#: Whether the kernels' accesses to shared memory are watched for races.
WATCHED = os.environ.get("VICO_EMULATE_RACES", "0") == "1"
#: For the kernels alone: the emulator holds the functions that this makes them call.
WATCH = ("-fsanitize=thread",)
_WORDS = ("append", "attention", "retrieve")
_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-w", "-DVICO_WITH_CUDA")


def missing() -> str | None:
    """Why the emulator can't be built here, or None."""
    if shutil.which("g++") is None:
        return "needs g++"
    if importlib.util.find_spec("pybind11") is None:
        return "needs pybind11"
    return None


def run(
    targets: Sequence[str], *options: str, seed: int = 1, watched: bool = False
) -> interpreter.Run:
    """Runs the tests at ``targets`` with the emulated cuda backend."""
    build(watched)
    mode = {"VICO_EMULATE": "1", "VICO_EMULATE_SEED": str(seed)}
    mode["VICO_EMULATE_RACES"] = str(int(watched))
    return interpreter.run(targets, "-p", "kit.emulation", *options, mode=mode)


def _sources() -> list[Path]:
    return [
        *sorted((ROOT / "csrc" / "cuda").glob("*.cu")),
        ROOT / "tests/emulator/emulator.cpp",
    ] + [
        *(ROOT / "bindings" / f"{word}.cpp" for word in _WORDS),
        ROOT / "tests/emulator/module.cpp",
    ]


@cache
def build(watched: bool = False) -> Path:
    """The emulated module; what has not changed since the last time is not compiled again."""
    import pybind11

    folders = ("csrc", "bindings", "tests/emulator")
    headers = sorted(p for folder in folders for p in (ROOT / folder).rglob("*.h"))
    digest = hashlib.sha256(sys.version.encode())
    for path in headers:
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    folder = ROOT / "build" / ("emulator-watched" if watched else "emulator")
    folder.mkdir(parents=True, exist_ok=True)
    include = [ROOT / "tests/emulator", ROOT / "csrc", ROOT / "csrc/include", ROOT / "bindings"]
    include += [Path(pybind11.get_include()), Path(sysconfig.get_paths()["include"])]
    # Another namespace, so that both modules can be loaded: types have the names of the real ones.
    common = ["g++", *_FLAGS, "-Dvico=vico_emulated", *(f"-I{each}" for each in include)]

    def compile_one(source: Path) -> Path:
        name = f"{source.parent.name}-{source.stem}"
        own = digest.copy()
        own.update(source.read_bytes())
        out = folder / f"{name}-{own.hexdigest()[:16]}.o"
        if not out.exists():
            level = "-O0" if source.parent.name == "bindings" else "-O1"
            watch = WATCH if watched and source.suffix == ".cu" else ()
            new = f"{out}.{os.getpid()}"
            _must([*common, level, *watch, "-c", "-x", "c++", str(source), "-o", new])
            for old in folder.glob(f"{name}-*.o"):
                old.unlink(missing_ok=True)
            os.replace(new, out)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, _sources()))
    made = folder / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not made.exists() or any(made.stat().st_mtime < o.stat().st_mtime for o in objects):
        # The bindings name the CPU kernels too; nobody calls them here.
        link = ["g++", "-shared", "-Wl,-z,lazy", "-Wl,--unresolved-symbols=ignore-all"]
        _must([*link, *map(str, objects), "-o", f"{made}.{os.getpid()}"])
        os.replace(f"{made}.{os.getpid()}", made)
    return made


def _must(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


@cache
def module() -> ModuleType:
    """The emulated module, loaded without resolving what it does not call."""
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        spec = importlib.util.spec_from_file_location("_emulated", build(WATCHED))
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
    finally:
        sys.setdlopenflags(flags)
    made.set_seed(SEED)
    return made


@contextmanager
def _no_stream(device: torch.device) -> Iterator[int]:
    yield 0


@cache
def emulated(function: Callable[..., Any]) -> Callable[..., Any]:
    """A native cuda function over the emulated module."""
    home = sys.modules[function.__module__]
    changed = {"native": lambda: (module(), None), "current_stream": _no_stream}
    for name, value in vars(home).items():
        if hasattr(value, "cache_info") and name != "native":  # layouts are of one module only
            changed[name] = lru_cache(maxsize=None)(value.__wrapped__)

    def call(*args: Any, **kwargs: Any) -> Any:
        kept = {name: getattr(home, name) for name in changed if hasattr(home, name)}
        try:
            for name in kept:
                setattr(home, name, changed[name])
            return function(*args, **kwargs)
        finally:
            for name, value in kept.items():
                setattr(home, name, value)

    return call


def pytest_configure() -> None:
    """In that process: the cuda backend is there and takes CPU tensors."""
    if not ACTIVE:
        return
    missing, load = backends.missing, backends._load

    def missing_here(backend: str, device_type: str, dtype: Any = None) -> str | None:
        return None if backend == "cuda" else missing(backend, device_type, dtype)

    def load_here(op_name: str, backend: str) -> Callable[..., Any]:
        function = load(op_name, backend)
        return emulated(function) if backend == "cuda" else function

    backends.missing, backends._load = missing_here, load_here
