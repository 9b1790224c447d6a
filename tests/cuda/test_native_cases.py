"""What compute-sanitizer will watch is every CUDA kernel, and right: seen in the emulator."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch

from kit import emulation, interpreter
from vicostream_kernels.bench import sanitizer_driver

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))


@pytest.mark.skipif(emulation.ACTIVE, reason="this is the emulator's process")
def test_in_the_emulator():
    run = emulation.run([__file__], "-k", "there")
    outcomes = {node: outcome.outcome for node, outcome in run.outcomes.items()}
    assert list(outcomes.values()) == ["passed"], run.output


@pytest.mark.skipif(not emulation.ACTIVE, reason="a process of its own")
@pytest.mark.skipif(interpreter.ACTIVE, reason="nothing of Triton's")
def test_there_the_driver_launches_every_kernel_and_each_is_right():
    for case, provider in sanitizer_driver.work(sanitizer_driver.all_cases(), CPU):
        assert sanitizer_driver.run_once(case, provider, CPU) == "", case.name
    module = emulation.module()
    said = subprocess.check_output(["nm", "-C", str(emulation.build(emulation.WATCHED))], text=True)
    kernels = {
        module.loaded_at() + int(at, 16): name
        for at, name in re.findall(r"^([0-9a-f]+) [tTwW] (.*_kernel(?:<.*>)?\(.*)$", said, re.M)
        if name.startswith(("void ", "vico_emulated::"))
    }
    assert len(kernels) > 40
    launched = set(module.launched_kernels())
    assert launched <= set(kernels)
    assert [name for at, name in kernels.items() if at not in launched] == []
