"""Results survive a round trip; CSV files concatenate; table and plot show what is there."""

from __future__ import annotations

import builtins
import csv
import json
from dataclasses import replace

import pytest

from vicostream_kernels.bench import environment, plots, report, results
from vicostream_kernels.bench.results import Document, Row


def row(**changes) -> Row:
    base = Row(
        case="append/toy",
        word="append",
        op="toy_op",
        provider="torch",
        axes={"rows": 3},
        dtype="float32",
        device="cpu",
        threads=2,
        cache="warm",
        match=True,
        error=1e-7,
        method="warm",
        samples=9,
        p20_us=9.0,
        p50_us=10.0,
        p80_us=12.0,
        gb_s=1.5,
        tflop_s=0.25,
        floor_us=5.0,
        floor_pct=50.0,
        baseline="torch",
        ratio=1.0,
        ratio_low=1.0,
        ratio_high=1.0,
        significant=False,
        bytes=100,
        flops=10,
    )
    return replace(base, **changes)


@pytest.fixture
def document() -> Document:
    fast = dict(provider="ours:cpu", ratio_low=1.9, ratio_high=2.1, significant=True)
    return Document(
        {"commit": "0123456789abcdef", "dirty": True, "device_name": "Toy CPU", "threads": 2},
        {"copy_gb_s": 10.0, "matmul_tflop_s": {"float32": 0.5}},
        [
            row(),
            row(**fast, ratio=2.0, p50_us=5.0),
            row(case="append/big", bytes=1000),
            row(**fast, case="append/big", bytes=1000, ratio=8.0),
            row(
                provider="ours:triton", match=False, error=float("nan"), reason="q: 3 NaN [red]",
                p20_us=None, p50_us=None, p80_us=None, gb_s=None, tflop_s=None, floor_us=None,
                floor_pct=None, ratio=None, ratio_low=None, ratio_high=None, significant=None,
            ),
        ],
    )  # fmt: skip


def test_json_round_trip(document, tmp_path):
    path = tmp_path / "deep" / "r.json"
    results.write_json(document, path)
    assert json.loads(path.read_text())["schema"] == results.SCHEMA
    back = results.read_json(path)
    assert back.as_dict() == document.as_dict()
    assert back.rows[-1].error != back.rows[-1].error


def test_a_failed_write_leaves_the_old_file(document, tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    results.write_json(document, path)
    old = path.read_text()
    monkeypatch.setattr(results.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        results.write_json(Document({}), path)
    assert path.read_text() == old and list(tmp_path.iterdir()) == [path]


def test_another_schema_is_refused(tmp_path):
    path = tmp_path / "r.json"
    path.write_text('{"schema": "other/1"}')
    with pytest.raises(ValueError, match="is no vicostream-bench/1 document"):
        results.read_json(path)


def test_csv_lines_append_under_one_header(document, tmp_path):
    path = tmp_path / "r.csv"
    results.append_csv(document, path)
    results.append_csv(document, path)
    lines = list(csv.DictReader(path.open(newline="")))
    assert len(lines) == 10
    assert lines[6]["provider"] == "ours:cpu" and float(lines[6]["ratio"]) == 2.0
    assert lines[0]["commit"] == "0123456789abcdef" and json.loads(lines[0]["axes"]) == {"rows": 3}


def test_csv_with_other_columns_is_left_alone(document, tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        results.append_csv(document, path)
    assert path.read_text() == "a,b\n1,2\n"


def test_geomean_leaves_out_the_baseline_and_the_wrong(document):
    assert document.geomeans() == {("ours:cpu", "warm"): (pytest.approx(4.0), 2)}


def test_the_table_says_it_all_without_rich(document, monkeypatch, capsys):
    real = builtins.__import__

    def without_rich(name, *args, **kwargs):
        if name.startswith("rich"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    report.print_report(document)
    said = capsys.readouterr().out
    assert "commit 0123456789ab dirty" in said and "copy 10.0 GB/s" in said
    ours = next(line for line in said.splitlines() if line.startswith("ours:cpu"))
    assert ours.split() == "ours:cpu warm 5 9-12 1.5 0.25 50 % 2.00x 1.90-2.10 yes".split()
    wrong = next(line for line in said.splitlines() if line.startswith("ours:triton"))
    assert wrong.split() == "ours:triton warm - - - - - - - NO".split()
    assert "geomean of 2 ratios, ours:cpu, warm: 4.00x" in said
    assert "WRONG, no speed shown: ours:triton on append/toy: q: 3 NaN [red]" in said


def test_the_rich_table_has_the_same_cells(document, capsys):
    pytest.importorskip("rich")
    report.print_report(document)
    said = capsys.readouterr().out
    for text in ("append/big", "2.00x", "1.90-2.10", "1 (base)", "NO", "4.00x", "3 NaN [red]"):
        assert text in said


def test_an_insignificant_ratio_is_marked():
    assert "1.01x ?" in report.cells(row(provider="ours:cpu", ratio=1.01, significant=False))


def test_a_busy_machine_is_said(document):
    document.environment.update(load_1m=9.0, cores=2)
    assert any("machine was busy (load 9 on 2" in line for line in report.summary_lines(document))
    document.environment.update(load_1m=0.5)
    assert not any("busy" in line for line in report.summary_lines(document))


@pytest.mark.parametrize("suffix", plots.FORMATS)
def test_plots_are_written(document, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"p{suffix}"
    plots.plot(document, path)
    starts = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    assert path.read_bytes().startswith(starts[suffix])


def test_a_plot_of_nothing_or_to_nowhere_is_refused(document, tmp_path):
    with pytest.raises(ValueError, match="must end in one of .png"):
        plots.plot(document, tmp_path / "p.txt")
    with pytest.raises(ValueError, match="nothing to plot"):
        plots.plot(Document({}, {}, document.rows[-1:]), tmp_path / "p.png")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
        ("AMD EPYC", "epyc"),
        ("Intel(R) Xeon(R) CPU", "xeon-r-cpu"),
        ("  ", "unknown"),
    ],
)
def test_slug(name, expected):
    assert environment.slug(name) == expected


def test_the_commit_can_be_given_for_a_copied_tree(monkeypatch):
    monkeypatch.setenv("VICO_COMMIT", "abc123-dirty")
    assert environment.commit_of_tree() == ("abc123", True)
    monkeypatch.setenv("VICO_COMMIT", "abc123")
    assert environment.commit_of_tree() == ("abc123", False)


def test_the_environment_is_plain_data():
    import torch

    facts = environment.collect(torch.device("cpu"))
    assert json.loads(json.dumps(facts)) == facts
    assert facts["torch"] == torch.__version__ and facts["threads"] == 1 and facts["cpu"]
