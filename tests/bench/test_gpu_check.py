"""gpu-check's orchestration on stand-in commands: verdicts, budget, what is left behind."""

from __future__ import annotations

import ast
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from vicostream_kernels.bench import gpu_check, gpu_plan, gpu_verdicts
from vicostream_kernels.bench.gpu_check import check_all, choose
from vicostream_kernels.bench.gpu_plan import plan
from vicostream_kernels.bench.results import Document, Row, write_json
from vicostream_kernels.bench.steps import Finished, Step, reserved, run_steps

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
    assert done["slow"].status == "timeout" and done["slow"].tail[0] == "started"
    assert done["next"].status == "passed"
    time.sleep(max(0.0, 5 - (time.monotonic() - started)))
    assert not marker.exists()


def test_a_step_that_overruns_may_say_what_it_has(tmp_path):
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('half of it')"
    verdict = lambda done: f"code {done.code}, {done.output.strip()}"  # noqa: E731
    step = Step("slow", (sys.executable, "-S", "-c", code), 2, verdict)
    done = outcomes([step], tmp_path)["slow"]
    assert done.status == "timeout" and done.code is None
    assert done.reason == "ended after 2 s: code None, half of it"


def test_neighbours_of_one_word_run_at_the_same_time(tmp_path):
    """Each waits for what the other leaves, and only one's time is reserved."""
    code = "import os, time, sys; open('{0}', 'w'); "
    code += "[time.sleep(0.02) for _ in range(500) if not os.path.exists('{1}')]; print('fine')"
    steps = [
        says("a", code.format("a", "b"), beside="x", least_s=9),
        says("b", code.format("b", "a"), beside="x", least_s=9),
        says("c", "print('fine')", needs=("a",), least_s=2),
    ]
    assert reserved(steps) == 11
    assert [o.status for o in outcomes(steps, tmp_path, budget_s=12).values()] == ["passed"] * 3


def test_a_step_is_left_out_after_the_exit_code_that_leaves_nothing_to_do(tmp_path):
    def run(code):
        after = says("after", "print('fine')", unless={"first": 3})
        return outcomes([says("first", f"import sys; sys.exit({code})"), after], tmp_path)["after"]

    assert run(1).status == "passed"
    assert run(3).status == "skipped" and "nothing to do: exit code 3" in run(3).reason


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


def run_check(steps, tmp_path, chosen=None):
    out = tmp_path / "results" / "h200-0.json"
    code = check_all(
        steps, FACTS, root=tmp_path, out=out, logs=tmp_path / "logs", work=tmp_path, budget_s=30,
        chosen=chosen,
    )  # fmt: skip
    return code, json.loads(out.read_text())


def writes(name: str, path: Path, text: str) -> Step:
    return says(name, f"open({str(path)!r}, 'w').write({text!r}); print('fine')")


TEST = '{"test": "t", "outcome": "passed", "seconds": 1, "text": ""}\n'


def test_the_file_holds_every_step_and_what_it_found(tmp_path):
    steps = [
        writes("pytest", tmp_path / "logs" / "pytest.jsonl", TEST),
        writes("benchmark", tmp_path / "benchmark.json", '{"rows": [1]}'),
    ]
    code, document = run_check(steps, tmp_path)
    assert code == 0 and document["passed"] and document["benchmark"] == {"rows": [1]}
    assert document["tests"]["pytest"]["counts"] == {"passed": 1} and document["tiers"] is None
    assert document["schema"] == gpu_check.SCHEMA and document["environment"] == FACTS
    assert [step["status"] for step in document["steps"]] == ["passed", "passed"]


def test_two_calls_share_the_steps(tmp_path):
    steps = [
        writes("pytest", tmp_path / "logs" / "pytest.jsonl", TEST),
        writes("tiers", tmp_path / "tiers.json", '{"fetch": 1}'),
    ]
    code, document = run_check(steps, tmp_path, choose(steps, "", "tiers"))
    assert code == 1 and [s["reason"] for s in document["steps"]] == ["", "not asked for"]
    (tmp_path / "logs" / "pytest.jsonl").unlink()
    code, document = run_check(steps, tmp_path, choose(steps, "tier*", ""))
    assert code == 0 and document["tiers"] == {"fetch": 1}
    assert document["tests"]["pytest"]["counts"] == {"passed": 1}
    code, document = run_check(steps, tmp_path, choose(steps, "pytest", ""))
    assert code == 0 and document["tiers"] == {"fetch": 1}


def test_steps_are_chosen_by_name_or_glob():
    steps = [says(name, "") for name in ("pytest", "plants", "plants-memcheck", "tiers")]
    names = lambda *given: [step.name for step in choose(steps, *given)]  # noqa: E731
    assert names("", "") == ["pytest", "plants", "plants-memcheck", "tiers"]
    assert names("plants*,tiers", "plants-*") == ["plants", "tiers"]
    with pytest.raises(ValueError, match="'pytst'; there are: pytest, plants"):
        names("pytst", "")


def test_one_failure_fails_the_whole(tmp_path):
    (tmp_path / "benchmark.json").write_text("no json")
    steps = [says("benchmark", "print('fine')"), says("b", "pass")]
    code, document = run_check(steps, tmp_path)
    assert code == 1 and not document["passed"] and document["benchmark"] is None
    assert document["steps"][1]["reason"] == "exit code 0"


def test_the_file_is_there_before_the_run_is_over(tmp_path):
    out = tmp_path / "results" / "h200-0.json"
    code = f"import json; d = json.load(open({str(out)!r})); "
    code += "print([s['status'] for s in d['steps']], 'fine')"
    _, document = run_check([says("a", "print('fine')"), says("b", code)], tmp_path)
    assert document["steps"][1]["tail"] == ["['passed', 'skipped'] fine"]


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
    steps = {step.name: step for step in plan(ROOT, tmp_path, tmp_path)}
    tools = ["memcheck", "racecheck", "initcheck", "synccheck"]
    plants = [f"plants-{tool}" for tool in tools]
    measured = ["benchmark", "tiers", "overlap"]
    assert list(steps) == ["pytest", "timer", "driver", *tools, "plants", *plants, *measured]
    # The build takes a minute of the ten, and the caller keeps some seconds.
    assert reserved(list(steps.values())) < 580 - 60
    for tool in tools:
        assert steps[tool].command[1:3] == ("--tool", tool) and steps[tool].needs == ()
        assert steps[tool].environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert (ROOT / gpu_plan.PLANTS).is_file()


def test_the_plan_also_fits_in_two_calls_of_a_quarter_of_an_hour(tmp_path):
    steps = plan(ROOT, tmp_path, tmp_path)
    first = choose(steps, "", "benchmark,tiers,overlap")
    second = choose(steps, "benchmark,tiers,overlap", "")
    assert 60 + reserved(first) < 450 and reserved(second) < 300


def test_what_times_the_device_runs_alone(tmp_path):
    steps = {step.name: step for step in plan(ROOT, tmp_path, tmp_path)}
    (file,) = gpu_plan.gpu_tests.ALONE
    assert file in steps["timer"].command and "-n" not in steps["timer"].command
    assert file not in steps["pytest"].command


def test_the_planned_pytest_command_runs_marked_tests_and_is_judged_by_what_ran(
    tmp_path, monkeypatch
):
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu: x\n")
    (tmp_path / "tests" / "test_a.py").write_text(
        "import sys, pytest\n"
        "@pytest.mark.gpu\ndef test_a(): assert '' not in sys.path\n"
        "def test_b(): assert False\n"
    )
    (tmp_path / "tests" / "test_b.py").write_text("raise ImportError('not to be imported')")
    monkeypatch.setattr(gpu_plan, "workers", lambda: ())
    step = plan(tmp_path, tmp_path, tmp_path / "logs")[0]
    assert outcomes([step], tmp_path, budget_s=120)["pytest"].reason == ""


def test_the_tests_run_in_several_processes_where_they_can(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_plan, "find_spec", lambda name: None)
    assert "-n" not in plan(ROOT, tmp_path, tmp_path)[0].command
    monkeypatch.setattr(gpu_plan, "find_spec", lambda name: name == "xdist" or None)
    command = plan(ROOT, tmp_path, tmp_path)[0].command
    assert int(command[command.index("-n") + 1]) == min(16, os.cpu_count())


def reported(tmp_path, *outcomes: str) -> Path:
    path = tmp_path / "r.jsonl"
    lines = [
        {"test": f"t{at}", "outcome": outcome, "seconds": 1, "text": ""}
        for at, outcome in enumerate(outcomes)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("code", "outcomes", "reason"),
    [
        (0, ("passed", "skipped"), ""),
        (0, ("skipped", "skipped"), "no GPU test ran: 2 skipped"),
        (1, ("passed", "failed"), "ended with 1: 1 failed, 1 passed; the first of them t1"),
        (None, ("passed", "started"), "ended with None: 1 passed; it was in t1"),
        (0, (), "pytest ended with 0 and reported on no test"),
    ],
)
def test_pytest_verdict(tmp_path, code, outcomes, reason):
    verdict = gpu_verdicts.pytest_verdict(Finished(code, "", 1), reported(tmp_path, *outcomes))
    assert verdict == reason if not reason else reason in verdict


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
    verdict = gpu_verdicts.sanitizer_verdict(Finished(code, output, 1))
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
    assert (gpu_verdicts.plant_verdict(Finished(code, output, 1)) == "") is found


@pytest.mark.parametrize(
    ("match", "code", "reason"), [(True, 0, ""), (False, 1, "wrong results"), (True, 1, "1 rows")]
)
def test_benchmark_verdict(tmp_path, match, code, reason):
    row = Row("append/a", "append", "op", "ours:cuda", {}, "float32", "cuda", 1, "cold", match, 0.1)
    write_json(Document({}, {}, [row]), tmp_path / "b.json")
    verdict = gpu_verdicts.benchmark_verdict(Finished(code, "", 1), tmp_path / "b.json")
    assert verdict == reason if not reason else reason in verdict
    missing = gpu_verdicts.benchmark_verdict(Finished(code, "", 1), tmp_path / "none.json")
    assert "left no results" in missing


_TIERS = '{"ingest": {"moved_bytes": 1, "ms": 2}, "fetch": {"bytes": 3, "tier": "%s"}}'
_OVERLAP = '{"fps": %s, "stages_ms": {"encode": 2, "prefill": 3}}'


@pytest.mark.parametrize(
    ("of", "right", "wrong"),
    [
        (gpu_verdicts.tiers_verdict, _TIERS % "host", _TIERS % "disk"),
        (gpu_verdicts.overlap_verdict, _OVERLAP % 1, _OVERLAP % 0),
    ],
)
@pytest.mark.parametrize("code", [0, 1])
def test_figures_verdict(tmp_path, code, of, right, wrong):
    path = tmp_path / "figures.json"
    for text in (None, right, wrong, "{}", ""):
        if text is not None:
            path.write_text(text)
        done = Finished(code, "one\nWrongResult: two\n", 1)
        said = gpu_verdicts.figures_verdict(done, path, of)
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
def keeps_signals():
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)}
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)


def test_main_runs_the_plan_and_writes_under_the_root(tmp_path, monkeypatch, keeps_signals):
    plants = tmp_path / gpu_plan.PLANTS
    plants.parent.mkdir(parents=True)
    plants.touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setenv("VICO_COMMIT", "feedbeef")
    code = "import os; print(os.environ['VICO_COMMIT'] == 'feedbeef' and 'fine')"
    monkeypatch.setattr(gpu_check, "plan", lambda root, work, logs: [says("a", code, folder=work)])
    assert gpu_check.main(["--root", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "bench/results/h200-feedbeef.json").read_text())
    assert document["passed"] and document["environment"]["commit"] == "feedbeef"
    assert (tmp_path / "out/gpu-check/logs/a.log").read_text() == "fine\n"


def test_only_pytest_runs_in_the_checkout(tmp_path):
    """Elsewhere the checkout on sys.path would hide the installed package."""
    inside = [step.name for step in plan(ROOT, tmp_path, tmp_path) if step.folder is None]
    assert [name for name in inside if not name.startswith("plants")] == ["pytest", "timer"]


def test_it_needs_neither_typer_nor_rich(torch_process, tmp_path):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['typer', 'rich', 'matplotlib', 'av'])); "
        "import vicostream_kernels.bench.gpu_check as g; print(g.SCHEMA)"
    )
    done = torch_process.run(code, tmp_path)
    assert done.stdout.strip() == gpu_check.SCHEMA, done.stderr


def test_tests_can_be_collected_without_pyav_and_jsonschema():
    """The GPU machine has neither: an import that fails there is an error of the whole step."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = {a.name for a in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module} if isinstance(node, ast.ImportFrom) else set()
            assert not names & {"av", "jsonschema"}, f"{path}: use pytest.importorskip"
