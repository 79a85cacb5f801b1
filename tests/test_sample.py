"""The history record is a contract: names, nulls and digits are frozen here."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from mcore_monitors.catalogue import SIGNALS, base_name, part_name
from mcore_monitors.errors import MonitorsError
from mcore_monitors.sample import Sample
from tests.sinks.make import sample

RECORD_FIELDS = [
    "v",
    "iteration",
    "attempt",
    "time",
    "consumed_samples",
    "first_step",
    "loss",
    "grad_norm",
    "learning_rate",
    "signals",
    "cost_seconds",
]
SIGNAL_NAMES = {
    "attention/key_shift": ("conservation", "query group", "limit"),
    "attention/delta2_effective_rank": ("weights", "head", "low"),
    "attention/delta2_spectral_entropy": ("weights", "head", "record"),
    "attention/delta2_frobenius": ("weights", "head", "record"),
    "attention/delta2_stable_rank": ("weights", "head", "record"),
    "attention/delta3_effective_rank": ("weights", "head", "record"),
    "attention/delta3_spectral_entropy": ("weights", "head", "record"),
    "attention/delta3_frobenius": ("weights", "head", "record"),
    "attention/delta3_stable_rank": ("weights", "head", "record"),
    "attention/query_update_effective_rank": ("weights", "head", "record"),
    "attention/query_update_spectral_entropy": ("weights", "head", "record"),
    "attention/query_update_frobenius": ("weights", "head", "record"),
    "attention/query_update_stable_rank": ("weights", "head", "record"),
    "attention/key_update_effective_rank": ("weights", "query group", "record"),
    "attention/key_update_spectral_entropy": ("weights", "query group", "record"),
    "attention/key_update_frobenius": ("weights", "query group", "record"),
    "attention/key_update_stable_rank": ("weights", "query group", "record"),
    "attention/query_update_spike_strength": ("weights", "head", "record"),
    "attention/query_update_outliers": ("weights", "head", "record"),
    "attention/key_update_spike_strength": ("weights", "query group", "record"),
    "attention/key_update_outliers": ("weights", "query group", "record"),
    "attention/delta2_direction_overlap": ("weights", "head", "record"),
    "attention/persistent_spike": ("weights", "head", "record"),
    "router/weight_similarity": ("weights", "layer", "both"),
    "router/centred_conditioning": ("weights", "layer", "both"),
    "router/routing_entropy": ("activations", "layer", "both"),
    "router/routing_entropy_normalised": ("activations", "layer", "both"),
}


def test_record_fields_and_version_are_frozen():
    record = sample(600).to_record()
    assert list(record) == RECORD_FIELDS
    assert record["v"] == 1
    assert record["signals"]["attention/delta2_effective_rank@50"]["1"] == [5.0, 4.0, 6.0, 7.0]


def test_signal_names_are_frozen():
    found = {name: (info.family, info.unit, info.watch) for name, info in SIGNALS.items()}
    assert SIGNAL_NAMES.items() <= found.items()
    assert all(info.name == name and info.formula and info.source for name, info in SIGNALS.items())
    with pytest.raises(TypeError):
        SIGNALS["mine"] = None


def test_not_finite_becomes_null_and_comes_back():
    nan, inf = math.nan, math.inf
    full = sample(
        10,
        loss=[nan, 1.0, None],
        grad_norm=[inf],
        learning_rate=nan,
        signals={"x": {3: [nan, -inf]}},
    )
    text = json.dumps(full.to_record(), allow_nan=False)
    assert json.loads(full.to_json()) == json.loads(text)
    back = Sample.from_record(json.loads(text))
    assert back.loss == [None, 1.0, None]
    assert back.grad_norm == [None]
    assert back.learning_rate is None
    assert all(math.isnan(value) for value in back.signals["x"][3])


def test_round_trip_keeps_seven_digits():
    values = [3.4444444444e-8, -0.0, 5.0, 1.23456789e12, -2.5e-300]
    full = sample(10, loss=[1.23456789], signals={"x": {1: values}, 'y"z': {1: [], 12: [0.1]}})
    record = full.to_record()
    assert json.loads(full.to_json()) == record
    assert list(json.loads(full.to_json())) == list(record)
    assert record["loss"] == [1.234568]
    assert record["signals"]["x"]["1"] == [3.444444e-8, 0.0, 5.0, 1.234568e12, -2.5e-300]
    assert Sample.from_record(record).to_record() == record


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"v": 2}, "version 2"),
        ({"iteration": "many"}, "many"),
        ({"signals": [1]}, "AttributeError"),
    ],
)
def test_foreign_record_is_refused(change, word):
    with pytest.raises(MonitorsError, match=word):
        Sample.from_record({**sample(10).to_record(), **change})


def test_missing_field_is_named():
    record = sample(10).to_record()
    del record["grad_norm"]
    with pytest.raises(MonitorsError, match="grad_norm"):
        Sample.from_record(record)


def test_window_is_not_part_of_the_base_name():
    assert base_name("a/b@50") == base_name("a/b") == "a/b"


def test_part_is_not_part_of_the_base_name():
    assert part_name("a/b", "rope") == "a/b/rope"
    assert part_name("a/b", "") == "a/b"
    assert base_name("a/b/rope@50") == base_name("a/b/nope") == "a/b"


def test_reading_a_recorded_run_needs_neither_torch_nor_wandb():
    code = (
        "import sys, mcore_monitors.sample, mcore_monitors.sinks, mcore_monitors.sinks.console;"
        "assert not {'torch', 'wandb', 'matplotlib', 'megatron'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
