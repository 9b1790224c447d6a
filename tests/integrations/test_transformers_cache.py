"""SinkWindowCache as transformers' Cache: its sizes, its bounds, and what it refuses."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GenerationConfig
from transformers_kit import at, generate, prompt, tiny, tiny_vl

from vicostream_kernels.integrations.transformers import SinkWindowCache, register

register()

STEP = torch.tensor([[7]])


class Recorder(TorchDispatchMode):
    """Names of the ops that run, and of new tensors as large as a pool of pages."""

    def __init__(self, pool: int) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.large: set[str] = set()
        self.pool = pool

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.names.add(name)
        aliases = any(r.alias_info is not None for r in func._schema.returns)
        if isinstance(out, torch.Tensor) and not aliases and out.numel() >= self.pool:
            self.large.add(name)
        return out


def test_no_host_sync_no_copy_and_no_growth() -> None:
    model = tiny("llama", vocab_size=16)  # the pools are the largest tensors
    cache = SinkWindowCache(4, 512, 16, chunk_tokens=8)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    model(torch.ones_like(mask), attention_mask=mask, **at(cache))
    pools = [(x.k_pages.data_ptr(), x.v_pages.data_ptr()) for x in cache.layers]
    pool = cache.layers[0].k_pages.numel()
    assert cache.layers[0].k_pages.shape == (2 * (1 + 33), 16, 2, 16)
    for length in (8, 1, 1, 640, 1, 8):
        step = torch.ones(2, length, dtype=torch.long)
        with Recorder(pool) as seen:
            model.model(step, **at(cache))
        assert "rope_append" in seen.names and "sink_window_attention" in seen.names
        assert not seen.names & {"_local_scalar_dense", "nonzero", "masked_select", "item"}
        if length <= 8:
            assert not seen.large
    assert [(x.k_pages.data_ptr(), x.v_pages.data_ptr()) for x in cache.layers] == pools
    assert cache.get_seq_length() == 8 + 8 + 1 + 1 + 640 + 1 + 8


def test_padding_masks_need_no_host_sync() -> None:
    model = tiny("llama")
    cache = SinkWindowCache(4, 16, 4, chunk_tokens=8)
    ids, mask = prompt(2, 30, padding=(3, 12))
    with Recorder(1 << 40) as seen:
        model.model(ids, attention_mask=mask, **at(cache), position_ids=mask.cumsum(1))
    assert not seen.names & {"_local_scalar_dense", "nonzero", "masked_select", "item"}


def test_keys_stand_in_the_pages_bit_for_bit() -> None:
    model = tiny("qwen2")
    ids, _ = prompt(1, 11)
    theirs = DynamicCache()
    model.set_attn_implementation("sdpa")
    model(ids, **at(theirs))
    model.set_attn_implementation("vicostream")
    ours = SinkWindowCache(3, 16, 4)
    model(ids, **at(ours))
    for name, expected in (
        ("k_pages", theirs.layers[0].keys),
        ("v_pages", theirs.layers[0].values),
    ):
        pages = getattr(ours.layers[0], name).flatten(0, 1)
        assert torch.equal(pages[:3], expected[0, :, :3].transpose(0, 1))
        assert torch.equal(pages[4:12], expected[0, :, 3:].transpose(0, 1))


def test_sizes_and_flags() -> None:
    model = tiny("llama")
    cache = SinkWindowCache(4, 8)
    assert cache.get_seq_length() == 0 and cache.get_mask_sizes(5, 0) == (5, -1)
    assert not cache.is_initialized and not cache.is_compileable
    for _ in range(3):
        model(prompt(2, 5)[0], **at(cache))
    assert cache.get_seq_length() == 15 and cache.get_seq_length(1) == 15
    assert cache.get_mask_sizes(1, 0) == (1, -16)  # below zero: no other cache's mask
    assert cache.get_query_offset(0) == 15
    assert cache.get_max_length() == cache.get_max_length(0) == -1
    assert cache.is_sliding == [False, False] and len(cache) == 2
    assert not cache.is_compileable and not cache.is_croppable
    assert cache.is_initialized and cache.batch_size == 2


def test_reset_keeps_the_memory_and_forgets_the_tokens() -> None:
    model = tiny("llama")
    ids, mask = prompt(2, 30, padding=(0, 4))
    cache = SinkWindowCache(3, 9, 4)
    first = generate(model, ids, mask, cache=cache)
    pools = [x.k_pages.data_ptr() for x in cache.layers]
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, ids, mask, cache=cache), first)
    assert [x.k_pages.data_ptr() for x in cache.layers] == pools
    cache.reset()  # another batch needs other pools
    assert torch.equal(generate(model, ids[:1], mask[:1], cache=cache)[0], first[0])


def test_a_copy_goes_its_own_way() -> None:
    model = tiny("llama")
    system, _ = prompt(1, 20)
    for with_model in (None, model):
        cache = SinkWindowCache(3, 9, 4, model=with_model)
        model(system, **at(cache))
        fork = deepcopy(cache)
        expected = model(STEP, **at(fork)).logits
        model(prompt(1, 30, seed=4)[0], **at(fork))
        assert torch.equal(model(STEP, **at(cache)).logits, expected)


def test_inference_mode_and_no_grad_may_alternate() -> None:
    model = tiny("llama")
    cache, expected = SinkWindowCache(2, 6, 4), SinkWindowCache(2, 6, 4)
    for turn in range(4):
        step = prompt(2, 3, seed=turn)[0]
        with torch.inference_mode(turn % 2 == 0):
            got = model(step, **at(cache)).logits
            cache.reorder_cache(torch.tensor([0, 1]))
        want = model(step, **at(expected)).logits
        assert torch.equal(got, want)
    with torch.inference_mode():
        cache.reset()
    model(step, **at(cache))


def test_streams_can_be_chosen_and_repeated() -> None:
    model = tiny("llama")
    ids, mask = prompt(3, 25, padding=(0, 3, 9))
    cache = SinkWindowCache(3, 8, 4)
    steps = torch.tensor([[5], [6], [7]])
    model(ids, attention_mask=mask, **at(cache))
    apart = deepcopy(cache)
    expected = model(steps, **at(apart)).logits
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    order = torch.tensor([2, 2, 0, 0])
    got = model(steps[order], **at(cache)).logits
    torch.testing.assert_close(got, expected[order], rtol=1e-4, atol=1e-4)


def test_a_forward_that_stopped_midway_is_noticed() -> None:
    model = tiny("llama")
    cache = SinkWindowCache(2, 8)
    stop = model.model.layers[1].self_attn.register_forward_pre_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(STEP, **at(cache))
    stop.remove()
    with pytest.raises(RuntimeError, match="stopped midway"):
        model(STEP, **at(cache))
    cache.reset()
    got = model(STEP, **at(cache)).logits
    assert torch.equal(got, model(STEP, **at(SinkWindowCache(2, 8))).logits)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"sink_tokens": -1}, "sink_tokens"),
        ({"window": 0}, "window"),
        ({"window": 2.5}, "window"),
        ({"page_size": 0}, "page_size"),
        ({"page_size": 257}, "page_size"),
        ({"window": 8, "chunk_tokens": 9}, "chunk_tokens"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"model": "llama"}, "model"),
        ({"model": torch.nn.Linear(2, 2)}, "rotary_emb"),
    ],
)
def test_bad_arguments(arguments: dict, says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        SinkWindowCache(**arguments)


def test_an_old_transformers_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(transformers, "__version__", "5.8.1")
    with pytest.raises(ImportError, match=r"needs transformers 5\.17 or newer, found 5\.8\.1"):
        register()


@pytest.mark.parametrize("impl", ["eager", "sdpa"])
def test_another_attention_is_refused(impl: str) -> None:
    model = tiny("llama")
    model.set_attn_implementation(impl)
    ids, mask = prompt(2, 9, padding=(0, 3))
    for given in (None, mask):
        with pytest.raises(TypeError, match="attn_implementation='vicostream' only"):
            model(ids, attention_mask=given, **at(SinkWindowCache()))


def test_crop_and_assisted_generation_are_refused() -> None:
    model = tiny("llama")
    ids, mask = prompt(1, 9)
    cache = SinkWindowCache()
    with pytest.raises(ValueError, match="can't be cropped"):
        cache.crop(-1)
    # Since 5.24 transformers asks before it tries, in words of its own.
    with pytest.raises(ValueError, match="be cropped"):
        generate(model, ids, mask, cache=cache, assistant_model=tiny("llama", "sdpa"))


def test_what_attention_can_not_do_is_refused() -> None:
    ids, _ = prompt(1, 6)

    def run(model=None, **kwargs):
        return (model or tiny("llama"))(ids, **at(SinkWindowCache()), **kwargs)

    with pytest.raises(ValueError, match="no backward"):
        run(tiny("llama").requires_grad_(True))
    with pytest.raises(ValueError, match="dropout must be 0, got 0.25"):
        run(tiny("llama", attention_dropout=0.25).train())
    with pytest.raises(ValueError, match="output_attentions"):
        run(output_attentions=True)
    with pytest.raises(ValueError, match="must be 2D"):
        run(attention_mask=torch.zeros(1, 1, 6, 6))
    with pytest.raises(ValueError, match=r"attention_mask has shape \[1, 5\], allowed: \[1, 6\]"):
        run(attention_mask=torch.ones(1, 5))
    with pytest.raises(ValueError, match="causal"):
        run(is_causal=False)
    with pytest.raises(ValueError, match="softcap"):
        run(softcap=30.0)
    with pytest.raises(ValueError, match="softcap"):  # and without our cache
        tiny("llama")(ids, softcap=30.0)
    with pytest.raises(ValueError, match="sliding window"):
        run(tiny("mistral", sliding_window=4))
    with pytest.raises(ValueError, match="head dim 12"):
        run(tiny("llama", head_dim=12))
    with pytest.raises(ValueError, match="must be the model that runs"):
        tiny("qwen2")(ids, **at(SinkWindowCache(model=tiny("llama"))))
    model = tiny("llama")
    cache = SinkWindowCache(model=model)
    model(ids, **at(cache))
    cache.reset()
    with pytest.raises(ValueError, match="must be the model that runs"):  # old ids don't count
        tiny("qwen2")(ids, **at(cache))


def test_a_batch_of_another_size_is_refused() -> None:
    model = tiny("llama")
    cache = SinkWindowCache()
    model(prompt(2, 3)[0], **at(cache))
    with pytest.raises(ValueError, match="holds 2 streams, got a batch of 3"):
        model(prompt(3, 3)[0], **at(cache))
    ids, mask = prompt(3, 3)
    with pytest.raises(ValueError, match=r"allowed: \[3, 6\].* or reset\(\) the cache"):
        model(ids, attention_mask=mask, **at(cache))


def test_rotations_that_are_not_known_are_refused_while_sinks_need_them() -> None:
    ids, _ = prompt(1, 6)
    dynamic = tiny(
        "llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    )
    with pytest.raises(ValueError, match="rope_type 'dynamic'"):
        dynamic(ids, **at(SinkWindowCache(4, 8)))
    with pytest.raises(ValueError, match="make the cache with model="):
        tiny_vl()(ids, **at(SinkWindowCache(4, 8)))
    other = tiny("llama")
    other.config.model_type = "unheard_of"
    with pytest.raises(ValueError, match="'unheard_of' was not checked, allowed: llama"):
        other(ids, **at(SinkWindowCache(4, 8)))
    for model in (dynamic, tiny_vl(), other):  # nothing moves without sinks
        model(ids, **at(SinkWindowCache(0, 8)))


def test_the_registered_name_survives_a_saved_config(tmp_path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="vicostream")
    ids, mask = prompt(1, 20)
    config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
    got = again.generate(
        ids, attention_mask=mask, **at(SinkWindowCache(2, 6)), generation_config=config
    )
    expected = generate(model, ids, mask, cache=SinkWindowCache(2, 6), new=5)
    assert torch.equal(got[:, 20:], expected)
