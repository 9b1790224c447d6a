"""nvcc needs no GPU: every CUDA source compiles for the shipped targets without local memory."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
STRICT = ["-Xptxas", "--warn-on-local-memory-usage,--warning-as-error"]
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc (no GPU)")

SPILLING = """
__global__ void spill(float* out, const int* at) {
  float x[64];
  for (int i = 0; i < 64; ++i) x[i] = 0.0f;
  for (int i = 0; i < 99; ++i) x[at[i] & 63] += i;
  for (int i = 0; i < 64; ++i) out[i] = x[i];
}
"""


def compile_strictly(source: Path, arch: str, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["nvcc", "-std=c++17", "-O3", f"-arch={arch}", "-cubin", "-o", str(out), "--keep"]
        + ["--keep-dir", str(out.parent)]
        + [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}", *STRICT, str(source)],
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What nvcc says of a source, which takes it many seconds, and the PTX that it made of it."""

    @cache
    def once(source: Path, arch: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        folder = tmp_path_factory.mktemp(f"{source.stem}-{arch}")
        return compile_strictly(source, arch, folder / "out.cubin"), folder / f"{source.stem}.ptx"

    return once


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_no_kernel_uses_local_memory(compiled, source, arch):
    done, _ = compiled(source, arch)
    assert done.returncode == 0, done.stderr


def test_decode_copies_asynchronously_and_multiplies_on_tensor_cores(compiled):
    _, ptx = compiled(ROOT / "csrc" / "cuda" / "attention.cu", "sm_80")
    kernels = {part.partition("(")[0]: part for part in ptx.read_text().split(".entry ")[1:]}
    split = {name: body for name, body in kernels.items() if "split_kernel" in name}
    assert len(split) == 9, "three element types, three classes of head dims"
    for name, body in split.items():
        assert "cp.async.cg.shared.global" in body, name
        of_type = [kind for kind in ("bf16.bf16", "f16.f16") if f".f32.{kind}.f32" in body]
        floats = "ldmatrix" not in body  # float32: plain multiplications
        assert len(of_type) == (0 if floats else 1), name
    assert sum("ldmatrix" in body for body in split.values()) == 6


def test_the_gate_can_fail(tmp_path):
    source = tmp_path / "spill.cu"
    source.write_text(SPILLING)
    done = compile_strictly(source, "sm_90a", tmp_path / "out.cubin")
    assert done.returncode != 0
    assert "Local memory used" in done.stderr or "local memory" in done.stderr.lower()


def test_the_cuda_sources_are_there():
    assert [p.stem for p in SOURCES], "csrc/cuda holds no kernel"
