"""The layouts that are trained, once a session for each number of processes."""

from __future__ import annotations

import pytest

from tests.deepspeed.gone_through import rollbacks  # noqa: F401 (a fixture)
from tests.deepspeed.inside.layouts import (
    ALONE,
    COMPILED,
    FOLLOWED,
    FOUR,
    LEFT_OUT,
    PADDED,
    TWO,
    compiled,
)
from tests.deepspeed.inside.start import Walked, walk


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Walked:
    """A walk through the reference's engines in one process."""
    return walk(tmp_path_factory.mktemp("alone"), 1, ALONE)


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Walked:
    """A walk through engines in two processes."""
    more = [x for operator, xs in COMPILED.items() if compiled(operator) for x in xs]
    layouts = [*TWO, *FOLLOWED, *more, *LEFT_OUT.values()]
    return walk(tmp_path_factory.mktemp("two"), 2, layouts)


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Walked:
    """A walk through engines in four processes."""
    return walk(tmp_path_factory.mktemp("four"), 4, [*FOUR, PADDED])
