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
    "a shuffle for a syncwarp": "right",  # for all that the order of threads can show
    "left over": "wrong",
}

#: What it says of them, in every order, where accesses are watched.
RACES = {
    "none": "right",
    "no barrier": "a race in shared memory",
    "no wait": "a race in shared memory",
    "no syncwarp": "a race in shared memory",
    "a shuffle for a syncwarp": "a race in shared memory",
}


def compiled(folder, *watch: str):
    objects = []
    for name, flags in (("plants", watch), ("emulator", ())):
        objects.append(str(folder / f"{name}.o"))
        command = ["g++", "-std=c++17", "-O1", "-w", f"-I{EMULATOR}", *flags, "-c"]
        subprocess.run([*command, str(EMULATOR / f"{name}.cpp"), "-o", objects[-1]], check=True)
    subprocess.run(["g++", *objects, "-o", str(folder / "program")], check=True)
    return folder / "program"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(scope="module")
def watched_program(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("emulator"), *emulation.WATCH)


def said_by(program, plant: str, seed: int) -> str:
    number = list(PLANTS).index(plant)
    done = subprocess.run(
        [str(program), str(number), str(seed)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_fault_is_found(program, plant):
    """In one of a few orders, that is: some hide in others."""
    said = {said_by(program, plant, seed) for seed in range(1, 6)}
    if PLANTS[plant] == "right":
        assert said == {"right"}
    else:
        assert any(line.startswith(PLANTS[plant]) for line in said), said


@pytest.mark.parametrize("plant", RACES)
def test_a_planted_race_is_found_in_every_order(watched_program, plant):
    said = {said_by(watched_program, plant, seed) for seed in range(1, 6)}
    assert all(line.startswith(RACES[plant]) for line in said), said
