"""Finds, checks and loads a checkpoint: unmodified Hugging Face files, safetensors only.

A folder is examined before anything heavy is imported or read, so that what is wrong with it costs
no time and no memory and is said in one line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vicostream_kernels.backends import usable_device
from vicostream_kernels.models import named
from vicostream_kernels.models.errors import (
    DamagedCheckpoint,
    ModelNotFound,
    NoChatTemplate,
    NoTokenizer,
    NoWeights,
    PickleCheckpoint,
    UnsupportedCheckpoint,
)

_MODEL_TYPE = "qwen2_5_vl"
_INDEX = "model.safetensors.index.json"
_PICKLE = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class ImageSettings:
    """What preprocessing has to do for this checkpoint (its processor's configuration)."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint; ``model`` is transformers' module, in eval mode."""

    name: str
    model: Any
    tokenizer: Any
    generation_config: Any
    images: ImageSettings


def load_checkpoint(
    name_or_path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Checkpoint:
    """Loads a named model, a local folder or a repository of the Hugging Face hub.

    ``dtype`` None means float32 on the CPU and the checkpoint's own dtype elsewhere (the random
    models: their configuration's). ``seed`` makes the weights of the ``*-random`` models.

    Raises a ``CheckpointError`` of some kind, whose message is one line, or ``ValueError`` for a
    device that is not here.
    """
    device = usable_device(device)  # before gigabytes are read
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(
            f"dtype={dtype!r}: give torch.float32, torch.bfloat16, torch.float16 or None"
        )
    name = str(name_or_path)
    embedded = named.FOLDERS.get(name)
    if embedded is None and name in named.NAMES:
        return _load_named(name, device, dtype, seed)
    path = embedded or Path(name_or_path).expanduser()
    local = path.exists() or not _looks_like_hub_name(name)
    config = _check_folder(path) if local else _check_hub(name)
    _check_config(config, name)
    source = str(path) if local else name
    tokenizer = load_tokenizer(source, local=local)
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    model = _load_model(source, local, dtype).to(device).eval()
    return Checkpoint(
        name=name,
        model=model,
        tokenizer=tokenizer,
        generation_config=model.generation_config,
        images=_image_settings(source, local),
    )


def _load_named(
    name: str, device: torch.device | str, dtype: torch.dtype | None, seed: int
) -> Checkpoint:
    from transformers import GenerationConfig

    config = named.config(name)
    if dtype is None:
        dtype = getattr(torch, config["torch_dtype"])
    generation = GenerationConfig.from_pretrained(named.HOME, local_files_only=True)
    return Checkpoint(
        name=name,
        model=named.build(config, seed=seed, device=device, dtype=dtype),
        tokenizer=load_tokenizer(str(named.HOME), local=True),
        generation_config=generation,
        images=_image_settings(str(named.HOME), local=True),
    )


def _looks_like_hub_name(name: str) -> bool:
    owner, slash, rest = name.partition("/")
    return bool(owner and rest and slash) and "/" not in rest and owner[0] not in "./~\\"


def _check_folder(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ModelNotFound(
            f"model {str(path)!r}: no such folder, give one of {', '.join(named.NAMES)}, a folder "
            "with a Qwen2.5-VL checkpoint, or a hub name such as Qwen/Qwen2.5-VL-3B-Instruct"
        )
    if not path.is_dir():
        raise ModelNotFound(f"model {str(path)!r} is a file: give the folder that holds it")
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ModelNotFound(f"model folder {str(path)!r} has no config.json")
    _check_weight_files(path)
    return _read_json(config_file)


def _check_weight_files(path: Path) -> None:
    if (path / _INDEX).is_file():
        shards = set(_read_json(path / _INDEX).get("weight_map", {}).values())
        missing = sorted(shard for shard in shards if not (path / shard).is_file())
        if missing:
            raise NoWeights(
                f"model folder {str(path)!r} lacks {len(missing)} of {len(shards)} weight files "
                f"that {_INDEX} names, first {missing[0]}"
            )
        return
    if (path / "model.safetensors").is_file():
        return
    pickles = sorted(file.name for pattern in _PICKLE for file in path.glob(pattern))
    if pickles:
        raise PickleCheckpoint(
            f"model folder {str(path)!r} holds its weights as pickle ({pickles[0]}), which can run "
            "any code when it is opened: refused. Save it as safetensors "
            "(save_pretrained of transformers does) or get the safetensors files"
        )
    raise NoWeights(
        f"model folder {str(path)!r} has no weights: model.safetensors or {_INDEX} with its files "
        "is needed"
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{str(file)!r} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise DamagedCheckpoint(f"{str(file)!r} holds a {type(value).__name__}, not an object")
    return value


def _check_hub(name: str) -> dict[str, Any]:
    config = _hub_file(name, "config.json")
    if config is None:
        raise ModelNotFound(f"hub repository {name!r} has no config.json")
    if _hub_file(name, _INDEX) is None and _hub_file(name, "model.safetensors") is None:
        raise NoWeights(
            f"hub repository {name!r} has no safetensors weights (pickle files are refused: they "
            "can run any code when they are opened)"
        )
    return _read_json(config)


def _hub_file(name: str, file: str) -> Path | None:
    from transformers.utils import cached_file

    try:
        # Not told to ignore missing files: it would ignore a hub that can't be reached as well.
        found = cached_file(name, file)
    except (OSError, ValueError) as error:
        if "does not appear to have" in str(error):
            return None
        raise ModelNotFound(
            f"model {name!r} is no local folder, and the hub gave nothing: {_first_line(error)}"
        ) from error
    return None if found is None else Path(found)


def _check_config(config: dict[str, Any], name: str) -> None:
    kind = config.get("model_type")
    if kind != _MODEL_TYPE:
        raise UnsupportedCheckpoint(
            f"model {name!r} is a {kind!r}, not a {_MODEL_TYPE!r}: only Qwen2.5-VL is supported"
        )
    if config.get("quantization_config"):
        raise UnsupportedCheckpoint(
            f"model {name!r} is quantised ({config['quantization_config'].get('quant_method')}): "
            "only bfloat16, float16 and float32 weights are supported"
        )


def load_tokenizer(source: str, *, local: bool) -> Any:
    """The tokenizer of a folder or repository, with a chat template."""
    from transformers import AutoTokenizer

    if local and not any(
        (Path(source) / file).is_file() for file in ("tokenizer.json", "vocab.json")
    ):
        raise NoTokenizer(f"model folder {source!r} has no tokenizer (tokenizer.json is missing)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise NoTokenizer(
            f"the tokenizer of {source!r} cannot be loaded: {_first_line(error)}"
        ) from error
    if not tokenizer.chat_template:
        tokenizer.chat_template = _processor_template(source, local)
    return tokenizer


def _processor_template(source: str, local: bool) -> str:
    """Older checkpoints keep the template with the processor, not with the tokenizer."""
    file = _optional_file(source, "chat_template.json", local)
    template = None if file is None else _read_json(file).get("chat_template")
    if not template:
        raise NoChatTemplate(
            f"the tokenizer of {source!r} has no chat template (chat_template.jinja is missing): "
            "take an Instruct checkpoint, or copy that file from one"
        )
    return template


def _optional_file(source: str, file: str, local: bool) -> Path | None:
    if not local:
        return _hub_file(source, file)
    path = Path(source) / file
    return path if path.is_file() else None


def _image_settings(source: str, local: bool) -> ImageSettings:
    file = _optional_file(source, "preprocessor_config.json", local)
    if file is not None:
        read = _read_json(file)
    else:
        file = _optional_file(source, "processor_config.json", local)
        read = {} if file is None else _read_json(file).get("image_processor", {})
    default = ImageSettings()
    size = read.get("size") or {}
    return ImageSettings(
        min_pixels=read.get("min_pixels") or size.get("shortest_edge") or default.min_pixels,
        max_pixels=read.get("max_pixels") or size.get("longest_edge") or default.max_pixels,
        mean=tuple(read.get("image_mean") or default.mean),
        std=tuple(read.get("image_std") or default.std),
    )


def _load_model(source: str, local: bool, dtype: torch.dtype | None) -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    try:
        with _quiet(bars=not local):
            model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                source,
                dtype="auto" if dtype is None else dtype,
                use_safetensors=True,
                local_files_only=local,
                output_loading_info=True,
            )
    except Exception as error:  # safetensors and transformers share no base class
        raise DamagedCheckpoint(
            f"the weights of {source!r} cannot be loaded: {_first_line(error)}"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers would go on with random values in their place.
        raise DamagedCheckpoint(
            f"the weights of {source!r} lack {len(missing)} parameters, first {missing[0]}"
        )
    return model


@contextmanager
def _quiet(*, bars: bool) -> Iterator[None]:
    """What is wrong is raised, once: transformers' own report of it and its progress bars (useful
    for downloads only) stay off the terminal."""
    from transformers.utils import logging

    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
