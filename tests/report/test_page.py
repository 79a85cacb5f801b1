from __future__ import annotations

import re

import pytest

from mcore_monitors.recovery.ledger import APPLIED, PLANNED
from mcore_monitors.report import write_report
from mcore_monitors.report.read import read_run
from mcore_monitors.report.story import tell
from tests.report import make


def page_of(run, *compare) -> make.Page:
    return make.Page(write_report(run, compare=compare).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory) -> make.Page:
    return page_of(make.rolled_back(tmp_path_factory.mktemp("runs") / "recovered"))


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> make.Page:
    return page_of(make.calm(tmp_path_factory.mktemp("runs") / "calm"))


def test_headline_tells_the_whole_story(rolled_back):
    assert rolled_back.headline == (
        "attention/key_shift raised the alarm at iteration 210 in layers 1–2; the run went back "
        "to the checkpoint of iteration 100 and passed the old alarm quietly: recovered."
    )
    assert "wrong numbers in the attention. The kernel is wrong." in rolled_back.text
    assert "iteration 200, 10 steps before the alarm" in rolled_back.text


def test_many_alarms_are_one_line(rolled_back):
    line = "attention/key_shift, layers 1–2, 8 query groups: worst 0.002 against a limit of 1.0e-5"
    assert rolled_back.text.count(line) == 2  # in the head and in the table of events
    rows = [attributes for tag, attributes in rolled_back.tags if tag == "tr"]
    assert sum(row.get("class") == "alarm" for row in rows) == 1


def test_rollback_injection_alarm_and_checkpoints_are_drawn(rolled_back, calm):
    for words in ("rollback to 100", "fault injected at 200", "alarm at 210, onset 200"):
        assert words in rolled_back.text
        assert words not in calm.text
    for colour in ("left", "drill"):
        assert rolled_back.strokes(colour, dashed=True) > 0
        assert calm.strokes(colour) == 0
    for colour in ("alarm", "good", "pending"):
        assert rolled_back.strokes(colour) > 0
        assert calm.strokes(colour) == 0
    assert calm.strokes("main") > 0


def test_limit_is_drawn_with_and_without_an_alarm(rolled_back, calm):
    assert "limit 1e-5" in rolled_back.text
    assert "limit 1e-5" in calm.text


def test_a_checkpoint_written_again_keeps_both_stories(rolled_back):
    rows = [a.get("class") for tag, a in rolled_back.tags if tag == "tr"]
    assert [kind for kind in rows if kind in ("verified", "pending", "suspect")] == [
        "verified", "suspect", "pending",
    ]  # fmt: skip


def test_calm_run_has_a_calm_page(calm):
    assert calm.headline == ("A calm run up to iteration 300: no signal left its healthy course.")
    assert ("header", {"class": "calm"}) in calm.tags


def test_warning_is_not_an_alarm(tmp_path):
    samples = [make.make_sample(i) for i in range(10, 301, 10)]
    warning = make.alarm(
        200, 2, None, signal=make.SIMILARITY, severity="warning", rule="band", limit=None,
        band={"median": 0.0, "low": -1.0, "high": 1.0, "z": 7.0},
    )  # fmt: skip
    page = page_of(make.write(tmp_path / "run", samples, [make.start(0, 0), warning]))
    assert page.headline.startswith("A calm run up to iteration 300: 1 warning, no alarm")
    assert ("header", {"class": "warned"}) in page.tags
    assert page.strokes("alarm") == 0
    assert "router/weight_similarity in layer 2: 0.002 against a usual 0" in page.text


def test_alarm_without_recovery_says_that_nothing_was_done(tmp_path):
    samples = [make.make_sample(i, shift=1e-3 if i >= 200 else 5e-8) for i in range(10, 301, 10)]
    events = [{**make.start(0, 0), "mode": "log"}, *make.alarms()]
    story = tell(read_run(make.write(tmp_path / "run", samples, events)))
    assert story.headline.endswith("in layers 1–2; nothing was changed.")
    assert ("Done", "nothing; recovery.mode is log") in story.facts


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (PLANNED, "is written; start the run again and it will be obeyed."),
        (APPLIED, "ended before it had passed the old alarm quietly for long enough."),
    ],
)
def test_plan_that_is_not_done_yet(tmp_path, status, words):
    story = tell(read_run(make.rolled_back(tmp_path / "run", status)))
    assert story.headline.endswith(words)
    assert story.state == "recovering"


def test_run_that_gave_up_says_why(tmp_path):
    run = make.rolled_back(tmp_path / "run", "failed")
    with (run / "events.jsonl").open("a") as log:
        log.write(
            '{"v":1,"time":1.7e9,"kind":"gave_up","iteration":300,"attempt":1,'
            '"reason":"two attempts did not help"}\n'
        )
    story = tell(read_run(run))
    assert story.headline.endswith("and gave up in the end.")
    assert ("Gave up", "two attempts did not help") in story.facts


def test_compared_runs_are_drawn_and_named(tmp_path, calm):
    run = make.calm(tmp_path / "run")
    other = make.calm(tmp_path / "left-alone", end=200)
    page = page_of(run, other)
    assert "left-alone: the same loss at every step" in page.text
    assert page.strokes("other0") > 0
    assert page.strokes("other1") == 0
    assert calm.strokes("other0") == 0


def test_cost_is_a_share_of_the_step(calm):
    # A sample every 10 s over 10 steps, at 0.1 s a sample.
    assert "Monitoring took 10 ms of a step of 1000 ms" in calm.text
    assert "1.00%" in calm.text


def test_every_signal_is_explained_with_its_source(calm):
    for name in ("attention/key_shift", "attention/delta2_effective_rank"):
        assert name in calm.text
    assert "(here W = 50)" in calm.text
    assert "Source: arXiv 2606.28116 (Mechanism-Driven Monitors), equation 7." in calm.text


def test_page_loads_nothing(tmp_path):
    run = make.rolled_back(tmp_path / "run")
    html = write_report(run, compare=[make.calm(tmp_path / "calm")]).read_text()
    assert not re.search(r"https?:|//|@import|url\((?!#)", html)
    page = make.Page(html)
    assert not {"script", "link", "img", "iframe", "object", "image"} & {t for t, _ in page.tags}
    for _, attributes in page.tags:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    referred = set(re.findall(r'url\(#(\w+)\)|href="#(\w+)"', html))
    names = re.findall(r' id="([^"]+)"', html)
    assert {a or b for a, b in referred} <= set(names)
    assert len(names) == len(set(names))


def test_what_a_run_says_is_inert(tmp_path):
    evil = '<script>alert(1)</script><img src=x onerror="alert(2)">'
    samples = [make.make_sample(i) for i in range(10, 101, 10)]
    for sample in samples:
        sample.signals[f"evil/{evil}$x_$"] = {1: [1.0 + sample.iteration]}
    events = [
        {**make.start(0, 0), "host": evil, "versions": {evil: evil}},
        {**make.drill(50), "fault": evil},
        make.alarm(60, 1, None, signal=f"evil/{evil}$x_$"),
        {**make.diagnosis(evil), "cause": evil},
        {**make.checkpoint(40, 0, evil), "path": evil, "reason": evil},
        {"kind": "message", "iteration": 1, "attempt": 0, "text": evil},
        {"kind": evil, "iteration": 1, "attempt": 0},
        {"kind": "gave_up", "iteration": 100, "attempt": 0, "reason": evil},
    ]
    run = make.write(tmp_path / "a<script>alert(3)<b onclick=x>", samples, events)
    other = make.calm(tmp_path / 'o"><img src=y onerror=alert(4)>', 100)
    page = page_of(run, other)
    tags = {tag for tag, _ in page.tags}
    assert not {"script", "img", "b"} & tags
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 8


def test_what_is_recorded_only_is_folded_away(tmp_path):
    """Judged signals stand first and open; the others are one small figure each, in a fold."""
    rank, stable = "attention/delta2_effective_rank", "attention/delta2_stable_rank"
    samples = []
    for i in range(10, 301, 10):
        sample = make.make_sample(i)
        for layer in make.LAYERS:
            for window in (10, 50, 200) if i % 50 == 0 else (50,):
                ranks = [4.0 + 0.01 * i * layer + unit for unit in range(make.UNITS)]
                sample.signals.setdefault(f"{rank}@{window}", {})[layer] = ranks
                sample.signals.setdefault(f"{stable}@{window}", {})[layer] = ranks
            sample.signals.setdefault(f"{rank}/rope@50", {})[layer] = ranks
            sample.signals.setdefault("attention/unheard_of", {})[layer] = ranks
        samples.append(sample)
    start = make.start(0, 0) | {"windows": [50]}
    page = page_of(make.write(tmp_path / "run", samples, [start, make.stop(300, 0, 0)]))
    html = (tmp_path / "run" / "report.html").read_text()
    before, _, fold = html.partition("<details>")
    judged = re.findall(r"<h3><code>([^<]*)</code>", before)
    assert judged == [f"{rank}/rope@50", f"{rank}@50", make.KEY_SHIFT, make.SIMILARITY]
    fold = fold.partition("</details>")[0]
    assert "3 more signals, recorded only" in fold
    assert fold.count("<svg") == 3
    # the windows of one signal are in one figure, each named at its end
    assert all(f">{window}</text>" in fold for window in (10, 50, 200))
    assert "attention/unheard_of" in fold
    assert "The size of" not in page.text and "moves later than the effective rank" in page.text
