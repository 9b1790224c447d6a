"""The command line: ``vicostream run``, ``eval``, ``info`` and ``bench``."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

try:
    import typer
except ImportError as error:  # the kernels alone need no command line
    raise SystemExit(
        f"vicostream: error: the command line needs typer ({error}): "
        "pip install 'vicostream-kernels[pipeline]'"
    ) from error

from vicostream_kernels.evaluation.cli import app as evaluation  # noqa: E402 (needs typer)

app = typer.Typer(
    name="vicostream",
    help="Streaming video through Qwen2.5-VL with bounded kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(evaluation)


def _version(wanted: bool) -> None:
    if wanted:
        from vicostream_kernels import __version__

        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    video: Annotated[
        str,
        typer.Argument(
            metavar="VIDEO", help="A file, a URL, - for standard input, or the word sample."
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            help="tiny, tiny-full, tiny-random, 3b-random, 7b-random, a folder with a Qwen2.5-VL "
            "checkpoint, or a Hugging Face name."
        ),
    ] = "tiny",
    preset: Annotated[
        str,
        typer.Option(
            help="A method: live (the default: what a chunk or a question costs does not grow, its "
            "history does, in memory or, with --set engine.history_bytes=2GB, in files), or as "
            "published: vicostream, full-history, streaming-llm, timechat-online, stc-pruner, "
            "evs, ... (docs/methods.md)."
        ),
    ] = "live",
    ask: Annotated[
        list[str] | None,
        typer.Option(
            metavar='"TIME TEXT"',
            help="A question and when to ask it: seconds, mm:ss, h:mm:ss, or end. May be repeated.",
        ),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="At most this many frames a second (default: every frame).")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16 (default: float32 for a checkpoint on the CPU, "
            "else its own)."
        ),
    ] = None,
    report: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Write report.json, trace.json and stream.png into this folder."
        ),
    ] = None,
    show_pruning: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Write pruned.mp4, the frames with dropped patches dimmed, and pruned.png, a "
            "contact sheet, into this folder.",
        ),
    ] = None,
    restore: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Go on with the session of this file; VIDEO begins where it ended.",
        ),
    ] = None,
    save: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Save the session where VIDEO ends or is interrupted, for --restore.",
        ),
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Write relevance-001.png and so on into this folder: for each question the "
            "relevance of every chunk over time, and which ones it read.",
        ),
    ] = None,
    interactive: Annotated[
        bool,
        typer.Option(
            "--interactive",
            help="Take questions from standard input too, one a line: each is asked at once. After "
            "the end of VIDEO as well, up to Ctrl-D.",
        ),
    ] = False,
    realtime: Annotated[
        bool,
        typer.Option(
            "--realtime", help="Take no frame before its time: a file becomes a live video."
        ),
    ] = False,
    max_lag: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Leave out frames that come later than that, to keep up with a live video "
            "(default: none).",
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The system message (default: the chat template's own)."),
    ] = None,
    sampler: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="How tokens are picked: temperature=0.7, top_p=0.9, repetition_penalty=1.1, "
            "seed=1 ... (default: by the checkpoint's generation configuration). May be repeated.",
        ),
    ] = None,
    input_format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="FFmpeg's input format, where VIDEO does not tell it: v4l2 for a camera ...",
        ),
    ] = None,
    input_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="An option of FFmpeg's for VIDEO, as rtsp_transport=tcp. May be repeated.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change the preset, as in prune.threshold=0.15. May be repeated.",
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Stream VIDEO through a model and answer questions about it on the way.

    Exit code 0: all went well; 1: something failed; 2: something given cannot be used; 130:
    interrupted. The report is written in every case, with what was done until then.
    """
    from vicostream_kernels.pipeline.options import RunOptions
    from vicostream_kernels.pipeline.run import run as run_pipeline
    from vicostream_kernels.pipeline.stopping import heard

    # A service that is stopped deserves its report as much as one that is interrupted.
    with heard():
        code = run_pipeline(
            RunOptions(
                video=video,
                model=model,
                preset=preset,
                questions=ask or (),
                fps=fps,
                device=device,
                dtype=dtype,
                report=report,
                show_pruning=show_pruning,
                explain=explain,
                restore=restore,
                save=save,
                interactive=interactive,
                realtime=realtime,
                max_lag=max_lag,
                system=system,
                sampler=sampler or (),
                input_format=input_format,
                input_options=input_option or (),
                settings=settings or (),
                debug=debug,
            )
        )
    raise typer.Exit(code)


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with every reason.")] = False,
) -> None:
    """Show what is installed, which backend serves each op, and why the others do not."""
    from vicostream_kernels import __version__, backends

    facts = {"vicostream_kernels": __version__, **backends.info()}
    if as_json:
        typer.echo(json.dumps(facts, indent=1, default=str))
    else:
        for line in info_lines(facts):
            typer.echo(line)


def info_lines(facts: dict[str, Any]) -> list[str]:
    """``backends.info()`` as text: the machine, word x backend, and the reason of each gap."""
    native = facts["native_missing"]
    if facts["native"]:
        native = ", ".join(f"{name} {value}" for name, value in facts["native"].items() if value)
    lines = [
        f"vicostream-kernels {facts['vicostream_kernels']}, torch {facts['torch']}, "
        f"triton {facts['triton'] or 'not installed'}, {facts['threads']} threads",
        f"compiled  {native}",
        f"CUDA      {', '.join(facts['devices']) or facts['cuda_missing']}",
    ]
    for kind, rows in facts["ops"].items():
        names = list(rows[0]["backends"]) if rows else []
        none = f"; there are none here: {facts['cuda_missing']}" if kind == "cuda" else ""
        lines += [
            "",
            f"on {kind} tensors (* is what auto takes){none if not facts['devices'] else ''}",
        ]
        lines.append(f"{'word':<12}{'op':<24}" + "".join(f"{name:<12}" for name in names))
        reasons: dict[str, list[str]] = {}
        for row in rows:
            cells = ""
            for name in names:
                reason = row["backends"][name]
                cells += (
                    f"{('yes*' if row['auto'] == name else 'yes') if reason is None else '-':<12}"
                )
                if reason is not None:
                    generic = reason.replace(row["op"], "OP")
                    reasons.setdefault(f"{name}: {generic}", []).append(row["op"])
            lines.append(f"{row['word']:<12}{row['op']:<24}{cells}".rstrip())
        for reason, ops in reasons.items():
            where = "all ops" if len(ops) == len(rows) else ", ".join(ops)
            lines.append(f"  - {reason.replace('OP', 'it')} [{where}]")
    return lines


def _add_bench() -> None:
    """The bench command has a module of its own, with an extra of its own."""
    try:
        from vicostream_kernels.bench.cli import bench
    except ImportError as error:
        reason = str(error)

        @app.command(
            context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
            help="Measure the ops (not installed here).",
        )
        def bench() -> None:
            typer.echo(
                f"vicostream bench: {reason}; pip install 'vicostream-kernels[bench]'", err=True
            )
            raise typer.Exit(2)

    else:
        app.command(name="bench")(bench)


def main() -> None:
    """The entry point."""
    _add_bench()
    app(prog_name="vicostream")


if __name__ == "__main__":
    sys.exit(main())
