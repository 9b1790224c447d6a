"""The emulator finds what it is there to find: each planted fault, and none in the sound kernel."""

from __future__ import annotations

import subprocess

import pytest

from kit import emulation

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))
EMULATOR = emulation.ROOT / "tests" / "emulator"

#: What each plant must make the emulator say; "wrong": the result differs from the sound kernel's.
PLANTS = {
    "none": "right",
    "no barrier": "wrong",
    "no wait": "wrong",
    "no syncwarp": "wrong",
    "unwritten": "wrong",
    "some leave": "a barrier that some threads never reach",
    "two exchanges": "lanes of a warp at",
    "lanes leave": "lanes left before",
    "outside": "an address outside the block's shared memory",
    "unaligned": "cp.async from an unaligned address",
    "not asked for": "invalid launch",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    out = tmp_path_factory.mktemp("emulator") / "plants"
    sources = [EMULATOR / "plants.cpp", EMULATOR / "emulator.cpp"]
    command = ["g++", "-std=c++17", "-O1", "-w", f"-I{EMULATOR}", *map(str, sources)]
    subprocess.run([*command, "-o", str(out)], check=True)
    return out


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_fault_is_found(program, plant):
    """In one of a few orders, that is: some hide in others."""
    number = list(PLANTS).index(plant)
    said = set()
    for seed in range(1, 6):
        done = subprocess.run(
            [str(program), str(number), str(seed)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        said.add(done.stdout.strip())
    if plant == "none":
        assert said == {"right"}
    else:
        assert any(line.startswith(PLANTS[plant]) for line in said), said
