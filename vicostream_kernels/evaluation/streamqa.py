"""Streaming question answering on synthetic clips of any length, with known truth and evidence.

::

    clip = make_clip(seed=7, steps=96, split="test")
    for question in clip.questions:
        stream.ingest(...)                        # clip.frames up to question.time_s
        correct = is_correct("".join(stream.ask(question.text)), question)
    clip.save("out/clip.mp4")                     # H.264 and out/clip.json

The world: a board of 3 x 3 places, up to four shapes at a time that come, stay, move, change their
colour and go, over a textured background with noise and drifting light. Kinds of questions:

- ``now``: which shape, or which colour, is at a place ("nothing" is an answer).
- ``past``: the last colour or last place of a shape that is not in the newest chunk any more
  ("never" for one that never came).
- ``count``: how many shapes there are now, zero to four.
- ``order``: which of two shapes came last. Both the appearance and the last sighting of the one are
  later than those of the other.
- ``motion``: which way a shape moved when it last did ("never": it did not).

A shape may come back after a while; every question is about its last appearance. Times are in
seconds of the clip: a step is two frames, the frame ``i`` has time ``i / fps``, and a question is
asked half a frame after the last frame that it may see.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vicostream_kernels.evaluation._draw import FRAME, SPLIT_VARIANTS, draw
from vicostream_kernels.evaluation._questions import CHUNK, FORMS, KINDS, Asked, Truth
from vicostream_kernels.evaluation._world import Log, simulate

__all__ = [
    "CHUNK", "FPS", "FRAMES_PER_STEP", "KINDS", "SPLITS", "Clip", "Question", "best_constant",
    "is_correct", "make_clip",
]  # fmt: skip

#: Frames of a temporal step of the model, and frames per second: two steps a second.
FRAMES_PER_STEP, FPS = 2, 4.0
#: Splits share neither seeds nor the variants in which shapes are drawn.
SPLITS = tuple(SPLIT_VARIANTS)
_VERSION = 1
_FORMS_OF = {kind: [form for form in FORMS if FORMS[form][0] == kind] for kind in KINDS}
_TRIES = 64


@dataclass(frozen=True)
class Question:
    """A question about a clip.

    time_s: when it is asked. kind: of ``KINDS``. form: the kind's variety, as "last_color".
    text: as typed. answer: the one right word.
    evidence: (start, end) in seconds, times of the first and last frames that show the answer;
    none where the answer is "never".
    """

    time_s: float
    kind: str
    form: str
    text: str
    answer: str
    evidence: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Clip:
    """``frames`` uint8 [F, H, W, 3] RGB, or None where they were not asked for; ``questions`` in
    the order of their times. ``log`` is the state after each step (None for a loaded clip)."""

    seed: int
    split: str
    fps: float
    frames: np.ndarray | None
    questions: tuple[Question, ...]
    log: Log | None = None

    @property
    def seconds(self) -> float:
        """Its length."""
        frames = self.log.steps * FRAMES_PER_STEP if self.log is not None else len(self.frames)
        return frames / self.fps

    def save(self, path: str | Path, *, scale: int = 4, crf: int = 24) -> Path:
        """Writes the frames as H.264, enlarged ``scale`` times, and the questions beside it as
        JSON (same name, ``.json``); returns the video's path. Needs PyAV.

        The same clip gives the same file on machines with the same x264.
        """
        if self.frames is None:
            raise ValueError("save: the clip was made without frames (frames=False)")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_video(path, self.frames, self.fps, scale, crf)
        facts = {
            "version": _VERSION,
            "seed": self.seed,
            "split": self.split,
            "fps": self.fps,
            "questions": [asdict(question) for question in self.questions],
        }
        path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        return path

    @staticmethod
    def load(path: str | Path) -> Clip:
        """Reads what :meth:`save` wrote; frames come as they are in the file, enlarged and lossy.

        Raises ``ValueError`` where the JSON is missing or of another version.
        """
        path = Path(path)
        facts_file = path.with_suffix(".json")
        if not facts_file.is_file():
            raise ValueError(f"{path}: no questions beside it, expected {facts_file.name}")
        facts = json.loads(facts_file.read_text(encoding="utf-8"))
        if facts.get("version") != _VERSION:
            raise ValueError(
                f"{facts_file}: version {facts.get('version')!r}, this reader knows {_VERSION}"
            )
        questions = tuple(
            Question(**{**q, "evidence": tuple(tuple(span) for span in q["evidence"])})
            for q in facts["questions"]
        )
        frames = _read_video(path)
        return Clip(facts["seed"], facts["split"], facts["fps"], frames, questions)


def make_clip(
    seed: int,
    steps: int = 64,
    *,
    split: str = "test",
    questions: int = 24,
    kinds: Sequence[str] = KINDS,
    at: str | Sequence[float] = "spread",
    age: int = CHUNK,
    fps: float = FPS,
    pool: int = 20,
    frames: bool = True,
) -> Clip:
    """Makes a clip; the same arguments give the same bits.

    Args:
        seed: any integer >= 0.
        steps: temporal steps, two frames each; at least one chunk (4).
        split: "train", "val" or "test".
        questions: how many; the kinds take turns.
        kinds: which of ``KINDS``.
        at: "spread" over the ends of the chunks, in the later three quarters of the clip;
            "end", all of them (the clip then ends with at least one shape on the board); or times
            in seconds, among which each question finds one that it can be asked at.
        age: steps since the shape of a ``past`` question was last seen, at least.
        fps: frames per second.
        pool: how many of the 24 shapes take part; the others are what "never" is about.
        frames: False leaves the pictures out.

    Raises ``ValueError`` for unknown names, too few steps, or times outside the clip.
    """
    _check(seed, steps, split, kinds, at, fps, pool)
    rng = np.random.Generator(np.random.PCG64([_VERSION, SPLITS.index(split), seed]))
    ends_at = _steps(at, steps, fps)
    for _ in range(_TRIES):
        log = simulate(rng, steps, variants=SPLIT_VARIANTS[split], pool=pool)
        if at != "end" or (log.shape[-1] >= 0).any():
            break
    asked = _ask(rng, Truth(log), ends_at, kinds, questions, age)
    pictures = draw(rng, log, FRAMES_PER_STEP) if frames else None
    return Clip(seed, split, fps, pictures, tuple(_timed(q, fps) for q in asked), log)


def is_correct(said: str, question: Question) -> bool:
    """Whether an answer is the right word; case, blanks and a full stop do not matter."""
    return said.strip().rstrip(".").strip().lower() == question.answer


def best_constant(questions: Iterable[Question]) -> dict[str, tuple[str, float]]:
    """For each kind the answer that is right most often, and its share: what a model that never
    looks can score, to be read beside every accuracy."""
    counts: dict[str, Counter[str]] = {}
    for question in questions:
        counts.setdefault(question.kind, Counter())[question.answer] += 1
    best = {}
    for kind, answers in counts.items():
        answer, times = min(answers.items(), key=lambda item: (-item[1], item[0]))
        best[kind] = (answer, times / answers.total())
    return best


def _steps(at: str | Sequence[float], steps: int, fps: float) -> list[int]:
    """The last steps that questions may see."""
    if at == "end":
        return [steps - 1]
    if at == "spread":
        ends = list(range(CHUNK - 1, steps, CHUNK))
        return ends[len(ends) // 4 :]
    found = []
    for time_s in at:
        step = int((time_s * fps + 1e-6) // FRAMES_PER_STEP) - 1
        # A step is over with its second frame.
        if (time_s * fps + 1e-6) % FRAMES_PER_STEP >= 1:
            step += 1
        if not 0 <= step < steps:
            raise ValueError(
                f"make_clip: at={time_s} s is outside the clip of {steps * FRAMES_PER_STEP / fps} s"
            )
        found.append(step)
    return found


def _ask(
    rng: np.random.Generator,
    truth: Truth,
    ends: list[int],
    kinds: Sequence[str],
    count: int,
    age: int,
) -> list[Asked]:
    asked: list[Asked] = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        forms = _FORMS_OF[kind]
        form = forms[number // len(kinds) % len(forms)]
        found = _find(rng, truth, form, ends, age, asked)
        if found is not None:
            asked.append(found)
    return sorted(asked, key=lambda q: q.step)


def _find(
    rng: np.random.Generator,
    truth: Truth,
    form: str,
    ends: list[int],
    age: int,
    asked: list[Asked],
) -> Asked | None:
    """A question of a form at one of the steps; where it can be, one that was not asked yet."""
    if form == "count":
        # Each number as often as the clip has it: the board is seldom empty, seldom full.
        counts = (truth.log.place[ends] >= 0).sum(1)
        wanted = rng.choice(np.unique(counts))
        ends = [end for end, n in zip(ends, counts) if n == wanted]
    elif FORMS[form][0] == "now":
        ends = [end for end in ends if (truth.log.shape[end] >= 0).any()] or ends
    found = None
    for _ in range(_TRIES):
        step = ends[int(rng.integers(len(ends)))]
        q = truth.pick(rng, form, step, age=age if FORMS[form][0] == "past" else 0)
        if q is not None:
            found = q
            if q not in asked:
                break
    return found


def _timed(q: Asked, fps: float) -> Question:
    """Steps as seconds."""
    last = FRAMES_PER_STEP - 1

    def seconds(frame: float) -> float:
        return round(frame / fps, 6)

    return Question(
        time_s=seconds(q.step * FRAMES_PER_STEP + last + 0.5),
        kind=q.kind,
        form=q.form,
        text=q.text,
        answer=q.answer,
        evidence=tuple(
            (seconds(a * FRAMES_PER_STEP), seconds(b * FRAMES_PER_STEP + last))
            for a, b in q.evidence
        ),
    )


def _check(seed, steps, split, kinds, at, fps, pool) -> None:
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"make_clip: seed={seed!r} must be an integer >= 0")
    if steps < CHUNK:
        raise ValueError(f"make_clip: steps={steps} must be at least one chunk, {CHUNK}")
    if split not in SPLITS:
        raise ValueError(f"make_clip: split={split!r} is none of {', '.join(SPLITS)}")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"make_clip: kinds={list(kinds)!r}, allowed: {', '.join(KINDS)}")
    if isinstance(at, str) and at not in ("spread", "end"):
        raise ValueError(f"make_clip: at={at!r} must be 'spread', 'end' or times in seconds")
    if not 0 < fps < float("inf"):
        raise ValueError(f"make_clip: fps={fps} must be a positive number")
    if not 5 <= pool <= 24:
        raise ValueError(f"make_clip: pool={pool} must be in 5 .. 24")


def _write_video(path: Path, frames: np.ndarray, fps: float, scale: int, crf: int) -> None:
    from fractions import Fraction

    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height = frames.shape[2] * scale, frames.shape[1] * scale
        stream.pix_fmt = "yuv420p"
        # One thread: x264 cuts slices by thread, and the file must not depend on the machine. No
        # look-ahead: at widths such as 336 it reads memory that it never wrote, and its choices,
        # and so the file, then differ from run to run.
        stream.options = {
            "preset": "veryfast",
            "crf": str(crf),
            "threads": "1",
            "g": "32",
            "rc-lookahead": "0",
        }
        for image in frames:
            big = np.ascontiguousarray(image.repeat(scale, 0).repeat(scale, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(big, format="rgb24")))
        container.mux(stream.encode(None))


def _read_video(path: Path) -> np.ndarray:
    from vicostream_kernels.pipeline.source import VideoSource

    with VideoSource(str(path)) as source:
        images = [frame.image for frame in source]
    return np.stack(images) if images else np.empty((0, FRAME, FRAME, 3), np.uint8)
