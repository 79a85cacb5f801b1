"""The layouts that are trained, once a session for each number of processes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.deepspeed.gone_through import rollbacks  # noqa: F401 (a fixture)
from tests.deepspeed.inside.start import Walked, walk


def layout(
    model: str, stage: int, ep_size: int = 1, accumulate: int = 1, **more: Any
) -> dict[str, Any]:
    """One layout of :mod:`.inside.walk`."""
    name = f"{model}-zero{stage}-ep{ep_size}-micro{accumulate}"
    return {
        "name": "-".join([name, *map(str, more.values())]),
        "model": model,
        "stage": stage,
        "ep_size": ep_size,
        "accumulate": accumulate,
        **more,
    }


ALONE = [layout("deepspeed", 0), layout("huggingface", 0)]
#: DeepSpeed's own MoE layer does not train under stage 3
TWO = [
    *(layout("deepspeed", s, e, a) for s in (0, 1, 2) for e in (1, 2) for a in (1, 4)),
    *(layout("huggingface", s, 1, a) for s in (0, 1, 2, 3) for a in (1, 4)),
    *(layout("autoep", s, 2, a) for s, a in ((0, 1), (2, 4), (3, 1))),
    *(layout("huggingface", s, dtype="bf16") for s in (1, 3)),
]
FOUR = [
    layout("deepspeed", 0, 2),
    layout("deepspeed", 2, 2, 4),
    layout("huggingface", 1),
    layout("huggingface", 3, 1, 4),
]


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Walked:
    """A walk through the reference's engines in one process."""
    return walk(tmp_path_factory.mktemp("alone"), 1, ALONE)


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Walked:
    """A walk through engines in two processes."""
    return walk(tmp_path_factory.mktemp("two"), 2, TWO)


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Walked:
    """A walk through engines in four processes."""
    return walk(tmp_path_factory.mktemp("four"), 4, FOUR)
