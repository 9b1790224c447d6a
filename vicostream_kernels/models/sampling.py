"""The next token: transformers' logits processors, then argmax or one multinomial draw."""

from __future__ import annotations

import copy
import difflib
from typing import Any

import torch

# Fields of GenerationConfig in the order in which transformers applies them, the value that means
# "off" besides None, and the processor's class. A None in place of "off" has no such value.
_PROCESSORS: tuple[tuple[str, Any, str], ...] = (
    ("sequence_bias", None, "SequenceBiasLogitsProcessor"),
    ("repetition_penalty", 1.0, "RepetitionPenaltyLogitsProcessor"),
    ("no_repeat_ngram_size", 0, "NoRepeatNGramLogitsProcessor"),
    ("bad_words_ids", None, "NoBadWordsLogitsProcessor"),
    ("suppress_tokens", None, "SuppressTokensLogitsProcessor"),
)
_WARPERS: tuple[tuple[str, Any, str], ...] = (
    ("temperature", 1.0, "TemperatureLogitsWarper"),
    ("top_h", None, "TopHLogitsWarper"),
    ("top_k", 0, "TopKLogitsWarper"),
    ("top_p", 1.0, "TopPLogitsWarper"),
    ("min_p", None, "MinPLogitsWarper"),
    ("typical_p", 1.0, "TypicalLogitsWarper"),
    ("epsilon_cutoff", 0.0, "EpsilonLogitsWarper"),
    ("eta_cutoff", 0.0, "EtaLogitsWarper"),
)
#: Fields that mean something only where tokens are drawn.
DRAWING = frozenset(name for name, *_ in _WARPERS)
_WHOLE = ("no_repeat_ngram_size", "top_k")
_ON_DEVICE = ("suppress_tokens", "eta_cutoff")

# What would change the answer and is not built here: refused rather than ignored.
_REFUSED: tuple[tuple[str, Any], ...] = (
    ("num_beams", 1),
    ("guidance_scale", 1.0),
    ("min_length", 0),
    ("min_new_tokens", 0),
    ("forced_bos_token_id", None),
    ("forced_eos_token_id", None),
    ("exponential_decay_length_penalty", None),
    ("begin_suppress_tokens", None),
    ("penalty_alpha", None),
    ("dola_layers", None),
    ("watermarking_config", None),
    ("prompt_lookup_num_tokens", None),
)


#: What a sampler takes: other fields of a configuration would do nothing here.
FIELDS = frozenset(name for name, *_ in _PROCESSORS + _WARPERS + _REFUSED) | {
    "do_sample",
    "remove_invalid_values",
    "renormalize_logits",
}
_SEEDS = range(-(1 << 63), 1 << 63)


class Sampler:
    """Picks tokens by a ``GenerationConfig``.

    Args:
        config: a transformers ``GenerationConfig``; fields that are None are off (``generate``
            would put its own defaults there, such as ``top_k=50``).
        seed: of the draws; two samplers of one seed draw the same tokens from the same logits.
        device: where the logits lie.
        overrides: fields of the configuration to change, e.g. ``temperature=0.7``.

    Example::

        from vicostream_kernels.models import Sampler
        drawn = Sampler(engine.runner.generation_config, do_sample=True, temperature=0.7)
        answer = stream.ask("What happened?", sampler=drawn)

    Raises ``ValueError`` for an unknown field (with the nearest name), for a value that
    transformers refuses, and for a feature that single-sequence decoding here does not have.
    """

    def __init__(
        self,
        config: Any,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        **overrides: Any,
    ) -> None:
        if type(seed) is not int or seed not in _SEEDS:
            raise ValueError(f"sampler: seed={seed!r} must be an int of 64 bits")
        config = copy.deepcopy(config)
        for name, value in overrides.items():
            if name not in FIELDS or not hasattr(config, name):
                raise ValueError(unknown(name))
            setattr(config, name, value)
        self.do_sample = bool(config.do_sample)
        self.processors = _processors(config, device)
        self._generator = torch.Generator(device).manual_seed(seed)

    def next_token(self, ids: torch.Tensor, logits: torch.Tensor) -> int:
        """The next token's id. Waits for the device: a token must be known to be shown.

        ``ids`` [n] int64 on the logits' device: the text so far, as the repetition penalty and
        n-gram rules should see it (they alone read it). ``logits`` [V] or [1, V], float32.
        """
        scores = logits.view(1, -1)
        if self.processors:
            scores = self.processors(ids.view(1, -1), scores)
        if not self.do_sample:
            return int(scores.argmax(-1))
        probabilities = torch.softmax(scores, dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def _processors(config: Any, device: torch.device | str) -> Any:
    from transformers.generation import logits_process

    for name, off in _REFUSED:
        value = getattr(config, name, None)
        if value is not None and value != off:
            raise ValueError(
                f"generation_config: {name}={value!r} is not supported, allowed: {off!r}"
            )
    chosen = logits_process.LogitsProcessorList()
    for name, off, kind in _PROCESSORS + (_WARPERS if config.do_sample else ()):
        value = getattr(config, name, None)
        if value is None or (off is not None and value == off):
            continue
        if type(value) is int and name not in _WHOLE:
            value = float(value)  # transformers takes no 2 for 2.0
        extra: dict[str, Any] = {"device": device} if name in _ON_DEVICE else {}
        if name == "bad_words_ids":
            ends = config.eos_token_id
            ends = [ends] if isinstance(ends, int) else ends
            extra["eos_token_id"] = None if ends is None else torch.tensor(ends, device=device)
        chosen.append(getattr(logits_process, kind)(value, **extra))
    if getattr(config, "remove_invalid_values", None):
        chosen.append(logits_process.InfNanRemoveLogitsProcessor())
    if getattr(config, "renormalize_logits", None):
        chosen.append(logits_process.LogitNormalization())
    return chosen


def unknown(name: str) -> str:
    """Why a field is none of a sampler's, with the nearest one that is."""
    if name == "max_new_tokens":
        return (
            "sampler: max_new_tokens is not how tokens are picked: give it to Stream.ask, or "
            "--set engine.max_new_tokens=N"
        )
    known = [field for field, *_ in _PROCESSORS + _WARPERS] + ["do_sample"]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f", did you mean {near[0]!r}?" if near else f", known: {', '.join(known)}"
    return f"sampler: unknown field {name!r}{hint}"
