"""nvcc needs no GPU: every CUDA source compiles for the shipped targets without local memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kit import nvcc

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
    """What nvcc says of a source, or of PTX."""
    return subprocess.run(
        ["nvcc", *nvcc.FLAGS, f"-arch={arch}", "-cubin", "-o", str(out), *STRICT, str(source)],
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("capability", nvcc.TARGETS)
@pytest.mark.parametrize("source", nvcc.SOURCES, ids=lambda p: p.stem)
def test_no_kernel_uses_local_memory(source, capability, tmp_path):
    ptx = nvcc.ptx_of(source, capability)
    done = compile_strictly(ptx, nvcc.TARGETS[capability], tmp_path / "out.cubin")
    assert done.returncode == 0, done.stderr


#: Targets that run what is shipped for another: its binary (8.6, 8.9), or its PTX, assembled anew.
ELSEWHERE = {"sm_86": 80, "sm_89": 80, "sm_100": 90, "sm_120": 90}


@pytest.mark.parametrize("arch", ELSEWHERE)
@pytest.mark.parametrize("source", nvcc.SOURCES, ids=lambda p: p.stem)
def test_other_devices_spill_a_few_words_at_most(source, arch, tmp_path):
    ptx = nvcc.ptx_of(source, ELSEWHERE[arch]).read_text()
    (tmp_path / "a.ptx").write_text(ptx.replace("sm_90a", "sm_90"))  # 90-virtual has no 9.0a
    command = ["ptxas", "-v", f"-arch={arch}", "-o", str(tmp_path / "a.cubin")]
    done = subprocess.run([*command, str(tmp_path / "a.ptx")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", done.stderr)]
    assert spilled and max(spilled) <= 16, done.stderr
    assert max(map(int, re.findall(r"(\d+) bytes smem", done.stderr)), default=0) <= 48 * 1024


def test_decode_copies_asynchronously_and_multiplies_on_tensor_cores():
    ptx = nvcc.ptx_of(nvcc.ROOT / "csrc" / "cuda" / "attention.cu", 80)
    kernels = {part.partition("(")[0]: part for part in ptx.read_text().split(".entry ")[1:]}
    split = {name: body for name, body in kernels.items() if "split_kernel" in name}
    assert len(split) == 15, "three classes of head dims; in 16 bits twice, for whole rows too"
    for name, body in split.items():
        assert "cp.async.cg.shared.global" in body, name
        of_type = [kind for kind in ("bf16.bf16", "f16.f16") if f".f32.{kind}.f32" in body]
        floats = "ldmatrix" not in body  # float32: plain multiplications
        assert len(of_type) == (0 if floats else 1), name
    assert sum("ldmatrix" in body for body in split.values()) == 12


def test_the_gate_can_fail(tmp_path):
    source = tmp_path / "spill.cu"
    source.write_text(SPILLING)
    done = compile_strictly(source, "sm_90a", tmp_path / "out.cubin")
    assert done.returncode != 0
    assert "Local memory used" in done.stderr or "local memory" in done.stderr.lower()


def test_the_cuda_sources_are_there():
    assert [p.stem for p in nvcc.SOURCES], "csrc/cuda holds no kernel"
