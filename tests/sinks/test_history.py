from __future__ import annotations

import subprocess
import sys

import pytest

from mcore_monitors.errors import ConfigError, MonitorsError
from mcore_monitors.sinks.events import EventWriter
from mcore_monitors.sinks.history import (
    HistoryReader,
    HistoryWriter,
    effective,
    effective_history,
    segments,
)
from tests.sinks.make import resume, sample


def write(run, samples):
    writer = HistoryWriter(run)
    for one in samples:
        writer.sample(one)
    writer.close()


def read(run):
    return [(one.attempt, one.iteration) for one in HistoryReader(run).read()]


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path):
    writer = HistoryWriter(tmp_path / "runs" / "new")
    writer.sample(sample(10))
    assert read(tmp_path / "runs" / "new") == [(0, 10)]


def test_torn_last_line_is_left_out_and_then_removed(tmp_path):
    write(tmp_path, [sample(10), sample(20)])
    path = tmp_path / "history.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole) // 2 + 1, len(whole)):
        path.write_bytes(whole[:cut])
        # Without its newline alone the last line is whole.
        assert read(tmp_path) == ([(0, 10)] if cut < len(whole) - 1 else [(0, 10), (0, 20)])
    path.write_bytes(whole[: len(whole) - 40])
    write(tmp_path, [sample(20), sample(30)])
    assert read(tmp_path) == [(0, 10), (0, 20), (0, 30)]


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path):
    write(tmp_path, [sample(10)])
    path = tmp_path / "history.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    write(tmp_path, [sample(20)])
    assert read(tmp_path) == [(0, 10), (0, 20)]


def test_a_torn_line_longer_than_a_read_block_is_removed(tmp_path):
    write(tmp_path, [sample(10)])
    with open(tmp_path / "history.jsonl", "ab") as file:
        file.write(b'{"v":1,"loss":[' + b"1.0," * 50_000)
    write(tmp_path, [sample(20)])
    assert read(tmp_path) == [(0, 10), (0, 20)]


def test_damage_in_the_middle_names_file_and_line(tmp_path):
    write(tmp_path, [sample(10), sample(20), sample(30)])
    path = tmp_path / "history.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"garbage\n" + lines[2])
    with pytest.raises(MonitorsError, match=r"history\.jsonl, line 2: not JSON"):
        read(tmp_path)
    path.write_bytes(lines[0] + b'{"v":1}\n' + lines[2])
    with pytest.raises(MonitorsError, match=r"history\.jsonl, line 2: .*iteration"):
        read(tmp_path)


def test_missing_history_is_named(tmp_path):
    with pytest.raises(MonitorsError, match=r"history\.jsonl: No such file"):
        read(tmp_path)


def test_run_folder_that_cannot_be_made_names_the_setting(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir: .*file") as caught:
        HistoryWriter(tmp_path / "file" / "run")
    assert caught.value.setting == "run_dir"


def test_read_only_run_folder_names_the_setting(tmp_path):
    tmp_path.chmod(0o555)
    # Root may write anywhere, so the check runs as nobody; everything is imported before that.
    code = (
        "import os, sys\n"
        "from mcore_monitors.errors import ConfigError\n"
        "from mcore_monitors.sinks.history import HistoryWriter\n"
        "os.setuid(65534) if os.getuid() == 0 else None\n"
        "try: HistoryWriter(sys.argv[1])\n"
        "except ConfigError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "run_dir" in done.stdout and "Permission denied" in done.stdout, done


def courses(samples, resumes=()):
    return [(one.attempt, one.iteration) for one in effective(samples, resumes)]


def stretch(attempt, first, last):
    return [sample(i, attempt) for i in range(first, last + 1, 10)]


def test_effective_history_across_two_rollbacks():
    samples = stretch(0, 10, 70) + stretch(1, 50, 90) + stretch(2, 30, 60)
    resumes = [resume(40, 1), resume(20, 2)]
    want = [(0, 10), (0, 20), (2, 30), (2, 40), (2, 50), (2, 60)]
    assert courses(samples, resumes) == want
    # The second rollback may also lie inside the first one's replay.
    samples = stretch(0, 10, 70) + stretch(1, 50, 90) + stretch(2, 80, 100)
    resumes = [resume(40, 1), resume(70, 2)]
    want = [(0, i) for i in (10, 20, 30, 40)] + [(1, 50), (1, 60), (1, 70)]
    want += [(2, 80), (2, 90), (2, 100)]
    assert courses(samples, resumes) == want


def test_samples_behind_a_checkpoint_between_two_samples_are_dropped():
    # Checkpoint at 45: the sample at 50 belongs to the abandoned course even if, with another
    # interval, nothing is sampled at 50 again.
    samples = stretch(0, 10, 70) + [sample(60, 1), sample(80, 1)]
    want = [(0, i) for i in (10, 20, 30, 40)] + [(1, 60), (1, 80)]
    assert courses(samples, [resume(45, 1)]) == want


def test_a_crash_is_no_rollback_and_repeats_nothing():
    samples = stretch(0, 10, 70) + stretch(0, 50, 80) + stretch(0, 90, 100)
    resumes = [resume(40, 0), resume(80, 0)]
    assert courses(samples, resumes) == [(0, i) for i in range(10, 101, 10)]


def test_without_resume_events_the_first_repeated_sample_says_where_to_cut():
    samples = stretch(0, 10, 70) + stretch(1, 50, 60)
    assert courses(samples) == [(0, i) for i in (10, 20, 30, 40)] + [(1, 50), (1, 60)]


def test_segments_keep_what_was_abandoned():
    parts = segments(stretch(0, 10, 70) + stretch(1, 50, 60), [resume(40, 1)])
    assert [(p.attempt, p.resumed_from, len(p.samples), p.kept) for p in parts] == [
        (0, None, 7, 4),
        (1, 40, 2, 2),
    ]


def test_effective_history_of_a_folder(tmp_path):
    assert effective_history(tmp_path) == []
    write(tmp_path, stretch(0, 10, 70) + stretch(1, 50, 60))
    events = EventWriter(tmp_path)
    events.event(resume(40, 1))
    found = [(one.attempt, one.iteration) for one in effective_history(tmp_path, upto=50)]
    assert found == [(0, 10), (0, 20), (0, 30), (0, 40), (1, 50)]
