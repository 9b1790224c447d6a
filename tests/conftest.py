"""Every test runs with poisoned empties and two threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kit.poison import poisoned


@pytest.fixture(autouse=True)
def poisoned_empties() -> Iterator[None]:
    """An output element nobody wrote is NaN and fails."""
    with poisoned():
        yield


@pytest.fixture(autouse=True)
def two_threads() -> None:
    """Results and times do not depend on the size of the machine."""
    torch.set_num_threads(2)
