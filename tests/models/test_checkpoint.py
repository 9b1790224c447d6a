"""Loading: what a folder may look like, and what is refused, each in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from model_kit import save_checkpoint, small_model

from vicostream_kernels.models import CheckpointError, load_model, named
from vicostream_kernels.models import errors as e
from vicostream_kernels.models.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("saved"), small_model(3))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint to break: hard links, so that removing and replacing is cheap."""
    for file in saved.iterdir():
        os.link(file, tmp_path / file.name)
    return tmp_path


def replace(file: Path, content: bytes | str) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def edit(file: Path, **changes) -> None:
    replace(file, json.dumps({**json.loads(file.read_text()), **changes}))


def refused(kind: type[CheckpointError], source: Path | str) -> str:
    with pytest.raises(kind) as caught:
        load_checkpoint(source)
    message = str(caught.value)
    assert "\n" not in message and str(source) in message, message
    return message


def test_a_saved_checkpoint_loads_with_its_settings(folder: Path) -> None:
    edit(folder / "preprocessor_config.json", min_pixels=1234, image_mean=[0.1, 0.2, 0.3])
    edit(folder / "generation_config.json", eos_token_id=[7, 8])
    runner = load_model(folder)
    assert (runner.min_pixels, runner.max_pixels) == (1234, 12845056)
    assert runner.image_mean == (0.1, 0.2, 0.3)
    assert runner.eos_ids == (7, 8)
    assert (runner.layers, runner.heads, runner.kv_heads, runner.head_dim) == (4, 4, 2, 32)
    assert runner.mrope_section == (8, 4, 4) and runner.inv_freq.dtype == torch.float32
    assert runner.dtype == torch.float32
    assert not any(p.requires_grad and p.grad is not None for p in runner.model.parameters())


def test_dtype_and_name_of_a_bfloat16_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, small_model(3).to(torch.bfloat16))
    assert load_model(tmp_path).dtype == torch.float32
    runner = load_model(tmp_path, dtype=torch.bfloat16)
    assert runner.dtype == torch.bfloat16
    hidden = torch.zeros(2, runner.hidden_size, dtype=torch.bfloat16)
    assert runner.logits(hidden).dtype == torch.float32


def test_image_settings_of_newer_and_of_missing_processors(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    defaults = load_checkpoint(folder).images
    assert (defaults.min_pixels, defaults.max_pixels) == (3136, 1003520)
    nested = {"image_processor": {"size": {"shortest_edge": 100, "longest_edge": 200}}}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    newer = load_checkpoint(folder).images
    assert (newer.min_pixels, newer.max_pixels) == (100, 200)


def test_missing_folder_names_what_would_serve(tmp_path: Path) -> None:
    assert "tiny-random" in refused(e.ModelNotFound, tmp_path / "nothing")


def test_a_device_or_backend_that_is_not_there_is_named_before_weights_are_read() -> None:
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"device='{device}'"):
            load_checkpoint("tiny-random", device=device)
    with pytest.raises(ValueError, match="backend='cudaa' is not one of 'auto'"):
        load_model("tiny-random", backend="cudaa")


def test_a_plain_wrong_name_is_not_looked_up_in_the_hub() -> None:
    assert "tiny-random" in refused(e.ModelNotFound, "tiny-rando")


def test_a_file_is_not_a_folder(folder: Path) -> None:
    refused(e.ModelNotFound, folder / "model.safetensors")


def test_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(e.ModelNotFound, folder)


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in refused(e.NoWeights, folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickle_only_is_refused_and_never_opened(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    message = refused(e.PickleCheckpoint, folder)
    assert name in message and "safetensors" in message


def test_pickle_beside_safetensors_is_ignored(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert load_checkpoint(folder).model is not None


def test_missing_shard(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, small_model(3), max_shard_size="2MB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refused(e.NoWeights, tmp_path)


def test_truncated_weights(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    replace(folder / "model.safetensors", whole[: len(whole) // 2])
    refused(e.DamagedCheckpoint, folder)


def test_missing_parameters_are_not_made_up(folder: Path, capfd) -> None:
    """transformers would print a table and go on with random values."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if "layers.2.self_attn.k_proj" in name)
    del weights[gone]
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    capfd.readouterr()
    assert "layers.2.self_attn.k_proj" in refused(e.DamagedCheckpoint, folder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", ["{", "[]", b"\xff\xfe"])
def test_unreadable_config(folder: Path, content: bytes | str) -> None:
    replace(folder / "config.json", content)
    with pytest.raises(e.DamagedCheckpoint, match="config.json"):
        load_checkpoint(folder)


@pytest.mark.parametrize("change", [{"model_type": "llama"}, {"model_type": None}])
def test_another_architecture(folder: Path, change: dict) -> None:
    edit(folder / "config.json", **change)
    assert "Qwen2.5-VL" in refused(e.UnsupportedCheckpoint, folder)


def test_quantised_weights(folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "awq"})
    assert "awq" in refused(e.UnsupportedCheckpoint, folder)


def test_other_rotary_embeddings_are_not_computed_wrongly(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    rope = {**config["text_config"]["rope_parameters"], "rope_type": "linear", "factor": 2.0}
    edit(folder / "config.json", text_config={**config["text_config"], "rope_parameters": rope})
    with pytest.raises(e.UnsupportedCheckpoint, match="linear"):
        load_model(folder)


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused(e.NoTokenizer, folder)


def test_damaged_tokenizer(folder: Path) -> None:
    replace(folder / "tokenizer.json", "{}")
    refused(e.NoTokenizer, folder)


def test_no_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    assert "chat_template" in refused(e.NoChatTemplate, folder)


def test_chat_template_kept_with_the_processor(folder: Path) -> None:
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_model(folder).system_ids() == load_model("tiny-random").system_ids()


@pytest.mark.parametrize(
    "template", ["{{ messages[0].content[1].text }}", "{{ messages[0].nothing.here }}", "text"]
)
def test_chat_template_with_no_place_for_a_video(folder: Path, template: str) -> None:
    replace(folder / "chat_template.jinja", template)
    with pytest.raises(e.NoChatTemplate, match="template"):
        load_model(folder)


def test_hub_name_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refused(e.ModelNotFound, "nobody/no-such-model")
    assert "the hub gave nothing: We couldn't connect" in message


def test_named_models_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_):
        raise AssertionError("network used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert load_model("tiny-random").name in named.NAMES
