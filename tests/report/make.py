"""Run folders for the report's tests, written by the package's own writers."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from mcore_monitors.recovery.config import Remedy
from mcore_monitors.recovery.ledger import DONE, Checkpoint, Ledger, Plan
from mcore_monitors.sample import Sample
from mcore_monitors.sinks.events import EventWriter
from mcore_monitors.sinks.history import HistoryWriter

KEY_SHIFT, DELTA2, SIMILARITY = (
    "attention/key_shift",
    "attention/delta2_effective_rank@50",
    "router/weight_similarity",
)
INTERVAL = 10
LAYERS, UNITS = (1, 2), 4


def make_sample(iteration: int, attempt: int = 0, *, shift: float = 5e-8) -> Sample:
    first = iteration - INTERVAL + 1
    return Sample(
        iteration=iteration,
        attempt=attempt,
        time=1.7e9 + 1000 * attempt + iteration,
        consumed_samples=8 * iteration,
        first_step=first,
        loss=[5.0 - i / 200 for i in range(first, iteration + 1)],
        grad_norm=[1.0 + (i % 7) / 10 for i in range(first, iteration + 1)],
        learning_rate=1e-3,
        signals={
            KEY_SHIFT: {layer: [shift * (1 + u) for u in range(UNITS)] for layer in LAYERS},
            DELTA2: {layer: [5.0 + u for u in range(UNITS)] for layer in LAYERS},
            SIMILARITY: {layer: [0.01 * layer] for layer in LAYERS},
        },
        cost_seconds=0.1,
    )


def write(folder: Path, samples: list[Sample], events: list[dict]) -> Path:
    history, log = HistoryWriter(folder), EventWriter(folder)
    for sample in samples:
        history.sample(sample)
    for event in events:
        log.event(event)
    history.close()
    log.close()
    return folder


def calm(folder: Path, end: int = 300) -> Path:
    samples = [make_sample(i) for i in range(INTERVAL, end + 1, INTERVAL)]
    return write(folder, samples, [start(0, 0), stop(end, 0, 0)])


def start(iteration: int, attempt: int) -> dict:
    versions = {"megatron-core": "0.19.2"}
    return {
        "kind": "start", "iteration": iteration, "attempt": attempt, "host": "megatron-core",
        "world_size": 2, "layers": 2, "monitors": [], "mode": "rollback", "versions": versions,
        "limits": {KEY_SHIFT: 1e-5},
    }  # fmt: skip


def stop(iteration: int, attempt: int, code: int) -> dict:
    return {"kind": "stop", "iteration": iteration, "attempt": attempt, "exit_code": code}


def alarm(iteration: int, layer: int, unit: int | None, **fields) -> dict:
    return {
        "kind": "alarm", "iteration": iteration, "attempt": 0, "signal": KEY_SHIFT,
        "layer": layer, "unit": unit, "onset_iteration": iteration - INTERVAL,
        "severity": "critical", "rule": "limit", "value": 1e-3 * layer, "limit": 1e-5,
        "evidence": "", **fields,
    }  # fmt: skip


def alarms(iteration: int = 210) -> list[dict]:
    """Every query group of every layer."""
    return [alarm(iteration, layer, unit) for layer in LAYERS for unit in range(UNITS)]


def drill(iteration: int = 200) -> dict:
    return {
        "kind": "drill", "iteration": iteration, "attempt": 0, "fault": "attention_row_term",
        "strength": 0.003, "layers": [1, 2], "from_iteration": iteration,
    }  # fmt: skip


def diagnosis(sentence: str) -> dict:
    return {
        "kind": "diagnosis", "iteration": 210, "attempt": 0, "cause": "attention_numerics",
        "confidence": 0.9, "signals": [KEY_SHIFT], "severity": "critical", "sentence": sentence,
    }  # fmt: skip


def checkpoint(iteration: int, attempt: int, status: str, at: int | None = None) -> dict:
    return {
        "kind": "checkpoint", "iteration": at or iteration, "attempt": attempt, "status": status,
        "path": f"/ckpt/{iteration}", "checkpoint_iteration": iteration, "reason": "",
    }  # fmt: skip


def plan(status: str = DONE) -> Plan:
    return Plan(
        id="rollback-1", attempt=1, episode_attempt=1, created_at=1.7e9, status=status,
        alarm_iteration=210, onset_iteration=200, cause="attention_numerics", sentence="why",
        checkpoint_iteration=100, checkpoint_path="/ckpt/100", pass_over_samples=0,
        passed_over_total=0, remedy=Remedy(attention="safe"),
    )  # fmt: skip


def rolled_back(folder: Path, status: str = DONE, sentence: str = "The kernel is wrong.") -> Path:
    """Fault at 200, alarm at 210, back to 100, on to 300."""
    before = [make_sample(i, shift=1e-3 if i >= 200 else 5e-8) for i in range(10, 211, 10)]
    after = [make_sample(i, 1) for i in range(110, 301, 10)]
    events = [
        start(0, 0), drill(),
        checkpoint(100, 0, "pending"), checkpoint(100, 0, "verified", 180),
        checkpoint(200, 0, "pending"),
        *alarms(), diagnosis(sentence), checkpoint(200, 0, "suspect", 210),
        {"kind": "rollback", "iteration": 210, "attempt": 0,
         "plan": {"checkpoint_iteration": 100, "remedy": {"attention": "safe"}}},
        stop(210, 0, 85), start(100, 1),
        {"kind": "resume", "iteration": 100, "attempt": 1, "from_iteration": 100},
        checkpoint(200, 1, "pending"),
        stop(300, 1, 0),
    ]  # fmt: skip
    write(folder, [*before, *after], events)
    ledger = Ledger.load(folder)
    for iteration, attempt, state in ((100, 0, "verified"), (200, 1, "pending")):
        ledger.enter(
            Checkpoint(
                iteration=iteration,
                attempt=attempt,
                path=f"/ckpt/{iteration}",
                status=state,
                written_at=1.7e9,
                consumed_samples=8 * iteration,
                digest="sha256:0",
            )  # fmt: skip
        )
    ledger.plans.append(plan(status))
    ledger.save()
    return folder


class Page(HTMLParser):
    """A page taken apart: tags with their attributes, and the text that a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.headings: dict[str, str] = {}
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside == "style":
            return
        self.words.append(data)
        if inside == "h1":
            self.headings["h1"] = data

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    @property
    def headline(self) -> str:
        return self.headings["h1"]

    def strokes(self, colour: str, *, dashed: bool = False) -> int:
        """Number of paths drawn in a colour of the page."""
        return sum(
            f"stroke: var(--{colour})" in (attributes.get("style") or "")
            and (not dashed or "stroke-dasharray" in (attributes.get("style") or ""))
            for tag, attributes in self.tags
            if tag == "path"
        )
