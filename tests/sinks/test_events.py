from __future__ import annotations

import math

import pytest

from mcore_monitors.errors import MonitorsError
from mcore_monitors.sinks.events import KINDS, EventFollower, EventReader, EventWriter
from tests.sinks.make import alarm, diagnosis, sample

FROZEN = {
    "start": {"world_size", "layers", "monitors", "mode", "limits", "host", "versions"},
    "resume": {"from_iteration"},
    "drill": {"fault", "strength", "layers", "from_iteration"},
    "alarm": {
        "signal",
        "layer",
        "unit",
        "onset_iteration",
        "severity",
        "rule",
        "value",
        "evidence",
    },
    "diagnosis": {"cause", "confidence", "signals", "sentence"},
    "checkpoint": {"path", "status"},
    "rollback": {"plan"},
    "remedy": set(),
    "recovered": {"plan_id"},
    "gave_up": {"reason"},
    "monitor_disabled": {"monitor", "error"},
    "message": {"text"},
    "stop": {"exit_code"},
}


def test_kinds_and_fields_are_frozen():
    for kind, fields in FROZEN.items():
        assert fields <= set(KINDS[kind]), kind


def test_events_carry_version_and_time_and_no_nan(tmp_path):
    writer = EventWriter(tmp_path)
    writer.event(alarm(600, value=math.nan, where=tmp_path, many=(1, 2)))
    [event] = EventReader(tmp_path).read()
    assert event["v"] == 1 and event["time"] > 1e9
    assert event["kind"] == "alarm" and event["iteration"] == 600 and event["attempt"] == 0
    assert event["value"] is None and event["where"] == str(tmp_path) and event["many"] == [1, 2]


def test_torn_last_event_and_a_second_writer(tmp_path):
    writer = EventWriter(tmp_path)
    writer.event(alarm(600))
    writer.close()
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write(b'{"v":1,"kind":"stop"')
    assert len(EventReader(tmp_path).read()) == 1
    writer = EventWriter(tmp_path)
    writer.event({"kind": "stop", "iteration": 610, "attempt": 0, "exit_code": 85})
    assert [event["kind"] for event in EventReader(tmp_path).read()] == ["alarm", "stop"]


def test_a_line_that_is_no_object_is_named(tmp_path):
    (tmp_path / "events.jsonl").write_text("[1]\n{}\n")
    with pytest.raises(MonitorsError, match=r"events\.jsonl, line 1: not a JSON object"):
        EventReader(tmp_path).read()


class Seen(list):
    def sample(self, sample):
        self.append(("sample", sample.iteration))

    def event(self, event):
        self.append((event["kind"], event["iteration"]))

    def close(self, exit_code=0):
        self.append(("close", exit_code))


def test_a_sink_on_another_rank_gets_what_rank_0_writes(tmp_path):
    writer = EventWriter(tmp_path)
    writer.event(alarm(590))
    seen = Seen()
    follower = EventFollower(seen, tmp_path)
    follower.sample(sample(600))
    writer.event(alarm(610))
    follower.event(alarm(610))
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write(b'{"v":1,"kind":"dia')
        file.flush()
        follower.sample(sample(610))
        file.write(b'gnosis","iteration":610}\n')
    writer.event(diagnosis(620))
    follower.close(85)
    assert seen == [
        ("sample", 600),
        ("alarm", 610),
        ("sample", 610),
        ("diagnosis", 610),
        ("diagnosis", 620),
        ("close", 85),
    ]


def test_a_sink_on_another_node_without_the_folder_gets_samples(tmp_path):
    seen = Seen()
    follower = EventFollower(seen, tmp_path / "elsewhere")
    follower.sample(sample(600))
    follower.close()
    assert seen == [("sample", 600), ("close", 0)]
