"""Turning answers into scores: rules of published benchmarks, option letters, intervals."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

#: Two-sided 95 % of the normal distribution.
_Z95 = 1.959963984540054
_SAID = re.compile(
    r"\b(?:answer|option|choice)\b(?:\s+is)?\s*:?\s*\(?([A-Za-z])\b\)?", re.IGNORECASE
)


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share; (0, 1) where nothing was asked."""
    if not 0 <= right <= total:
        raise ValueError(f"wilson: right={right} must lie between 0 and total={total}")
    if not total:
        return 0.0, 1.0
    share, z2 = right / total, _Z95**2
    middle = share + z2 / (2 * total)
    reach = _Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    low, high = (middle - reach) / (1 + z2 / total), (middle + reach) / (1 + z2 / total)
    # Exact at the ends, where the formula leaves a rounding error.
    return (0.0 if right == 0 else low), (1.0 if right == total else high)


def best_constant(truths: Iterable[str]) -> tuple[str, float]:
    """The answer that would be right most often if it were always given, and how often; ties go to
    the first in alphabetical order."""
    counts = Counter(truths)
    if not counts:
        return "", 0.0
    answer = min(counts, key=lambda text: (-counts[text], text))
    return answer, counts[answer] / counts.total()


def option_letter(text: str, options: Sequence[str] = ()) -> str | None:
    """The letter of the option that an answer names, None where it names none or several.

    Tried in turn: a letter at the start (``B``, ``(b)``, ``B. ...``), "answer is B", the only
    capital letter that stands alone, an option's own text. ``options`` limit the letters (none:
    A to Z) and may carry their letters (``"A. a cat"``).
    """
    last = chr(ord("A") + len(options) - 1) if options else "Z"
    text = text.strip().strip("*\"'` ")
    start = re.match(r"\(?([A-Za-z])(?:[).:,\s]|$)", text)
    # "A" at the start of a sentence is an article unless something sets it off.
    if start and not re.match(r"[Aa]\s+\w", text) and start[1].upper() <= last:
        return start[1].upper()
    said = {letter.upper() for letter in _SAID.findall(text) if letter.upper() <= last}
    if not said:
        said = {c for c in re.findall(r"(?<![\w'])([A-Z])(?![\w'])", text) if c <= last}
        if "A" in said and re.search(r"\bA\s+[a-z]", text):
            said.discard("A")
    if len(said) == 1:
        return said.pop()
    if said:
        return None
    plain = _plain(text)
    named = {
        chr(ord("A") + index)
        for index, option in enumerate(options)
        if (body := _plain(_without_letter(option))) and re.search(rf"\b{body}\b", plain)
    }
    return named.pop() if len(named) == 1 else None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _without_letter(option: str) -> str:
    return re.sub(r"^\(?[A-Z][).:]\s*", "", option.strip())


def lettered(options: Sequence[str]) -> list[str]:
    """Options with their letters, as ``A. a cat``; those that have them stay as they are."""
    if options and re.match(r"^A\s*[.:)]", options[0]):
        return list(options)
    return [f"{chr(ord('A') + index)}. {option}" for index, option in enumerate(options)]


def first_letter(answer: str, truth: str) -> bool:
    """StreamingBench: the very first character is the letter."""
    return answer[:1] == truth


def contains(answer: str, truth: str) -> bool:
    """OVO-Bench, options: the letter occurs anywhere in the answer."""
    return truth in answer


def digits(answer: str, truth: str) -> bool:
    """OVO-Bench, REC: all digits of the answer, read as one number, are the count."""
    return "".join(re.findall(r"\d+", answer)) == truth


def yes_or_no(answer: str, truth: str) -> bool:
    """OVO-Bench, SSR and CRR: ``Yes`` or ``No`` occurs, or the answer is its first letter."""
    return truth in answer or answer == truth[:1]


#: How an answer is compared with the truth, by the name an item carries.
RULES: dict[str, Callable[[str, str], bool]] = {
    "first_letter": first_letter,
    "contains": contains,
    "digits": digits,
    "yes_or_no": yes_or_no,
    # StreamingBench, proactive output: the time is judged where the answer is recorded.
    "alert": contains,
}
