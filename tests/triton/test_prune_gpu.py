"""What only a device can show of the Triton kernels of prune."""

from __future__ import annotations

import pytest
import torch

from kit import interpreter
from kit.compare import assert_same_bits
from vicostream_kernels import PruneRule, PruneState, prune_tokens

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(interpreter.ACTIVE, reason="in the interpreter nothing runs on a device"),
]
RULES = {
    "chunk-intra": PruneRule(threshold=0.25, reduce="any", always_keep="first"),
    "last-kept": PruneRule(reference="last_kept", threshold=0.5),
    "stc": PruneRule(
        reference=("running_mean", "frame_mean"), metric="gaussian", ratio=0.25, channels=0.5,
        history="chunk",
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_captured_graph_replays_on_new_data(rule, dtype):
    """Chunk after chunk through one graph gives the bits of eager calls, state and all."""
    torch.manual_seed(0)
    random = torch.Generator(device="cuda").manual_seed(0)
    x = torch.randn(4, 135, 2048, generator=random, dtype=dtype, device="cuda")
    positions = torch.arange(3 * 540, dtype=torch.int32, device="cuda").view(3, 4, 135)
    state, wanted_state, spare = (
        PruneState.empty(rule, 135, 2048, dtype=dtype, device="cuda") for _ in range(3)
    )
    prune_tokens(x, positions, rule, state=spare, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = prune_tokens(x, positions, rule, state=state, backend="triton")
    for _ in range(3):
        x.copy_(x + torch.randn(x.shape, generator=random, device="cuda"))
        graph.replay()
        wanted = prune_tokens(x, positions, rule, state=wanted_state, backend="triton")
        for got, want in zip(replayed, wanted):
            assert_same_bits(got, want)
        for name in ("steps", "previous", "last_kept", "mean", "mean_count"):
            got, want = getattr(state, name), getattr(wanted_state, name)
            assert (got is None) == (want is None)
            if got is not None:
                assert_same_bits(got, want, name=name)


def test_large_and_small_calls_have_the_same_bits():
    """Many chunks take all steps in one program, a single one a program for each step."""
    rule = PruneRule(threshold=0.25)
    x = torch.randn(32, 135, 2048, dtype=torch.bfloat16, device="cuda")
    x[1:] += x[:-1].clone()
    positions = torch.zeros(3, 32, 135, dtype=torch.int32, device="cuda")
    shapes = ((4, 135),) * 8
    packed = prune_tokens(
        x.flatten(0, 1), positions.flatten(1), rule, shapes=shapes, backend="triton"
    )
    for s in range(8):
        part = slice(4 * s, 4 * s + 4)
        alone = prune_tokens(x[part], positions[:, part], rule, backend="triton")
        assert_same_bits(alone.mask.flatten(), packed.mask[540 * s : 540 * (s + 1)])


def test_chunks_of_different_shapes_can_be_captured_at_once():
    """Their table is made inside the graph, which needs no call before it."""
    rule = PruneRule(threshold=0.25)
    shapes = ((4, 135), (2, 60), (3, 135))
    x = torch.randn(540 + 120 + 405, 256, dtype=torch.bfloat16, device="cuda")
    positions = torch.zeros(3, len(x), dtype=torch.int32, device="cuda")

    def run():
        return prune_tokens(x, positions, rule, shapes=shapes, backend="triton")

    graph = torch.cuda.CUDAGraph()
    run()  # compiles
    with torch.cuda.graph(graph):
        replayed = run()
    x.copy_(torch.randn(x.shape, device="cuda"))
    graph.replay()
    for got, wanted in zip(replayed, run()):
        assert_same_bits(got, wanted)
