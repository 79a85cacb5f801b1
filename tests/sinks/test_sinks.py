from __future__ import annotations

import pytest

from mcore_monitors.errors import ConfigError
from mcore_monitors.sinks import Sinks
from mcore_monitors.sinks.config import WandbConfig
from mcore_monitors.sinks.events import EventReader, EventWriter
from mcore_monitors.sinks.history import HistoryReader, HistoryWriter
from tests.sinks.make import alarm, sample


class Breaks:
    """A sink that fails at a given call."""

    def __init__(self, at):
        self.at, self.calls = at, []

    def _call(self, name):
        self.calls.append(name)
        if name == self.at:
            raise OSError("no space left on device")

    def sample(self, sample):
        self._call("sample")

    def event(self, event):
        self._call("event")

    def close(self, exit_code=0):
        self._call("close")


def test_no_part_does_nothing():
    sinks = Sinks()
    sinks.sample(sample(10))
    sinks.event(alarm(10))
    sinks.close()


@pytest.mark.parametrize("at", ["sample", "event"])
def test_a_failing_part_goes_off_with_one_message_and_an_event(tmp_path, capsys, at):
    broken = Breaks(at)
    sinks = Sinks([broken, HistoryWriter(tmp_path), EventWriter(tmp_path)])
    for iteration in (10, 20):
        sinks.sample(sample(iteration))
        sinks.event(alarm(iteration))
    sinks.close()
    assert broken.calls.count(at) == 1 and "close" not in broken.calls
    assert capsys.readouterr().err.count("training goes on") == 1
    assert [one.iteration for one in HistoryReader(tmp_path).read()] == [10, 20]
    [event] = [e for e in EventReader(tmp_path).read() if e["kind"] == "monitor_disabled"]
    assert event["monitor"] == "sinks/Breaks" and "no space left" in event["error"]
    assert event["iteration"] == 10


def test_strict_raises():
    sinks = Sinks([Breaks("sample")], strict=True)
    with pytest.raises(OSError, match="no space left"):
        sinks.sample(sample(10))


def test_a_full_disk_turns_the_history_off(capsys):
    # The kernel's own full device.
    writer = HistoryWriter.__new__(HistoryWriter)
    from mcore_monitors.sinks.jsonl import JsonLines

    writer._lines = JsonLines("/dev/full")
    sinks = Sinks([writer])
    sinks.sample(sample(10))
    assert sinks.parts == () and "No space left" in capsys.readouterr().err


def test_one_time_stamp_for_all_parts(tmp_path):
    seen = []
    part = Breaks("never")
    part.event = seen.append
    sinks = Sinks([part, EventWriter(tmp_path)])
    sinks.event(alarm(10))
    [event] = EventReader(tmp_path).read()
    assert seen == [event]


@pytest.mark.parametrize(
    ("setting", "value", "word"),
    [
        ("enabled", "atuo", "Did you mean 'auto'"),
        ("enabled", 1, "auto, true or false"),
        ("project", " ", "a non-empty text"),
        ("name", "", "or null"),
        ("entity", 3, "or null"),
    ],
)
def test_bad_settings_are_named(setting, value, word):
    with pytest.raises(ConfigError, match=word) as caught:
        WandbConfig(**{setting: value})
    assert caught.value.setting == f"wandb.{setting}"


def test_good_settings():
    for enabled in (True, False, "auto"):
        assert WandbConfig(enabled=enabled).enabled is enabled
