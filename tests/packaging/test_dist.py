"""The wheel and the sdist hold what git holds, and work from an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.packaging
ROOT = Path(__file__).resolve().parents[2]
#: Where the folders of the checkout land in the installed package.
PLACES = {
    "bench/": "vicostream_kernels/bench/",
    "triton_kernels/": "vicostream_kernels/triton_kernels/",
}


def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("needs the git checkout")
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]


def build(kind: str, source: Path, out: Path, **env: str) -> Path:
    done = subprocess.run(
        [sys.executable, "-m", "build", f"--{kind}", "--outdir", str(out), str(source)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (made,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="data")
    (folder,) = out.iterdir()
    return folder


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory) -> Path:
    """Built from the sdist, in a build environment without torch, without CUDA."""
    return build("wheel", unpacked, tmp_path_factory.mktemp("wheel"), VICO_CUDA="0")


def test_the_sdist_holds_every_tracked_source(sdist):
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    hidden = {name for name in tracked() if name.startswith((".", "bench/results/"))}
    allowed = hidden - {".clang-format", ".pre-commit-config.yaml"}
    assert set(tracked()) - held == allowed
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


def test_the_wheel_holds_every_tracked_module_and_data_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = set()
    for name in tracked():
        for place, target in PLACES.items():
            if name.startswith(place) and name.endswith(".py"):
                wanted.add(target + name.removeprefix(place))
        if name.startswith("vicostream_kernels/"):
            wanted.add(name)
    native = {name for name in held if name.startswith("vicostream_kernels/_C.")}
    assert len(native) == 1
    assert held - native == wanted
    assert not [name for name in held if name.startswith("triton_kernels/")]


PROGRAM = """
import torch, vicostream_kernels as vk
from vicostream_kernels import backends
import vicostream_kernels.bench
assert "site" in vk.__file__, vk.__file__
kv = torch.zeros(2, 4, 1, 16)
out = vk.rope_append(torch.ones(3, 2, 16), torch.ones(3, 1, 16), torch.ones(3, 1, 16),
    torch.zeros(3, 3, dtype=torch.int32), torch.ones(8), None, kv, kv.clone(),
    torch.arange(3, dtype=torch.int32), backend="cpu")
assert torch.equal(out, torch.ones(3, 2, 16)), out
print(backends.native()[0].has_cuda)
"""


def check_installed(wheel: Path, folder: Path) -> str:
    site = folder / "site"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            str(site),
            str(wheel),
        ],
        check=True,
        capture_output=True,
    )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_wheel_works_from_an_empty_folder(wheel, tmp_path):
    assert check_installed(wheel, tmp_path) == "False"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc (no GPU)")
def test_a_strict_cuda_build_imports_without_a_driver(unpacked, tmp_path):
    made = build("wheel", unpacked, tmp_path / "wheel", VICO_CUDA="1", VICO_STRICT="1")
    assert check_installed(made, tmp_path) == "True"


def test_asking_for_cuda_without_nvcc_says_so(unpacked, tmp_path):
    clean = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDA_PATH", "CUDA_HOME")}
    keep = [p for p in clean["PATH"].split(":") if not (Path(p) / "nvcc").exists()]
    if not shutil.which("c++", path=":".join(keep)) or Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("nvcc can't be hidden on this machine")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(unpacked)],
        env={**clean, "PATH": ":".join(keep), "VICO_CUDA": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "VICO_CUDA=1 asks for CUDA, but no nvcc was found" in done.stdout + done.stderr
