"""The tiny experiments of tests/recipes, and verbs in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.processes import Processes
from tests.recipes.conftest import make_leaf, own_study, trained  # noqa: F401


@pytest.fixture
def verbs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Runs verbs in processes; whatever is left of them at the end is killed."""
    processes = Processes(tmp_path_factory.mktemp("verbs"))
    yield processes
    processes.kill()
