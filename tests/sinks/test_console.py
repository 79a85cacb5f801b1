from __future__ import annotations

import io
import math

from mcore_monitors.sinks.console import Console
from tests.sinks.make import alarm, sample


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_sample_is_one_line_that_names_the_worst_places():
    stream = io.StringIO()
    console = Console(stream)
    console.sample(sample(600))
    console.sample(sample(610))
    first, second = stream.getvalue().splitlines()
    assert "iteration 600 | loss 1.4 | grad norm 1.5" in first
    assert "key shift 2.0e-7 (layer 1)" in first
    assert "Δ2 rank 4 (layer 1 head 1)" in first
    assert "routing entropy 1.7 nat" in first
    # 0.01 s of monitoring in the second between two samples.
    assert "cost" not in first and second.endswith("cost 1.0%")


def test_of_several_windows_the_judged_one_is_told():
    stream = io.StringIO()
    several = sample(600)
    several.signals["attention/delta2_effective_rank@10"] = {1: [2.0]}
    several.signals["attention/delta2_effective_rank@200"] = {1: [3.0]}
    Console(stream, windows=[50]).sample(several)
    Console(stream).sample(several)
    first, second = stream.getvalue().splitlines()
    assert "Δ2 rank 4 (layer 1 head 1)" in first
    assert "Δ2 rank 3 (layer 1 head 0)" in second


def test_alarms_stand_out_and_checkpoints_are_silent():
    stream = io.StringIO()
    console = Console(stream)
    console.event(alarm(620))
    console.event(
        {"kind": "checkpoint", "iteration": 620, "attempt": 0, "path": "x", "status": "pending"}
    )
    [line] = stream.getvalue().splitlines()
    assert line == (
        "monitors | !!! ALARM at iteration 620 | attention/key_shift in layer 2, query group 1: "
        "0.0052 against a limit of 1.0e-5; onset at iteration 610"
    )


def test_a_rollback_says_where_to_and_what_changes():
    stream = io.StringIO()
    plan = {
        "checkpoint_iteration": 550,
        "pass_over_samples": 80,
        "remedy": {"attention": "safe", "learning_rate_factor": 0.5, "pass_over": 80},
    }
    Console(stream).event({"kind": "rollback", "iteration": 620, "attempt": 0, "plan": plan})
    assert stream.getvalue() == (
        "monitors | ROLLBACK at iteration 620 | back to the checkpoint of iteration 550, passing "
        "over 80 samples, on the safe attention path, learning rate × 0.5\n"
    )


def test_colour_only_on_a_terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    plain, colour, asked = io.StringIO(), Terminal(), Terminal()
    Console(plain).event(alarm(620))
    Console(colour).event(alarm(620))
    monkeypatch.setenv("NO_COLOR", "1")
    Console(asked).event(alarm(620))
    assert "\x1b[1;31m" in colour.getvalue()
    assert "\x1b" not in plain.getvalue() + asked.getvalue()


def test_nothing_known_is_a_dash_and_an_old_code_page_is_no_error():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="latin-1")
    empty = sample(10, loss=[None], grad_norm=[], signals={"attention/key_shift": {1: [math.nan]}})
    console = Console(stream)
    console.sample(empty)
    console.sample(sample(20))
    stream.flush()
    lines = raw.getvalue().decode("latin-1").splitlines()
    assert lines[0] == "monitors | iteration 10 | loss ? | grad norm ?"
    assert "?2 rank 4" in lines[1]
