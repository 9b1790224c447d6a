"""Where a measurement was taken: what a row needs to be understood a year later."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import vicostream_kernels


def collect(device: torch.device, tree: Path | None = None) -> dict[str, Any]:
    """Plain data about this machine and build, for the head of a results file.

    ``tree`` is the checkout that was built, where the package is not imported from it.
    """
    commit, dirty = commit_of_tree(tree)
    return {
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "package": _version("vicostream-kernels"),
        "commit": commit,
        "dirty": dirty,
        "device": device.type,
        "device_name": device_name(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_1m": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "driver": _driver() if device.type == "cuda" else None,
        "platform": platform.platform(),
    }


def busy(facts: dict[str, Any]) -> str:
    """A warning when other work held the cores as the run began, else ""."""
    load, cores = facts.get("load_1m") or 0.0, facts.get("cores") or 1
    if load <= 0.75 * cores:
        return ""
    return f"this machine was busy (load {load:g} on {cores} cores): do not quote these CPU times"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """``NVIDIA H200`` -> ``h200``: the part of a device name that goes into a file name."""
    name = re.sub(r"^(nvidia|amd|intel(\(r\))?)\s+", "", name.strip().lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "unknown"


def commit_of_tree(tree: Path | None = None) -> tuple[str | None, bool | None]:
    """The commit that a source tree is at, and whether tracked files differ.

    The tree is the one that the package was imported from, unless another is given.

    ``VICO_COMMIT`` (as ``abc123`` or ``abc123-dirty``) stands in where the tree was copied without
    its history. None, None for an installed wheel.
    """
    given = os.environ.get("VICO_COMMIT", "")
    if given:
        return given.removesuffix("-dirty"), given.endswith("-dirty")
    tree = tree or Path(vicostream_kernels.__file__).resolve().parent.parent
    if not (tree / ".git").exists():
        return None, None
    commit = _git(tree, "rev-parse", "HEAD")
    status = _git(tree, "status", "--porcelain", "--untracked-files=no")
    return commit, None if status is None else bool(status)


def _git(tree: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(tree), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _driver() -> str | None:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        return None
