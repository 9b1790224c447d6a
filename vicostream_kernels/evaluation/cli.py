"""``vicostream eval``: its commands. What they do is imported when they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="eval",
    help="Measure whether the answers are right, and what bounding costs.",
    no_args_is_help=True,
)

Data = Annotated[str, typer.Option(metavar="DIR", help="The benchmark's folder, as published.")]
Model = Annotated[
    str, typer.Option(help="A named model, a folder with a checkpoint, or a Hugging Face name.")
]
Preset = Annotated[str, typer.Option(help="A method, as for run.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the preset. May be repeated."),
]
Fps = Annotated[float, typer.Option(help="Frames taken per second of video.")]
Context = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS", help="Show only this much before a question (default: all of it)."
    ),
]
Only = Annotated[list[str] | None, typer.Option(help="Only this subset or task. May be repeated.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Out = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Where results go and are found again (default: out/eval/)."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def _run(command: Callable[[], int]) -> None:
    """A stopped evaluation keeps its answers as an interrupted one does."""
    from vicostream_kernels.pipeline.stopping import heard

    with heard():
        code = command()
    raise typer.Exit(code)


@app.command()
def streamqa(
    model: Model = "tiny",
    preset: Preset = "live",
    settings: Settings = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=A,B,C",
            help="Measure each value of a key of the preset, or of model, preset, keep (drop at "
            "random) or selector (rule, oracle, random, missing). Several: all combinations.",
        ),
    ] = None,
    study: Annotated[
        list[str] | None,
        typer.Option(
            help="A standard comparison: dropping, window, retrieval, models, plane, live."
        ),
    ] = None,
    clips: Annotated[int, typer.Option(help="Number of clips.")] = 24,
    steps: Annotated[int, typer.Option(help="Length of a clip; two steps are a second.")] = 96,
    questions: Annotated[int, typer.Option(help="Questions for each clip.")] = 24,
    kind: Annotated[
        list[str] | None, typer.Option(help="Only this kind of question. May be repeated.")
    ] = None,
    at: Annotated[str, typer.Option(help="When they are asked: spread or end.")] = "spread",
    seed: Annotated[int, typer.Option(help="Of the first clip.")] = 0,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    plot: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Draw figures; without --sweep or --study those of all standard comparisons.",
        ),
    ] = None,
    device: Device = "cpu",
    out: Annotated[
        str, typer.Option(metavar="DIR", help="Where results go and are found again.")
    ] = "out/eval/streamqa",
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is known.")] = False,
    debug: Debug = False,
) -> None:
    """Synthetic streaming questions with known answers: accuracy by kind, and what it costs.

    Results are kept by the settings, the weights and the code that made them: a second call only
    measures what is missing. Exit code 0: done; 2: something given cannot be used.
    """
    from vicostream_kernels.evaluation.measure import ClipSet
    from vicostream_kernels.evaluation.qa_run import QAOptions, run_streamqa
    from vicostream_kernels.evaluation.streamqa import KINDS

    asked = QAOptions(
        model=model,
        preset=preset,
        settings=settings or (),
        sweeps=sweep or (),
        studies=study or (),
        clips=ClipSet(clips, steps, seed, split, questions, tuple(kind or KINDS), at),
        plot=plot,
        device=device,
        out=out,
        fresh=fresh,
        debug=debug,
    )
    _run(lambda: run_streamqa(asked))


@app.command()
def streamingbench(
    data: Data,
    model: Model,
    preset: Preset = "vicostream",
    settings: Settings = None,
    fps: Fps = 1.0,
    context: Context = None,
    only: Only = None,
    device: Device = "cpu",
    out: Out = None,
    debug: Debug = False,
) -> None:
    """StreamingBench (arXiv 2411.03628): real, omni, contextual, sqa, proactive.

    Each question is asked at its time with only what came before. A second call goes on where the
    first stopped. Exit code 0: all were asked; 1: some could not be (they are listed); 2: something
    given cannot be used.
    """
    _benchmark(**locals(), benchmark="streamingbench")


@app.command()
def ovobench(
    data: Data,
    model: Model,
    preset: Preset = "vicostream",
    settings: Settings = None,
    fps: Fps = 1.0,
    context: Context = None,
    only: Only = None,
    device: Device = "cpu",
    out: Out = None,
    debug: Debug = False,
) -> None:
    """OVO-Bench (arXiv 2501.05510): backward, real-time and forward tasks.

    Each question is asked at its time with only what came before. A second call goes on where the
    first stopped. Exit code 0: all were asked; 1: some could not be (they are listed); 2: something
    given cannot be used.
    """
    _benchmark(**locals(), benchmark="ovobench")


def _benchmark(settings: Any, context: Any, only: Any, **options: Any) -> None:
    from vicostream_kernels.evaluation.run import BenchmarkOptions, run_benchmark

    asked = BenchmarkOptions(settings=settings or (), context_s=context, only=only or (), **options)
    _run(lambda: run_benchmark(asked))
