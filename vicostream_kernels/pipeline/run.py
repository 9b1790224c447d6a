"""``vicostream run``: a video in, answers and figures out, whatever happens on the way."""

from __future__ import annotations

import math
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vicostream_kernels import methods
from vicostream_kernels.pipeline.errors import InputError, PipelineError, chunk_time, one_line
from vicostream_kernels.pipeline.report import QuestionFigures, Recorder
from vicostream_kernels.pipeline.screen import Screen
from vicostream_kernels.pipeline.source import FrameGroups, VideoSource, stack
from vicostream_kernels.pipeline.text import Question, parse_question

#: Options may be wrong in these parts of a run; anywhere else a ValueError is our failure.
_USERS_PARTS = ("options", "video", "model")
INTERRUPTED = 130


@dataclass(frozen=True)
class RunOptions:
    """What ``vicostream run`` was asked to do; strings as they were typed."""

    video: str
    model: str = "tiny"
    preset: str = "live"
    questions: Sequence[str] = ()
    fps: float | None = None
    device: str = "cpu"
    report: str | None = None
    show_pruning: str | None = None
    explain: str | None = None
    restore: str | None = None
    save: str | None = None
    settings: Sequence[str] = ()
    debug: bool = False


def run(options: RunOptions, screen: Screen | None = None) -> int:
    """Streams a video and answers its questions; returns the exit code.

    0: all went well; 1: something failed; 2: something the user gave cannot be used; 130:
    interrupted. In every case the report is written, with what was done until then and ``errors``.
    """
    return _Run(options, screen or Screen()).go()


class _Run:
    def __init__(self, options: RunOptions, screen: Screen) -> None:
        self._options, self._screen = options, screen
        self._code = 0
        self._part = "options"
        self._time_s: float | None = None
        self._waiting: list[Question] = []
        self._shift = 0.0  # time of the stream at which this video begins
        self._frames_before = 0  # in earlier runs of the session
        self._source: VideoSource | None = None
        self._film: Any = None
        self._explained = 0
        self._recorder = Recorder(
            model=options.model, preset=options.preset, config={"set": list(options.settings)}
        )

    def go(self) -> int:
        with self._caught():
            self._stream()
        with self._caught():
            self._tell_damage()
        with self._caught():
            self._finish_film()
        for question in self._waiting:
            self._recorder.error("answer", f"not asked: {question.text}", question.time_s)
        self._recorder.end()
        if self._options.report is not None:
            with self._caught():
                self._part = "report"
                self._write(Path(self._options.report))
        return self._code

    @contextmanager
    def _caught(self) -> Iterator[None]:
        """Turns what is raised into a line on stderr, an entry of the report and an exit code."""
        try:
            yield
        except KeyboardInterrupt:
            self._failed("interrupted", INTERRUPTED)
        except Exception as error:
            self._raised(error)

    def _raised(self, error: Exception) -> None:
        part, time_s = self._part, chunk_time(error)
        if time_s is not None:
            part = "ingest"  # a stage's, whichever call it came from
        code = getattr(error, "exit_code", 1)
        if isinstance(error, (ValueError, TypeError)) and part in _USERS_PARTS:
            code = 2
        self._failed(_said(error), code, part, time_s)

    def _failed(
        self, what: str, code: int, part: str | None = None, time_s: float | None = None
    ) -> None:
        self._screen.stop()
        time_s = self._time_s if time_s is None else time_s
        self._recorder.error(part or self._part, what, time_s)
        self._screen.error(what)
        if self._options.debug and sys.exc_info()[0] is not None:
            traceback.print_exc(file=sys.stderr)
        self._code = max(self._code, code)

    # -- parts -----------------------------------------------------------------------------------

    def _stream(self) -> None:
        options, recorder = self._options, self._recorder
        if options.report is not None:
            _check_folder(options.report)
        if options.explain is not None:
            _check_folder(options.explain, "--explain")
        if options.save is not None:
            if Path(options.save).is_dir():
                raise InputError(f"--save {options.save}: it is a folder, give a file")
            _check_folder(str(Path(options.save).parent), "--save")
        if options.restore is not None and not Path(options.restore).exists():
            raise InputError(f"--restore {options.restore}: no such file")
        if options.show_pruning is not None:
            from vicostream_kernels.pipeline.film import PruningFilm

            self._film = PruningFilm(options.show_pruning)
        method = methods.get(options.preset, parse_settings(options.settings))
        device = parse_device(options.device)
        recorder.use_device(device)
        if options.explain is not None:
            if method.retrieve is None:
                raise InputError(
                    f"--explain: preset {options.preset} retrieves nothing, it reads all that it "
                    "keeps"
                )
            recorder.explain = True
        questions = [parse_question(words) for words in options.questions]

        self._part = "video"
        video = options.video
        if video == "sample":
            video, questions = self._sample(questions)
        with VideoSource(video, fps=options.fps) as source:
            self._source = source
            recorder.source = {**asdict(source.info), "fps": options.fps}
            self._part = "model"
            self._screen.say(f"loading {options.model} on {device} ...")
            if device.type == "cpu" and (hint := busy_hint()):
                self._screen.say(hint)
            engine = self._load(method, device)
            with engine:
                self._part = "options"
                for question in questions:
                    engine.question_ids(question.text)
                if options.model == "tiny-random":
                    self._screen.say(
                        "tiny-random has random weights: it shows the machinery, its answers are "
                        "nonsense"
                    )
                self._part = "ingest"
                recorder.restart()
                watch = None if self._film is None else self._film.watch
                with self._open(engine, source, watch) as stream, self._caught():
                    # What the stream says at its end comes beside it.
                    self._consume(source, stream, questions)

    def _tell_damage(self) -> None:
        """What the video lacks, however the run ended; without a frame the error has said it."""
        source = self._source
        if source is None or not source.frames_read:
            return
        for trouble in source.troubles:
            self._part, self._time_s = trouble.where, trouble.time_s
            self._failed(f"{self._options.video}: {trouble.what}", 1)

    def _open(self, engine: Any, source: VideoSource, watch: Any) -> Any:
        options, recorder = self._options, self._recorder
        if options.restore is None:
            return engine.open(recorder=recorder, fps=options.fps or _rate(source), on_pruned=watch)
        self._part = "options"
        stream = engine.restore(options.restore, recorder=recorder, on_pruned=watch)
        self._part, self._frames_before = "ingest", recorder.read
        if recorder.frames_ingested:
            # The video goes on where the session ended, one frame later.
            self._shift = stream.time_s + 1.0 / (options.fps or _rate(source))
        return stream

    def _load(self, method: methods.Method, device: torch.device) -> Any:
        # Imported late: transformers takes seconds, and options should fail before that.
        from vicostream_kernels.models import load_model
        from vicostream_kernels.pipeline.engine import StreamEngine, check_supported

        check_supported(method)
        with quiet_transformers(not self._options.debug):
            return StreamEngine(load_model(self._options.model, device=device), method)

    def _sample(self, questions: list[Question]) -> tuple[str, list[Question]]:
        from vicostream_kernels.evaluation.streamqa import FPS
        from vicostream_kernels.pipeline.sample import questions as known
        from vicostream_kernels.pipeline.sample import sample_clip

        path = sample_clip(self._options.report)
        # Half a frame earlier: at the time of the last frame that the question may see.
        early = 0.5 / FPS
        asked = [Question(q.time_s - early, q.text, q.answer) for q in known()]
        return str(path), questions or asked

    def _consume(self, source: VideoSource, stream: Any, questions: list[Question]) -> None:
        recorder, screen = self._recorder, self._screen
        waiting = self._waiting = sorted(questions, key=_when)
        size = stream.frames_per_chunk
        frames = FrameGroups(iter(source))
        shift, length = self._shift, source.info.duration_s
        screen.start(None if length is None else length + shift, str(self._options.video))
        try:
            while True:
                limit = _when(waiting[0]) if waiting else math.inf
                with recorder.trace.span("decode", host=True) as span:
                    self._part = "video"
                    batch = frames.take(size, limit - shift)
                recorder.decoded(span)
                recorder.frames_read = self._frames_before + source.frames_read
                if batch:
                    times = [frame.time_s + shift for frame in batch]
                    self._part, self._time_s = "ingest", times[0]
                    stream.ingest(stack(batch), times)
                    self._time_s = times[-1]
                    self._draw()
                    screen.update(recorder, stream.time_s)
                elif frames.ended:
                    break
                else:
                    self._ask(stream, waiting.pop(0))
            self._save(stream)
            self._part = "ingest"
            stream.flush()
            self._draw()
            screen.update(recorder, stream.time_s)
            while waiting:
                question = waiting.pop(0)
                late, last = question.time_s, stream.time_s
                if late is not None and late > last and recorder.frames_processed:
                    screen.say(f"{late:g} s is after the last frame ({last:.3f} s): asked there")
                self._ask(stream, question)
        finally:
            recorder.frames_read = self._frames_before + source.frames_read
            screen.stop()
        screen.summary(recorder.report(), source.info.name)

    def _save(self, stream: Any) -> None:
        """Before the last chunk is cut short: the video may go on in another run."""
        if self._options.save is None:
            return
        self._part = "save"
        try:
            stream.save(self._options.save)
            self._screen.say(f"saved the session to {self._options.save}")
        except Exception as error:
            if chunk_time(error) is not None:
                raise
            self._raised(error)

    def _ask(self, stream: Any, question: Question) -> None:
        """A question that fails does not end the stream: the video does not depend on it."""
        part, self._part = self._part, "answer"
        with self._waits_unless_asked(question):
            try:
                self._answer(stream, question)
            except BrokenPipeError:
                raise  # nobody would read the answers that follow
            except Exception as error:
                if chunk_time(error) is not None:
                    raise  # the stream has failed, and says so here
                self._raised(error)
        self._part = part

    @contextmanager
    def _waits_unless_asked(self, question: Question) -> Iterator[None]:
        """Where the run ends here, the question is among those that were not asked, unless the
        stream had it."""
        asked = self._recorder.questions
        before = asked[-1] if asked else None
        try:
            yield
        except BaseException:
            if (asked[-1] if asked else None) is before:
                self._waiting.insert(0, question)
            raise

    def _answer(self, stream: Any, question: Question) -> None:
        time_s = stream.time_s if question.time_s is None else question.time_s
        self._screen.question(time_s, question.text)
        with stream.ask(question.text, time_s) as answer:
            for piece in answer:
                self._screen.piece(piece)
        if question.expected is not None:
            answer.figures.judge(question.expected)
        self._screen.answered(answer.figures)
        if answer.figures.relevance:
            self._explain(answer.figures)

    def _explain(self, figures: QuestionFigures) -> None:
        """Draws a question's relevance at once: what it takes is not kept for the whole run."""
        from vicostream_kernels.pipeline.explain import picture_name, plot_relevance

        self._explained += 1
        path = Path(self._options.explain or "") / picture_name(self._explained)
        try:
            plot_relevance(figures, path)
        except OSError as error:
            raise PipelineError(f"--explain {path}: {one_line(error)}") from error
        finally:
            figures.relevance = []
        self._screen.say(f"{path}: {len(figures.reads)} chunks read")

    def _draw(self) -> None:
        """Pictures that fail do not end the stream either."""
        if self._film is None:
            return
        part, self._part = self._part, "pictures"
        try:
            self._film.draw()
        except PipelineError as error:
            self._raised(error)
            self._film.discard()
            self._film = None
        self._part = part

    def _finish_film(self) -> None:
        if self._film is None:
            return
        self._part = "pictures"
        paths = self._film.close(f"{self._options.video}, {self._options.preset}")
        if paths is not None:
            self._recorder.pictures = dict(zip(("video", "contact_sheet"), paths))
            self._screen.say(", ".join(paths))

    def _write(self, folder: Path) -> None:
        report = self._recorder.write(folder)
        written = ["report.json", "trace.json"]
        picture = folder / "stream.png"
        if report["chunks"]:
            from vicostream_kernels.pipeline.plots import plot_report

            plot_report(report, picture)
            written.append(picture.name)
        else:
            picture.unlink(missing_ok=True)  # of an earlier run
        self._screen.say(f"{folder}: {', '.join(written)}")


def _when(question: Question) -> float:
    return math.inf if question.time_s is None else question.time_s


def _rate(source: VideoSource) -> float:
    return source.info.rate or 25.0


def parse_settings(settings: Sequence[str]) -> dict[str, str]:
    """``["key=value", ...]`` as a mapping; raises :class:`InputError` for anything else."""
    parsed = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--set {setting!r}: give key=value, as in prune.threshold=0.15")
        parsed[key.strip()] = value.strip()
    return parsed


def parse_device(name: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:N``; raises :class:`InputError` where it is not there."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name!r}: give cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name!r}: give cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise InputError(
                f"--device {name}: this machine has {count} usable CUDA devices "
                "(`vicostream info` says why); use --device cpu"
            )
    return device


def busy_hint() -> str | None:
    """What helps where other work keeps the cores busy: threads that spin while they wait for each
    other then cost most of the speed."""
    if not hasattr(os, "getloadavg") or os.environ.get("OMP_WAIT_POLICY"):
        return None
    load, cores, threads = os.getloadavg()[0], os.cpu_count() or 1, torch.get_num_threads()
    if threads == 1 or load < cores:
        return None
    return (
        f"this machine is busy (load {load:.1f} on {cores} cores): OMP_WAIT_POLICY=passive makes "
        "threads wait without spinning"
    )


def _check_folder(folder: str, option: str = "--report") -> None:
    """A run of hours must not end in a report that cannot be written."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option} {folder}: {error.strerror or error}") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"{option} {folder}: the folder cannot be written")


def _said(error: Exception) -> str:
    if isinstance(error, (PipelineError, ValueError)):
        return one_line(error)
    if isinstance(error, BrokenPipeError):
        return "stopped: nobody reads the output any more"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return f"out of memory: {one_line(error)}"
    return f"{type(error).__name__}: {one_line(error)}"


@contextmanager
def quiet_transformers(quiet: bool = True) -> Iterator[None]:
    """Keeps transformers' progress bars and hints off a screen that shows its own."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    if quiet:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
