"""``vicostream run``: a video in, answers and figures out, whatever happens on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from vicostream_kernels import methods
from vicostream_kernels.pipeline.errors import InputError, PipelineError, chunk_time, one_line
from vicostream_kernels.pipeline.failures import Failures
from vicostream_kernels.pipeline.feed import Feed, Live, when
from vicostream_kernels.pipeline.folders import writable_folder
from vicostream_kernels.pipeline.names import STDIN, shown_name
from vicostream_kernels.pipeline.options import (
    RunOptions,
    busy_hint,
    dtype_hint,
    gpu_hint,
    memory_hint,
    parse_device,
    parse_dtype,
    parse_sampler,
    parse_settings,
    quiet_transformers,
    room_hint,
)
from vicostream_kernels.pipeline.report import QuestionFigures, Recorder
from vicostream_kernels.pipeline.screen import Screen
from vicostream_kernels.pipeline.source import Frame, VideoSource, stack
from vicostream_kernels.pipeline.stopping import Stop, held_back
from vicostream_kernels.pipeline.text import Question, parse_question


def run(options: RunOptions, screen: Screen | None = None) -> int:
    """Streams a video and answers its questions; returns the exit code.

    0: all went well; 1: something failed; 2: something the user gave cannot be used; 130:
    interrupted. In every case the report is written, with what was done until then and ``errors``,
    if its folder can be.
    """
    return _Run(options, screen or Screen()).go()


class _Run:
    def __init__(self, options: RunOptions, screen: Screen) -> None:
        self._options, self._screen = options, screen
        self._name = shown_name(options.video)
        self._folder: Path | None = None  # of the report, once it is known to take one
        self._waiting: list[Question] = []  # when the feed is closed
        self._feed: Feed | None = None
        self._shift = 0.0  # time of the stream at which this video begins
        self._frames_before = 0  # in earlier runs of the session
        self._source: VideoSource | None = None
        self._told = 0  # of its troubles
        self._kept: int | None = 0  # chunks forgotten before; None: the user knows of more
        self._read: Any = None  # what questions retrieve by, until it is known to find room
        self._stop = Stop(options.save is not None, self._tell_stop)
        self._film: Any = None
        self._sampler: Any = None  # by the checkpoint's generation configuration
        self._explained = 0
        self._recorder = Recorder(
            model=options.model, preset=options.preset, config={"set": list(options.settings)}
        )
        self._at = Failures(self._recorder, self._screen, debug=options.debug)

    def go(self) -> int:
        with self._at.caught():
            self._stream()
        self._recorder.end()
        with self._at.caught():
            self._tell_damage()
        with self._at.caught():
            self._finish_film()
        for question in self._waiting:
            self._recorder.error("answer", f"not asked: {question.text}", question.time_s)
        with self._at.caught():
            self._summarise()
        if self._folder is not None:
            with self._at.caught():
                self._at.part = "report"
                self._write(self._folder)
        return self._at.code

    @property
    def _hurried(self) -> bool:
        """Whether the user has interrupted twice: no more than the report's figures is written."""
        return self._at.interrupts > 1 or self._stop.insisted

    # -- parts -----------------------------------------------------------------------------------

    def _stream(self) -> None:
        options, recorder = self._options, self._recorder
        self._check_paths()
        method = methods.get(options.preset, parse_settings(options.settings))
        device, dtype = parse_device(options.device), parse_dtype(options.dtype)
        self._read = method.retrieve
        recorder.use_device(device)
        if options.explain is not None:
            if method.retrieve is None:
                raise InputError(
                    f"--explain: preset {options.preset} retrieves nothing, it reads all that it "
                    "keeps"
                )
            recorder.explain = True
        live, sampler, opening = self._live(), parse_sampler(options.sampler), options.opening()
        questions = [parse_question(words) for words in options.questions]

        self._at.part = "video"
        video = options.video
        if video == "sample":
            video, questions = self._sample(questions)
        with VideoSource(video, fps=options.fps, enough=self._enough, **opening) as source:
            self._source = source
            recorder.source = {**asdict(source.info), "fps": options.fps}
            self._at.part = "model"
            self._screen.say(f"loading {options.model} on {device} ...")
            if hint := gpu_hint(device) or (busy_hint() if device.type == "cpu" else None):
                self._screen.say(hint)
            engine = self._load(method, device, dtype)
            if hint := dtype_hint(engine.runner.model, dtype):
                self._screen.say(hint)
            with engine:
                self._at.part = "options"
                for question in questions:
                    engine.question_ids(question.text)
                if sampler:
                    self._sampler = engine.runner.sampler(**sampler)
                if options.model == "tiny-random":
                    self._screen.say(
                        "tiny-random has random weights: it shows the machinery, its answers are "
                        "nonsense"
                    )
                if hint := memory_hint(method, source.info):
                    self._screen.say(hint)
                self._at.part = "ingest"
                recorder.restart()
                watch = None if self._film is None else self._film.watch
                with self._open(engine, source, watch) as stream, self._at.caught():
                    recorder.config |= {"sampler": sampler, "system": options.system}
                    recorder.config["input_format"] = options.input_format
                    self._kept = recorder.forgotten.chunks
                    # What the stream says at its end comes beside it.
                    self._consume(source, stream, questions, live)

    def _check_paths(self) -> None:
        """What is written into must take it, what is read be there, before the work."""
        options = self._options
        if options.report is not None:
            self._folder = writable_folder(options.report, "--report")
        if options.explain is not None:
            writable_folder(options.explain, "--explain")
        if options.save is not None:
            if not options.save:
                raise InputError("--save '': give a file")
            if Path(options.save).is_dir():
                raise InputError(f"--save {options.save}: it is a folder, give a file")
            writable_folder(Path(options.save).parent, "--save")
        if options.restore is not None and not Path(options.restore).is_file():
            raise InputError(f"--restore {options.restore}: no such file")
        if options.show_pruning is not None:
            from vicostream_kernels.pipeline.film import PruningFilm

            self._film = PruningFilm(options.show_pruning)

    def _live(self) -> Live:
        options = self._options
        if options.max_lag is not None and not options.max_lag > 0:
            raise InputError(f"--max-lag {options.max_lag}: must be a positive number of seconds")
        if options.interactive and options.video == STDIN:
            raise InputError(
                "--interactive: standard input is the video, questions cannot come too"
            )
        return Live(options.interactive, options.realtime, options.max_lag)

    def _enough(self) -> bool:
        """Whether a pipe is to be read no further."""
        return self._stop.wanted or (self._feed is not None and self._feed.over)

    def _tell_damage(self) -> None:
        """What the video lacks, as soon as it is known; without a frame the error will say it."""
        source = self._source
        if source is None or not source.frames_read:
            return
        before = self._at.part, self._at.time_s
        while self._told < len(source.troubles):
            trouble = source.troubles[self._told]
            self._told += 1
            self._at.part, self._at.time_s = trouble.where, trouble.time_s
            self._at.tell(f"{self._name}: {trouble.what}", 1)
        self._at.part, self._at.time_s = before

    def _tell_forgotten(self, stream: Any) -> None:
        """Once, when history that was to be kept begins to go; files that fail are told apart."""
        recorder = self._recorder
        if self._kept is None or recorder.config["engine"]["history"] != "all":
            return
        if recorder.forgotten.chunks - len(stream.history.cache.losses) > self._kept:
            self._kept = None
            self._screen.say(
                "no room for more history: the oldest is forgotten from here on (the report says "
                "what)"
            )

    def _open(self, engine: Any, source: VideoSource, watch: Any) -> Any:
        options, recorder = self._options, self._recorder
        if options.restore is None:
            return engine.open(
                fps=options.fps or _rate(source),
                system=options.system,
                recorder=recorder,
                on_pruned=watch,
            )
        self._at.part = "options"
        stream = engine.restore(options.restore, recorder=recorder, on_pruned=watch)
        self._at.part, self._frames_before = "ingest", recorder.read
        if recorder.frames_ingested:
            # The video goes on where the session ended, one frame later.
            self._shift = stream.time_s + 1.0 / (options.fps or _rate(source))
        return stream

    def _load(self, method: methods.Method, device: torch.device, dtype: torch.dtype | None) -> Any:
        # Imported late: transformers takes seconds, and options should fail before that.
        from vicostream_kernels.models import load_model
        from vicostream_kernels.pipeline.engine import StreamEngine, check_supported

        check_supported(method)
        with quiet_transformers(not self._options.debug):
            model = load_model(self._options.model, device=device, dtype=dtype)
            return StreamEngine(model, method)

    def _sample(self, questions: list[Question]) -> tuple[str, list[Question]]:
        from vicostream_kernels.evaluation.streamqa import FPS
        from vicostream_kernels.pipeline.sample import questions as known
        from vicostream_kernels.pipeline.sample import sample_clip

        path = sample_clip(self._options.report)
        # Half a frame earlier: at the time of the last frame that the question may see.
        early = 0.5 / FPS
        asked = [Question(q.time_s - early, q.text, q.answer) for q in known()]
        return str(path), questions or asked

    def _consume(
        self, source: VideoSource, stream: Any, questions: list[Question], live: Live
    ) -> None:
        recorder, screen = self._recorder, self._screen
        shift, length = self._shift, source.info.duration_s
        live = replace(live, paced=live.realtime or length is None)
        if live.max_lag_s is not None and not live.paced:
            screen.say("--max-lag does nothing: this video is not live (--realtime makes it so)")
        self._feed = feed = Feed(
            source,
            questions,
            recorder,
            lambda: self._stop.wanted,
            chunk=stream.frames_per_chunk,
            shift=shift,
            live=live,
        )
        self._waiting = feed.waiting
        length = None if length is None else length + shift
        try:
            screen.start(length, self._name, typing=live.interactive)
            if live.interactive:
                screen.say("type questions, one a line, at any time; Ctrl-D when there are no more")
            with feed:
                with self._stop:
                    try:
                        self._take_in(source, stream, feed)
                    except BaseException as error:
                        if self._can_save(error):
                            with self._at.inside("save"), self._at.caught():
                                self._save(stream)
                        raise
                    self._save(stream)
                self._stop.check()
                self._take_rest(stream, feed)
        finally:
            self._count_read(source)
            screen.stop()

    def _take_in(self, source: VideoSource, stream: Any, feed: Feed) -> None:
        """The video up to its end, and the questions on the way."""
        while True:
            self._stop.check()
            self._at.part = "video"
            batch = feed.take()
            self._count_read(source)
            self._tell_damage()
            if batch:
                self._ingest(stream, batch)
            elif feed.ended:
                return
            else:
                self._stop.check()
                question = feed.due(stream.time_s)
                if question is None:
                    continue
                self._ask(stream, question, midway=True)

    def _take_rest(self, stream: Any, feed: Feed) -> None:
        """The last chunk, short as it is, and what is asked at the end."""
        waiting = feed.waiting
        self._end_chunk(stream)
        while waiting:
            question = waiting.pop(0)
            late, last = question.time_s, stream.time_s
            if late is not None and late > last and self._recorder.frames_processed:
                self._screen.say(f"{late:g} s is after the last frame ({last:.3f} s): asked there")
            self._ask(stream, question)
        if feed.listens:
            self._screen.say("the video has ended: ask on, or Ctrl-D")
        while (typed := feed.typed(stream.time_s)) is not None:
            self._ask(stream, typed)

    def _ingest(self, stream: Any, batch: list[Frame]) -> None:
        times = [frame.time_s + self._shift for frame in batch]
        self._at.part, self._at.time_s = "ingest", times[0]
        stream.ingest(stack(batch), times)
        self._at.time_s = times[-1]
        self._taken(stream)

    def _count_read(self, source: VideoSource) -> None:
        self._recorder.frames_read = self._frames_before + source.frames_read

    def _end_chunk(self, stream: Any) -> None:
        """Has a question see every frame up to its time: with few frames a second a chunk would
        not be full for long."""
        self._at.part = "ingest"
        stream.flush()
        self._taken(stream)

    def _tell_room(self, stream: Any) -> None:
        """Once, when the first chunk has left the memory: whether a question finds room there."""
        chunks = stream.history.cache.chunks
        if self._read is not None and chunks and chunks[0].tier in ("host", "disk"):
            rule, self._read = self._read, None
            if hint := room_hint(rule, stream.history.cache.cache, chunks):
                self._screen.say(hint)

    def _taken(self, stream: Any) -> None:
        self._draw()
        self._tell_room(stream)
        self._tell_forgotten(stream)
        self._screen.update(self._recorder, stream.time_s)

    def _tell_stop(self) -> None:
        self._screen.at_once(
            "interrupted: the chunk in work is done first, then the session is saved; once more "
            "leaves at once"
        )

    def _can_save(self, error: BaseException) -> bool:
        """Whether what ended the run came from outside the stream, which is usable then."""
        if self._stop.insisted or not self._recorder.frames_ingested:
            return False
        if chunk_time(error) is not None:
            return False
        return self._at.part == "video" or isinstance(error, (KeyboardInterrupt, BrokenPipeError))

    def _save(self, stream: Any) -> None:
        """Before the last chunk is cut short: the video may go on in another run."""
        if self._options.save is None:
            return
        self._at.part = "save"
        try:
            stream.save(self._options.save)
            self._screen.say(f"saved the session to {self._options.save}")
        except KeyboardInterrupt:
            self._screen.say(f"--save {self._options.save}: not saved")
            raise
        except Exception as error:
            if chunk_time(error) is not None:
                raise
            self._at.tell_of(error)

    def _ask(self, stream: Any, question: Question, *, midway: bool = False) -> None:
        """A question that fails does not end the stream: the video does not depend on it."""
        with self._waits_unless_asked(question):
            # After a restore what waits may be earlier; then it sees no more of it anyway.
            if midway and stream.time_s <= when(question):
                self._end_chunk(stream)
            with self._at.inside("answer"):
                try:
                    self._answer(stream, question)
                except BrokenPipeError:
                    raise  # nobody would read the answers that follow
                except Exception as error:
                    if chunk_time(error) is not None or self._at.part != "answer":
                        raise  # the stream has failed, and says so here
                    self._screen.unanswered()
                    self._at.tell_of(error)

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
        asked_s = time.perf_counter()
        with stream.ask(question.text, time_s, sampler=self._sampler) as answer:
            if question.came_s is not None:
                answer.figures.waited_ms = round(1e3 * (asked_s - question.came_s), 3)
            for piece in answer:
                self._screen.piece(piece)
                self._stop.check()
                self._go_on(stream)
        if question.expected is not None:
            answer.figures.judge(question.expected)
        self._screen.answered(answer.figures)
        if answer.figures.relevance:
            self._explain(answer.figures)

    def _go_on(self, stream: Any) -> None:
        """The video does not wait for an answer: a chunk that is there already is taken in."""
        with self._at.inside("video"):
            if self._feed is not None and (batch := self._feed.take_ready()):
                self._ingest(stream, batch)

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
        with self._at.inside("pictures"):
            try:
                self._film.draw()
            except PipelineError as error:
                self._at.tell_of(error)
                self._film.discard()
                self._film = None

    def _finish_film(self) -> None:
        if self._film is None:
            return
        if self._hurried:
            self._film.discard()
            return
        self._at.part = "pictures"
        paths = self._film.close(f"{self._name}, {self._options.preset}")
        if paths is not None:
            self._recorder.pictures = dict(zip(("video", "contact_sheet"), paths))
            self._screen.say(", ".join(paths))

    def _summarise(self) -> None:
        if self._source is None or not self._recorder.frames_ingested or self._at.unheard:
            return
        self._screen.summary(self._recorder.report())

    def _write(self, folder: Path) -> None:
        with held_back():
            report = self._recorder.write(folder)
        written = ["report.json", "trace.json"]
        picture = folder / "stream.png"
        if report["chunks"] and not self._hurried:
            from vicostream_kernels.pipeline.plots import plot_report

            plot_report(report, picture)
            written.append(picture.name)
        else:
            picture.unlink(missing_ok=True)  # of an earlier run
        self._screen.say(f"{folder}: {', '.join(written)}")


def _rate(source: VideoSource) -> float:
    return source.info.rate or 25.0
