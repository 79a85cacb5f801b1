"""The plan for large trainings: its formulas against the monitor itself, its table in the docs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import planning  # noqa: E402
import planning_formulas as formulas  # noqa: E402


@pytest.fixture(scope="module", params=planning.SIZES[:2], ids=str)
def checked(request) -> dict:
    return planning.check(request.param)


def test_bytes_are_those_that_the_monitor_holds_and_reduces(checked: dict) -> None:
    for name in ("snapshot_bytes", "packed_bytes"):
        predicted, real = checked[name]
        assert predicted == real > 0


def test_flops_are_those_that_pytorch_counts(checked: dict) -> None:
    predicted, counted = checked["flops"]
    assert predicted == pytest.approx(counted, rel=0.03)


def test_the_documents_table_is_the_scripts() -> None:
    assert planning.table(planning.all_rows()) in (ROOT / "docs" / "planning.md").read_text()


@pytest.mark.parametrize("model", formulas.MODELS, ids=lambda m: m.name)
def test_all_ranks_together_have_every_head(model: formulas.Model) -> None:
    for part in model.parts:
        for gpus in formulas.GPUS:
            heads, keys = formulas.share(model, part, gpus)
            assert heads * gpus >= model.layers * part.heads
            assert 1 <= keys <= heads
        # with one replica a rank has all heads of its stage
        alone, _ = formulas.share(model, part, model.tensor * model.pipeline)
        assert alone >= model.layers * part.heads / (model.tensor * model.pipeline)


def test_more_replicas_cost_less_compute_and_memory() -> None:
    for model in formulas.MODELS:
        rows = [formulas.plan(model, gpus, 10) for gpus in formulas.GPUS]
        for name in ("flops", "bytes", "memory"):
            course = [row[name] for row in rows]
            assert course == sorted(course, reverse=True)


def test_tables_are_put_between_their_marks() -> None:
    document = "a\n<!-- plan -->\nold\n<!-- end of plan -->\nb\n"
    assert planning.put(document, "plan", "new\n") == document.replace("old", "new")
