"""``vicostream bench``: list and run benchmark cases."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib import import_module
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from vicostream_kernels.bench import registry, report, results, runner

_MODEL_DTYPES = ("float32", "float16", "bfloat16")

_CACHES = {"warm": ("warm",), "cold": ("cold",), "both": ("warm", "cold")}


def _fail(message: str) -> typer.Exit:
    typer.echo(f"vicostream bench: {message}", err=True)
    return typer.Exit(2)


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="A word (append), an op, a case name, a glob or a regular expression; "
            "none is every case. reuse/error instead measures how far reused features are from "
            "the plain ViT's, tiers what it costs that history leaves memory and comes back, "
            "overlap what it saves that stages work at the same time.",
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the cases and stop.")] = False,
    backend: Annotated[
        str, typer.Option(help="Backends or providers to time, separated by commas.")
    ] = "",
    baseline: Annotated[
        str, typer.Option(help="The provider that ratios refer to (default: each case's own).")
    ] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N (default: cuda if there).")] = "",
    dtype: Annotated[str, typer.Option(help="Only cases of this dtype, as bfloat16.")] = "",
    cache: Annotated[str, typer.Option(help="Inputs in cache or not: warm, cold, both.")] = "both",
    events: Annotated[
        bool, typer.Option(help="CUDA: time eager calls instead of graph replays.")
    ] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Only the smallest cases.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure less; the intervals are wider.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads (default: torch's setting).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random inputs.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write all rows to this file.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Append the rows to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw .png, .svg or .pdf.")] = None,
    model: Annotated[
        str, typer.Option(help="The model of reuse/error, tiers and overlap.")
    ] = "tiny-random",
) -> None:
    """Check every provider against the truth, then time it against the baseline, in turn.

    Exit code 0: all right; 1: a provider gave wrong results (no speed is shown for it); 2: the
    request can't be served.
    """
    for name, special in _OF_A_MODEL.items():
        if names and name in names:
            idle = {"--list": list_, "--backend": backend, "--baseline": baseline, "--csv": csv}
            idle |= {"--cache": cache != "both", "--events": events, "--smoke": smoke}
            if given := [option for option, value in idle.items() if value]:
                raise _fail(f"{name} takes no {', '.join(given)}: it times a model, not cases")
            with runner.threads(threads):
                return special(_Asked(name, names, model, device, dtype, seed, quick, json, plot))
    try:
        cases = registry.load()
        chosen = registry.select(names or ["*"], cases)
        if smoke:
            chosen = [case for case in chosen if case.smoke]
        where = runner.parse_device(device or runner.default_device())
        if cache not in _CACHES:
            raise ValueError(f"--cache {cache!r} is not one of {', '.join(_CACHES)}")
        if plot is not None:
            from vicostream_kernels.bench import plots

            plots.check_path(plot)
        chosen = runner.filter_cases(chosen, where, dtype)
        options = runner.Options(
            device=where,
            providers=runner.provider_names(backend),
            baseline=baseline and runner.provider_names(baseline)[0],
            caches=_CACHES[cache],
            graphs=not events,
            quick=quick,
            seed=seed,
        )
        if list_:
            _list(chosen, options)
            return
        for case in chosen:
            runner.choose_providers(case, options)
    except ValueError as error:
        raise _fail(str(error)) from None

    for path in (json, csv, plot):
        if path is not None and not _writable(path):  # known before anything is measured
            raise _fail(f"{str(path)!r} can't be written")
    screen = report.Screen()

    def keep(document: results.Document) -> None:
        if json is not None:
            results.write_json(document, json)
        _clear()
        screen.case(list(report.by_case(document).values())[-1])

    with runner.threads(threads):
        document = runner.run(chosen, options, progress=_progress, each=keep)
    _clear()
    if json is not None:
        results.write_json(document, json)  # with what was left out after the last case
    if not document.rows:
        left_out = "; ".join(f"{name}: {why}" for name, why in document.left_out.items())
        raise _fail(f"no case is left ({left_out})")
    screen.end(document)
    try:
        if csv is not None:
            results.append_csv(document, csv)
        if plot is not None:
            plots.plot(document, plot)
    except (ValueError, OSError) as error:
        raise _fail(str(error)) from None
    if not document.all_match:
        raise typer.Exit(1)


def _writable(path: Path) -> bool:
    """Folders above it are made where they are missing."""
    if path.is_dir():
        return False
    above = next(p for p in path.absolute().parents if p.exists())
    return above.is_dir() and os.access(above, os.W_OK)


@dataclass(frozen=True)
class _Asked:
    """What measures a model instead of an op was asked with."""

    name: str
    names: list[str]
    model: str
    device: str
    dtype: str
    seed: int
    quick: bool
    json: Path | None
    plot: Path | None

    def load(self) -> Any:
        """The model. Raises ValueError."""
        from vicostream_kernels.models import load_model

        if len(self.names) > 1:
            raise ValueError(f"{self.name} runs on its own")
        where = runner.parse_device(self.device or runner.default_device())
        kinds = {"": None} | {kind: getattr(torch, kind) for kind in _MODEL_DTYPES}
        if self.dtype not in kinds:
            raise ValueError(f"--dtype {self.dtype!r} is not one of {', '.join(_MODEL_DTYPES)}")
        return load_model(self.model, device=where, dtype=kinds[self.dtype], seed=self.seed)

    def write(self, data: Any) -> None:
        if self.json is not None:
            self.json.parent.mkdir(parents=True, exist_ok=True)
            self.json.write_text(dumps(data, indent=1) + "\n")


def _named(loaded: Any) -> str:
    return f"{loaded.name}, {str(loaded.dtype).removeprefix('torch.')}"


def _reuse_error(asked: _Asked) -> None:
    """The curves of ``reuse_error``, as a table, data and a picture."""
    from vicostream_kernels.bench import plots, reuse_error

    try:
        if asked.plot is not None:
            plots.check_path(asked.plot)
        loaded = asked.load()
    except ValueError as error:
        raise _fail(str(error)) from None
    try:
        points = reuse_error.measure(loaded, seed=asked.seed, progress=_progress)
    except reuse_error.WrongResult as error:
        raise _wrong(error) from None
    _progress("")
    title = f"{_named(loaded)}, interval 4"
    typer.echo(f"error of merged features against the plain ViT (worst step), {title}")
    typer.echo(reuse_error.table(points))
    try:
        asked.write(reuse_error.as_data(points))
        if asked.plot is not None:
            plots.plot_reuse_error(points, title, asked.plot)
    except OSError as error:
        raise _fail(str(error)) from None


def _figures(asked: _Asked) -> None:
    """The figures of ``tiers`` or ``overlap``, in words and as data."""
    from vicostream_kernels.cache import TierError

    module = import_module(f"vicostream_kernels.bench.{asked.name}")
    try:
        if asked.plot is not None:
            raise ValueError(f"{asked.name} has no picture")
        loaded = asked.load()
    except ValueError as error:
        raise _fail(str(error)) from None
    less = module.QUICK if asked.quick else {}
    try:
        found = module.measure(loaded, seed=asked.seed, progress=_progress, **less)
    except (module.WrongResult, TierError) as error:
        raise _wrong(error) from None
    _progress("")
    typer.echo(_named(loaded))
    typer.echo(module.table(found))
    try:
        asked.write(module.as_data(found))
    except OSError as error:
        raise _fail(str(error)) from None


_OF_A_MODEL = {"reuse/error": _reuse_error, "tiers": _figures, "overlap": _figures}


def _wrong(error: Exception) -> typer.Exit:
    typer.echo(f"vicostream bench: {error}", err=True)
    return typer.Exit(1)


def _progress(line: str) -> None:
    if _rewrites():
        typer.echo(f"\r\x1b[2K{line}", err=True, nl=False)
        return
    typer.echo(line, err=True)


def _clear() -> None:
    """Makes room where the last line of progress stands."""
    if _rewrites():
        _progress("")


def _rewrites() -> bool:
    return sys.stderr.isatty() and "NO_COLOR" not in os.environ


def _list(cases: list[registry.Case], options: runner.Options) -> None:
    """One case a line: its name, its least bytes, and who can run it here."""
    width = max(len(case.name) for case in cases)
    for case in cases:
        providers = " ".join(p.name for p in case.providers(options.device))
        typer.echo(f"{case.name:<{width}}  {case.bytes / 1e6:9.3f} MB  {providers}")


def main() -> None:
    """``python -m vicostream_kernels.bench.cli``: the same command on its own."""
    typer.run(bench)


if __name__ == "__main__":
    main()
