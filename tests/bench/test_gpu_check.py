"""gpu-check's orchestration on stand-in commands: verdicts, budget, what is left behind."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vicostream_kernels.bench import gpu_check
from vicostream_kernels.bench.gpu_check import check_all, plan
from vicostream_kernels.bench.results import Document, Row, write_json
from vicostream_kernels.bench.steps import Finished, Step, run_steps

ROOT = Path(__file__).parents[2]
FACTS = {"device_name": "NVIDIA H200", "commit": "0123456789abcdef", "dirty": False}
DRIVER_OK = "ran rope_append x\nsanitizer_driver: 2 kernels, 0 faults\n"
CLEAN = f"========= COMPUTE-SANITIZER\n{DRIVER_OK}========= ERROR SUMMARY: 0 errors\n"


def says(name: str, code: str, **options) -> Step:
    """A step that runs Python code and passes when it prints ``fine``."""
    options.setdefault("timeout_s", 20)
    options.setdefault("least_s", 0.1)
    return Step(
        name,
        (sys.executable, "-S", "-c", code),
        verdict=lambda done: "" if "fine" in done.output else f"exit code {done.code}",
        **options,
    )


def outcomes(steps, tmp_path, budget_s=30.0):
    done = run_steps(steps, budget_s=budget_s, logs=tmp_path / "logs", root=tmp_path)
    return {outcome.name: outcome for outcome in done}


def test_a_failure_does_not_stop_the_rest_but_what_needs_it_is_skipped(tmp_path):
    steps = [
        says("bad", "import sys; print('broken'); sys.exit(3)"),
        says("dependent", "print('fine')", needs=("bad",)),
        says("good", "print('fine')"),
    ]
    done = outcomes(steps, tmp_path)
    assert [o.status for o in done.values()] == ["failed", "skipped", "passed"]
    assert done["bad"].code == 3 and done["bad"].tail == ["broken"]
    assert done["dependent"].reason == "needs bad"
    assert (tmp_path / "logs" / "bad.log").read_text() == "broken\n"


def test_exit_code_0_alone_does_not_pass(tmp_path):
    assert outcomes([says("silent", "pass")], tmp_path)["silent"].status == "failed"


def test_a_step_that_overruns_is_ended_with_its_children(tmp_path):
    marker = tmp_path / "alive"
    child = f"import time; time.sleep(4); open({str(marker)!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); "
    code += "print('started', flush=True); time.sleep(60)"
    started = time.monotonic()
    done = outcomes([says("slow", code, timeout_s=2), says("next", "print('fine')")], tmp_path)
    assert time.monotonic() - started < 30
    assert done["slow"].status == "timeout" and done["slow"].tail == ["started"]
    assert done["next"].status == "passed"
    time.sleep(max(0.0, 5 - (time.monotonic() - started)))
    assert not marker.exists()


def test_early_steps_leave_later_ones_their_share(tmp_path):
    steps = [
        says("greedy", "import time; time.sleep(60)", timeout_s=60),
        says("late", "print('fine')", least_s=6),
    ]
    started = time.monotonic()
    done = outcomes(steps, tmp_path, budget_s=8)
    assert done["greedy"].status == "timeout" and done["late"].status == "passed"
    assert time.monotonic() - started < 25


def test_without_budget_steps_are_skipped(tmp_path):
    done = outcomes([says("a", "print('fine')", least_s=5)], tmp_path, budget_s=1)
    assert done["a"].status == "skipped" and "of the budget left" in done["a"].reason


def test_a_missing_program_is_a_failure_with_its_name(tmp_path):
    step = Step("gone", ("no-such-program-here",), 5, verdict=lambda done: "")
    done = outcomes([step], tmp_path)["gone"]
    assert done.status == "failed" and "no-such-program-here" in done.reason


def test_steps_get_their_environment(tmp_path):
    code = "import os; print(os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'] == '1' and 'fine')"
    steps = [says("a", code, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})]
    assert outcomes(steps, tmp_path)["a"].status == "passed"


def run_check(steps, tmp_path, bench="{}"):
    (tmp_path / "bench.json").write_text(bench)
    out = tmp_path / "results" / "h200-0.json"
    code = check_all(
        steps, FACTS, root=tmp_path, out=out, logs=tmp_path / "logs", bench=tmp_path / "bench.json",
        budget_s=30,
    )  # fmt: skip
    return code, json.loads(out.read_text())


def test_the_file_holds_every_step_and_the_benchmark(tmp_path):
    steps = [says("a", "print('fine')"), says("b", "print('fine')")]
    (tmp_path / "tiers.json").write_text('{"fetch": 1}')
    code, document = run_check(steps, tmp_path, '{"rows": [1]}')
    assert code == 0 and document["passed"] and document["benchmark"] == {"rows": [1]}
    assert document["tiers"] == {"fetch": 1} and document["overlap"] is None
    assert document["schema"] == gpu_check.SCHEMA and document["environment"] == FACTS
    assert [step["status"] for step in document["steps"]] == ["passed", "passed"]


def test_one_failure_fails_the_whole(tmp_path):
    code, document = run_check([says("a", "print('fine')"), says("b", "pass")], tmp_path, "no json")
    assert code == 1 and not document["passed"] and document["benchmark"] is None
    assert document["steps"][1]["reason"] == "exit code 0"


def test_the_file_is_there_before_the_run_is_over(tmp_path):
    out = tmp_path / "results" / "h200-0.json"
    code = f"import json; d = json.load(open({str(out)!r})); "
    code += "print([s['status'] for s in d['steps']], 'fine')"
    _, document = run_check([says("a", "print('fine')"), says("b", code)], tmp_path)
    assert document["steps"][1]["tail"] == ["['passed', 'skipped'] fine"]


@pytest.fixture
def interruptible():
    """Also where pytest runs in the background of a shell, which has SIGINT ignored then."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_run_leaves_what_it_had(tmp_path):
    code = f"import os, signal, time; os.kill({os.getpid()}, signal.SIGINT); time.sleep(60)"
    started = time.monotonic()
    result, document = run_check([says("a", "print('fine')"), says("b", code)], tmp_path)
    assert time.monotonic() - started < 30
    assert result == 1 and not document["passed"]
    assert [step["status"] for step in document["steps"]] == ["passed", "skipped"]


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({}, "h200-0123456789ab.json"),
        ({"dirty": True}, "h200-0123456789ab-dirty.json"),
        ({"commit": None, "dirty": None}, "h200-nocommit.json"),
    ],
)
def test_the_file_is_named_after_gpu_and_commit(facts, name):
    assert gpu_check.result_path(Path("r"), {**FACTS, **facts}) == Path("r") / name


def test_the_plan_covers_tests_tools_plants_and_benchmark_in_ten_minutes(tmp_path):
    steps = {step.name: step for step in plan(ROOT, tmp_path)}
    tools = ["memcheck", "racecheck", "initcheck", "synccheck"]
    plants = [f"plants-{tool}" for tool in tools]
    measured = ["benchmark", "tiers", "overlap"]
    assert list(steps) == ["pytest", "driver", *tools, "plants", *plants, *measured]
    assert sum(step.least_s for step in steps.values()) < 540
    for tool in tools:
        assert steps[tool].command[1:3] == ("--tool", tool) and steps[tool].needs == ("driver",)
        assert steps[tool].environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert (ROOT / gpu_check._PLANTS).is_file()


def test_the_planned_pytest_command_runs_marked_tests_and_is_judged_by_what_ran(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu: x\n")
    (tmp_path / "tests" / "test_a.py").write_text(
        "import sys, pytest\n"
        "@pytest.mark.gpu\ndef test_a(): assert '' not in sys.path\n"
        "def test_b(): assert False\n"
    )
    step = plan(tmp_path, tmp_path)[0]
    assert outcomes([step], tmp_path, budget_s=120)["pytest"].reason == ""


def test_the_tests_run_in_several_processes_where_they_can(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None)
    assert "-n" not in plan(ROOT, tmp_path)[0].command
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: name == "xdist" or None)
    command = plan(ROOT, tmp_path)[0].command
    assert int(command[command.index("-n") + 1]) == min(16, os.cpu_count())


def junit(tmp_path, **counts) -> Path:
    path = tmp_path / "j.xml"
    text = " ".join(f'{key}="{value}"' for key, value in counts.items())
    path.write_text(f"<testsuites><testsuite {text}/></testsuites>")
    return path


@pytest.mark.parametrize(
    ("code", "counts", "reason"),
    [
        (0, dict(tests=3, failures=0, errors=0, skipped=1), ""),
        (0, dict(tests=3, failures=0, errors=0, skipped=3), "no GPU test ran: 0 passed"),
        (5, dict(tests=0, failures=0, errors=0, skipped=0), "pytest ended with 5"),
        (1, dict(tests=3, failures=1, errors=0, skipped=0), "2 passed, 1 failed"),
    ],
)
def test_pytest_verdict(tmp_path, code, counts, reason):
    verdict = gpu_check.pytest_verdict(Finished(code, "", 1), junit(tmp_path, **counts))
    assert verdict == reason if not reason else reason in verdict


def test_pytest_without_a_report_failed(tmp_path):
    verdict = gpu_check.pytest_verdict(Finished(0, "", 1), tmp_path / "none.xml")
    assert "wrote no report" in verdict


@pytest.mark.parametrize(
    ("code", "output", "reason"),
    [
        (0, CLEAN, ""),
        (97, CLEAN.replace("0 errors", "3 errors"), "3 findings"),
        (0, DRIVER_OK, "no summary"),
        (0, CLEAN.replace("2 kernels", "0 kernels"), "the driver ended with 0"),
        (1, CLEAN, "0 findings, exit code 1"),
        (0, CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards"), ""),
        (255, "========= Error: Device not supported", "Error: Device not supported"),
    ],
)
def test_sanitizer_verdict(code, output, reason):
    verdict = gpu_check.sanitizer_verdict(Finished(code, output, 1))
    assert verdict == reason if not reason else reason in verdict


@pytest.mark.parametrize(
    ("code", "output", "found"),
    [
        (97, "========= ERROR SUMMARY: 1 error", True),
        (97, "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", True),
        (0, "========= ERROR SUMMARY: 0 errors", False),
        (97, "========= ERROR SUMMARY: 0 errors", False),
        (97, "", False),
    ],
)
def test_plant_verdict(code, output, found):
    assert (gpu_check.plant_verdict(Finished(code, output, 1)) == "") is found


@pytest.mark.parametrize(
    ("match", "code", "reason"), [(True, 0, ""), (False, 1, "wrong results"), (True, 1, "1 rows")]
)
def test_benchmark_verdict(tmp_path, match, code, reason):
    row = Row("append/a", "append", "op", "ours:cuda", {}, "float32", "cuda", 1, "cold", match, 0.1)
    write_json(Document({}, {}, [row]), tmp_path / "b.json")
    verdict = gpu_check.benchmark_verdict(Finished(code, "", 1), tmp_path / "b.json")
    assert verdict == reason if not reason else reason in verdict
    missing = gpu_check.benchmark_verdict(Finished(code, "", 1), tmp_path / "none.json")
    assert "left no results" in missing


_TIERS = '{"ingest": {"moved_bytes": 1, "ms": 2}, "fetch": {"bytes": 3, "tier": "%s"}}'
_OVERLAP = '{"fps": %s, "stages_ms": {"encode": 2, "prefill": 3}}'


@pytest.mark.parametrize(
    ("of", "right", "wrong"),
    [
        (gpu_check.tiers_verdict, _TIERS % "host", _TIERS % "disk"),
        (gpu_check.overlap_verdict, _OVERLAP % 1, _OVERLAP % 0),
    ],
)
@pytest.mark.parametrize("code", [0, 1])
def test_figures_verdict(tmp_path, code, of, right, wrong):
    path = tmp_path / "figures.json"
    for text in (None, right, wrong, "{}", ""):
        if text is not None:
            path.write_text(text)
        done = Finished(code, "one\nWrongResult: two\n", 1)
        said = gpu_check.figures_verdict(done, path, of)
        assert (said == "") == (code == 0 and text == right)
        assert not said or "two" in said or "no figures" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_clear_line_and_exit_code_2(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "finds no CUDA device" in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_outside_a_checkout_exit_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu_check.main(["--root", str(tmp_path)]) == 2
    assert "is no checkout" in capsys.readouterr().err


@pytest.fixture
def keeps_sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_main_runs_the_plan_and_writes_under_the_root(tmp_path, monkeypatch, keeps_sigterm):
    plants = tmp_path / gpu_check._PLANTS
    plants.parent.mkdir(parents=True)
    plants.touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setenv("VICO_COMMIT", "feedbeef")
    code = "import os; print(os.environ['VICO_COMMIT'] == 'feedbeef' and 'fine')"
    monkeypatch.setattr(gpu_check, "plan", lambda root, work: [says("a", code, folder=work)])
    assert gpu_check.main(["--root", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "bench/results/h200-feedbeef.json").read_text())
    assert document["passed"] and document["environment"]["commit"] == "feedbeef"
    assert (tmp_path / "out/gpu-check/logs/a.log").read_text() == "fine\n"


def test_only_pytest_runs_in_the_checkout(tmp_path):
    """Elsewhere the checkout on sys.path would hide the installed package."""
    inside = [step.name for step in plan(ROOT, tmp_path) if step.folder is None]
    assert [name for name in inside if not name.startswith("plants")] == ["pytest"]


def test_it_needs_neither_typer_nor_rich():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['typer', 'rich', 'matplotlib', 'av'])); "
        "import vicostream_kernels.bench.gpu_check as g; print(g.SCHEMA)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == gpu_check.SCHEMA, done.stderr


def test_tests_can_be_collected_without_pyav_and_jsonschema():
    """The GPU machine has neither: an import that fails there is an error of the whole step."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = {a.name for a in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module} if isinstance(node, ast.ImportFrom) else set()
            assert not names & {"av", "jsonschema"}, f"{path}: use pytest.importorskip"
