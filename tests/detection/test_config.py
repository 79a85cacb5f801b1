"""Settings of detection: what cannot be used says so by name."""

from __future__ import annotations

import pytest

from mcore_monitors.detection import DetectionConfig
from mcore_monitors.errors import ConfigError


def test_defaults_are_frozen():
    config = DetectionConfig()
    values = (config.warmup, config.reference, config.lag, config.threshold, config.sustain)
    assert values == (200, 20, 2, 6.0, 3)
    assert config.limit is None


@pytest.mark.parametrize(
    "setting, value",
    [
        ("warmup", -1),
        ("warmup", 2.5),
        ("reference", 11),
        ("lag", -1),
        ("threshold", 0),
        ("threshold", "6"),
        ("threshold", float("nan")),
        ("threshold", float("inf")),
        ("sustain", 0),
        ("sustain", True),
        ("limit", 0.0),
        ("limit", "1e-5"),
    ],
)
def test_a_bad_value_is_refused_by_name(setting, value):
    with pytest.raises(ConfigError) as error:
        DetectionConfig(**{setting: value})
    assert error.value.setting == f"detection.{setting}"
    assert error.value.value is value


def test_slowest_delay_counts_the_sustained_samples_and_the_longest_window():
    assert DetectionConfig().slowest_delay(10, [10, 50]) == 80
    assert DetectionConfig().slowest_delay(10, [200]) == 200 + 3 * 40  # compared every 40
    # a residual: twice not looked at, over its limit, over its limit again
    assert DetectionConfig(sustain=1).slowest_delay(10) == 40
