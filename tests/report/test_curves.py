from __future__ import annotations

import numpy as np

from mcore_monitors.report.curves import smooth, thin
from mcore_monitors.report.data import readings, steps
from mcore_monitors.report.figures import LAYERS, layers_of
from mcore_monitors.report.read import read_run
from mcore_monitors.report.story import layers_text
from tests.report import make


def test_thin_keeps_the_extremes():
    x = np.arange(100_000.0)
    y = np.sin(x / 1000)
    y[54_321], y[77_777] = 50.0, -50.0
    few_x, few_y = thin(x, y, 1000)
    assert len(few_x) <= 1002
    assert (few_x[few_y.argmax()], few_x[few_y.argmin()]) == (54_321, 77_777)
    assert (few_x[0], few_x[-1]) == (0, 99_999)
    assert (np.diff(few_x) > 0).all()


def test_smooth_ignores_a_spike_and_keeps_gaps():
    y = np.ones(100)
    y[50], y[70] = 1e6, np.nan
    smoothed = smooth(y)
    assert np.isnan(smoothed[70])
    assert (np.delete(smoothed, 70) == 1).all()


def test_course_leaves_out_what_was_abandoned(tmp_path):
    run = read_run(make.rolled_back(tmp_path / "run"))
    x, _ = steps(run.samples, "loss")
    assert x.tolist() == list(range(1, 301))
    (left,) = run.abandoned
    assert steps(left, "loss")[0].tolist() == list(range(100, 211))
    at, values = readings(left, make.KEY_SHIFT)
    assert at.tolist() == list(range(100, 211, 10))
    assert values.shape == (12, 8)


def test_readings_of_one_layer_and_with_gaps(tmp_path):
    samples = [make.make_sample(i) for i in (10, 20, 30)]
    samples[0].signals = {}
    samples[1].signals[make.DELTA2] = {2: [1.0, float("nan")]}
    at, values = readings(samples, make.DELTA2, 2)
    assert at.tolist() == [20, 30]
    np.testing.assert_array_equal(values, [[1.0, np.nan, np.nan, np.nan], [5.0, 6.0, 7.0, 8.0]])


def test_of_many_layers_those_with_alarms_are_drawn(tmp_path):
    sample = make.make_sample(10)
    sample.signals = {make.SIMILARITY: {layer: [0.0] for layer in range(1, 49)}}
    event = make.alarm(10, 40, None, signal=make.SIMILARITY)
    run = read_run(make.write(tmp_path / "run", [sample], [event]))
    layers, count = layers_of(run, make.SIMILARITY)
    assert (len(layers), count) == (LAYERS, 48)
    assert 40 in layers


def test_layers_in_words():
    assert layers_text([]) == "the model"
    assert layers_text([3]) == "layer 3"
    assert layers_text([4, 1, 2, 3, 7]) == "layers 1–4, 7"
