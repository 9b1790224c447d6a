"""FlashInfer's providers over a stand-in of its package, on CPU tensors: who is offered where and
why not, that they are right, and that what is prepared once is not in the timed calls."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from vicostream_kernels.bench import flashinfer_providers, registry, runner
from vicostream_kernels.bench.cases import append, attention, retrieve
from vicostream_kernels.bench.check import check
from vicostream_kernels.bench.inputs import to_truth
from vicostream_kernels.bench.timer import Budget
from vicostream_kernels.bench.timer_cuda import measure_cuda
from vicostream_kernels.reference.attention import sink_window_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CASES = registry.load()
BF16 = torch.bfloat16
DECODE = "attention/decode-1q-13000k-16h-2g-128d"


@pytest.fixture
def package(monkeypatch):
    """The stand-in, importable but not imported yet."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "stand_in")
    monkeypatch.delitem(sys.modules, "flashinfer", raising=False)
    yield
    sys.modules.pop("flashinfer", None)


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setattr(flashinfer_providers, "find_spec", lambda name: None)


def offered(case, device=CUDA):
    return [p for p in case.providers(device) if p.package == "flashinfer"]


def log():
    return sys.modules["flashinfer"].log


def test_it_is_offered_where_it_can_run_and_not_imported_for_that(package):
    with_it = {name for name, case in CASES.items() if offered(case)}
    assert {name for name in with_it if "bfloat16" in name} == {
        f"{DECODE}/bfloat16",
        "attention/decode-16s-1q-13000k-16h-2g-128d/bfloat16",
        "attention/prefill-320q-1600k-16h-2g-128d/bfloat16",
        "attention/prefill-2048q-16384k-16h-2g-128d/bfloat16",
        "append/320t-16h-2g-128d/bfloat16",
        "append/320t-28h-4g-128d/bfloat16",
        "append/1t-28h-4g-128d/bfloat16",
        "append/8192t-28h-4g-128d/bfloat16",
        "retrieve/dot-4096n-2048w-64k/bfloat16",
        "retrieve/list-4096n-2048w-64k-5m/bfloat16",
    }
    # Its top-k alone serves float32.
    assert {name for name in with_it if "bfloat16" not in name} == {
        "retrieve/dot-4096n-2048w-64k/float32",
        "retrieve/dot-262144n-256w-1024k/float32",
        "retrieve/list-4096n-2048w-64k-5m/float32",
        "retrieve/list-262144n-256w-1024k-5m/float32",
        "retrieve/list-8192n-256w-64k-1m/float32",
    }
    assert not any(offered(case, CPU) for case in CASES.values())
    assert "flashinfer" not in sys.modules


def test_what_more_is_to_compile_for_runs_when_asked_for(package):
    def chosen(name, **options):
        found, _ = runner.choose_providers(CASES[name], runner.Options(CUDA, **options))
        return [p.name for p in found if p.package == "flashinfer"]

    decode, plain = f"{DECODE}/bfloat16", "flashinfer:cuda-cores"
    prefill = "attention/prefill-320q-1600k-16h-2g-128d/bfloat16"
    assert chosen(decode) == ["flashinfer"]
    assert chosen(decode, providers=(plain,)) == [plain]
    assert chosen(prefill) == ["flashinfer", "flashinfer:fa2"]
    assert chosen(prefill, leave_out=("flashinfer",)) == []
    both = {"leave_out": ("flashinfer",), "providers": ("flashinfer",)}
    assert chosen(prefill, **both) == ["flashinfer"]


@pytest.mark.parametrize(
    ("name", "device", "reason"),
    [
        (f"{DECODE}/float32", "cuda", "does not serve float32"),
        ("append/320t-16h-2g-128d/float32", "cuda", "does not serve float32"),
        ("attention/decode-1q-150k-4h-2g-64d/bfloat16", "cuda", "smoke"),
        (f"{DECODE}/bfloat16", "cpu", "CUDA"),
    ],
)
def test_where_it_can_not_run_it_is_not_offered_and_says_why(package, name, device, reason):
    case, device = CASES[name], torch.device(device)
    assert not offered(case, device)
    with pytest.raises(runner.NothingToRun, match=rf"no provider 'flashinfer' .*\(.*{reason}"):
        runner.choose_providers(case, runner.Options(device, providers=("flashinfer",)))


def test_without_the_package_it_is_not_offered_and_the_report_says_why(no_package):
    cases = [CASES[f"{DECODE}/{dtype}"] for dtype in ("float32", "bfloat16")]
    assert not any(offered(case) for case in CASES.values())
    said = runner.absent(cases, runner.Options(CUDA))
    assert list(said) == ["flashinfer"] and "pip install flashinfer-python" in said["flashinfer"]
    assert runner.absent(cases, runner.Options(CPU)) == {}
    assert runner.absent(cases, runner.Options(CUDA, providers=("torch:sdpa",))) == {}
    assert runner.absent(cases, runner.Options(CUDA, leave_out=("flashinfer",))) == {}
    with pytest.raises(runner.NothingToRun, match="pip install flashinfer-python"):
        runner.choose_providers(cases[1], runner.Options(CUDA, providers=("flashinfer:fa2",)))


def test_the_report_says_nothing_of_a_package_that_some_case_is_beside(package):
    cases = [CASES[f"{DECODE}/{dtype}"] for dtype in ("float32", "bfloat16")]
    assert runner.absent(cases, runner.Options(CUDA)) == {}
    said = runner.absent(cases[:1], runner.Options(CUDA))
    assert said == {"flashinfer": "it does not serve float32 here"}


def judged(case, seed=0):
    """Verdicts of FlashInfer's providers beside the baseline's."""
    baseline = [p for p in case.providers(CPU) if p.name == case.baseline]
    mine = offered(case)
    verdicts = check(case, CPU, [*baseline, *mine], seed)
    assert all(verdict.ok for verdict in verdicts.values()), verdicts
    return [p.name for p in mine]


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
@pytest.mark.parametrize("keys", [130, 192])  # the last page holds 2, or is full
@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("queries", [1, 37])
def test_attention_is_right(package, queries, streams, keys, dtype):
    case = attention._paged_case("any", queries, keys, 8, 2, 64, dtype, streams=streams)
    other = "flashinfer:cuda-cores" if queries == 1 else "flashinfer:fa2"
    assert judged(case) == ["flashinfer", other]


def test_a_long_prefill_is_right(package):
    assert judged(attention._long_case(40, 150, 8, 2, 64)) == ["flashinfer", "flashinfer:fa2"]


@pytest.mark.parametrize("queries", [1, 5])
def test_gaps_in_a_page_table_are_closed(package, queries):
    """Streams of several lengths, entries that list nothing, pages beyond the length."""
    case = attention._paged_case("any", queries, 300, 8, 2, 64, BF16, streams=3)
    inputs = case.make(CPU, 0)
    pages = inputs["k_pages"].shape[0]
    table = torch.full((3, 8), -1, dtype=torch.int32)
    for at, column in enumerate((1, 2, 4, 5, 7)):
        table[:, column] = inputs["page_table"][:, at]
    table[1, 0] = pages
    inputs["page_table"], inputs["kv_len"] = table, torch.tensor([300, 128, 65]).int()
    truth = to_truth(inputs)
    expected = torch.empty_like(truth["q"])
    sink_window_attention(
        truth["q"], truth["k_pages"], truth["v_pages"], table, truth["cu_seqlens_q"], expected,
        kv_len=truth["kv_len"],
    )  # fmt: skip
    for provider in offered(case):
        found = provider.run({**inputs})
        torch.testing.assert_close(found.double(), expected, atol=2e-2, rtol=2e-2)


def test_a_length_beyond_the_listed_pages_counts_as_all_of_them():
    table, length = torch.tensor([[3, -1, 1], [2, 9, 0]]).int(), torch.tensor([1000, 40])
    starts, pages, last = flashinfer_providers.compacted(table, length, 8, 32)
    assert (starts.tolist(), pages.tolist(), last.tolist()) == ([0, 2, 4], [3, 1, 2, 0], [32, 8])


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_top_k_is_right(package, dtype):
    for made in (
        retrieve._dot_case(100, 64, 9, dtype),
        retrieve._list_case(100, 64, 9, 3, 2, 5, dtype),
        retrieve._list_case(100, 64, 9, 1, 0, 0, dtype),
    ):
        assert judged(made) == ["flashinfer"]
        # The kernel that also looks up takes one page a block.
        one = made.axes.get("pages") == 1
        assert log() == ["top_k_page_table_transform" if one else "top_k"]
        log().clear()


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
@pytest.mark.parametrize("tokens", [1, 150])
def test_append_is_right(package, tokens, dtype):
    assert judged(append._case(tokens, 6, 2, 64, dtype)) == ["flashinfer"]
    assert not offered(append._case(tokens, 6, 2, 64, dtype, raw=True, summary=True))


class LoggingClock:
    """Writes into the stand-in's log when a window begins and ends."""

    def event(self):
        class Event:
            def record(self):
                log().append("record")

            def elapsed_time(self, end):
                return 1.0

        return Event()

    def flush(self): ...
    def synchronize(self): ...

    def graph(self, run):
        for _ in range(3):  # as the true clock does before it captures
            run()
        log().append("capture")
        return run


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("queries", [1, 37])
def test_only_the_first_call_plans_and_it_is_not_timed(package, queries, graphs):
    case = attention._paged_case("any", queries, 130, 8, 2, 64, BF16)
    runs = {p.name: p.run for p in offered(case)}
    budget = Budget(seconds=0.0, least_rounds=3, most_rounds=3)
    inputs = case.make(CPU, 0)
    for run in runs.values():
        run({**inputs})  # imports it
    log().clear()
    measure_cuda(runs, inputs, cold=True, budget=budget, clock=LoggingClock(), graphs=graphs)
    assert log().count("plan") == len(runs)  # once for each copy of the inputs
    first = log().index("capture" if graphs else "record")
    assert "plan" not in log()[log().index("record") :]
    if graphs:
        assert log()[:first].count("plan") == 1 and set(log()[:first]) == {"plan", "run"}
    assert "flashinfer" not in inputs, "the copies were prepared, not what they are copies of"


def test_a_broken_package_is_a_fault_of_the_row(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    case = attention._paged_case("any", 1, 130, 8, 2, 64, BF16)
    monkeypatch.setattr(flashinfer_providers, "find_spec", lambda name: object())
    baseline = [p for p in case.providers(CPU) if p.name == case.baseline]
    verdicts = check(case, CPU, [*baseline, *offered(case)], 0)
    assert "ModuleNotFoundError" in verdicts["flashinfer"].reason and verdicts[case.baseline].ok
