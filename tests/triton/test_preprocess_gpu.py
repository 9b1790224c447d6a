"""What only a device can show of the Triton kernels of preprocess."""

from __future__ import annotations

import pytest
import torch

from kit import interpreter
from kit.compare import assert_same_bits
from vicostream_kernels import preprocess_frames

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(interpreter.ACTIVE, reason="in the interpreter nothing runs on a device"),
]
NORM = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
SIZE = {"min_pixels": 252 * 420, "max_pixels": 252 * 420}


def patches(frames, dtype=torch.float32):
    return preprocess_frames(frames, **SIZE, **NORM, dtype=dtype, backend="triton")[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_graph_replays_on_new_frames(dtype):
    frames = torch.randint(0, 256, (8, 360, 640, 3), device="cuda").byte()
    patches(frames, dtype)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = patches(frames, dtype)
    frames.copy_(torch.randint(0, 256, frames.shape, device="cuda"))
    graph.replay()
    assert_same_bits(replayed, patches(frames, dtype))


def test_addresses_do_not_wrap_at_32_bits():
    far = torch.zeros(2**31 + 2**24, dtype=torch.uint8, device="cuda")
    frames = far.as_strided((2, 252, 420, 3), (2**31 + 5, 420 * 3, 3, 1))
    frames.copy_(torch.randint(0, 256, frames.shape, device="cuda"))
    assert_same_bits(patches(frames), patches(frames.contiguous()))
