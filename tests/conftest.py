"""Every test runs with poisoned empties and two threads; long files of tests come first."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kit.forked import TorchProcess, torch_process
from kit.poison import poisoned
from vicostream_kernels.backends import BackendUnavailable

#: Files that take half a minute and more: with several processes (`make test`) none of them is
#: begun when all the others are done.
_LONG = (
    "triton/test_ops_interpreted.py",
    "cuda/test_emulated.py",
    "packaging/test_cuda_gate.py",
    "bench/test_pytest_report.py",
    "triton/test_cubin_attention.py",
    "ops/test_attention_cpu.py",
    "test_cli.py",
    "triton/test_cubin.py",
    "evaluation/test_gate.py",
    "evaluation/test_streamqa_command.py",
    "triton/interpreter/test_append.py",
)


def pytest_configure() -> None:
    """A shell that starts something in the background has it ignore Ctrl-C, and what it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In one of several processes, which all must order the tests alike."""
    if not hasattr(config, "workerinput"):
        return
    folder = Path(__file__).parent
    place = {folder / name: at for at, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.path, len(_LONG)))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """A call that the CUDA kernels decline by design is skipped, with what they say."""
    try:
        return (yield)
    except BackendUnavailable as declined:
        spec = getattr(pyfuncitem, "callspec", None)
        backend = None if spec is None else spec.params.get("backend")
        by_design = "(cuda: the cuda kernels " in str(declined)
        if not by_design or backend is None or backend[0] != "cuda":
            raise
        pytest.skip(str(declined))


@pytest.fixture(autouse=True)
def poisoned_empties() -> Iterator[None]:
    """An output element nobody wrote is NaN and fails."""
    with poisoned():
        yield


@pytest.fixture(scope="session", name="torch_process")
def one_torch_process() -> Iterator[TorchProcess]:
    """For programs that are to find torch imported and nothing else."""
    with torch_process() as process:
        yield process


@pytest.fixture(autouse=True)
def two_threads() -> None:
    """Results and times do not depend on the size of the machine."""
    torch.set_num_threads(2)
