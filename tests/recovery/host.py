"""A host in miniature: it counts iterations and samples, writes checkpoints, and obeys orders.

Enough of a training to see what recovery makes of it: which samples were trained on from which
weights, and whether a fault was in them.
"""

from __future__ import annotations

import json
from pathlib import Path

from mcore_monitors.detection import Alarm, Diagnosis, Verdict
from mcore_monitors.recovery import Action, Recovery, RecoveryConfig, StartOrder, resolve_start

INTERVAL, SAVE_EVERY, BATCH = 10, 50, 8
CONFIG = RecoveryConfig(mode="rollback", quiet=100)


def verdict(onset: int, cause: str = "attention_numerics", severity: str = "critical") -> Verdict:
    """Return a verdict with one alarm that began at ``onset``."""
    alarm = Alarm(
        signal="attention/key_shift",
        layer=1,
        unit=0,
        iteration=onset + INTERVAL,
        onset_iteration=onset,
        severity=severity,
        rule="limit",
        value=1e-3,
        limit=1e-5,
    )
    diagnosis = Diagnosis(
        cause=cause,
        confidence=0.9,
        severity=severity,
        onset_iteration=onset,
        signals=(alarm.signal,),
        sentence=f"{cause} since {onset}.",
    )
    return Verdict(alarms=(alarm,), active=(alarm,), diagnosis=diagnosis, standing=diagnosis)


QUIET = Verdict()


class Host:
    """One process of a run; a new one is made at every start.

    Its weights are the list of faults and of sample ranges that went into them.
    """

    def __init__(self, root: Path, config: RecoveryConfig = CONFIG, *, fault_at: int = 605) -> None:
        self.root, self.config, self.fault_at = root, config, fault_at
        self.run_dir = root / "run"
        self.order: StartOrder | None = resolve_start(self.run_dir, config.mode)
        self.iteration = self.consumed = 0
        self.damage, self.safe = 0, False
        path = self._newest()
        if self.order is not None:
            path = Path(self.order.checkpoint_path)
        if path is not None:
            state = json.loads((path / "state.json").read_text())
            self.iteration, self.consumed = state["iteration"], state["consumed"]
            self.damage = state["damage"]
        if self.order is not None:
            assert self.iteration == self.order.iteration
            self.consumed += self.order.pass_over_samples
            self.safe = self.order.remedy.attention == "safe"
        self.recovery = Recovery.open(self.run_dir, config, interval=INTERVAL)
        self.recovery.on_start()
        self.actions: list[Action] = []

    def _newest(self) -> Path | None:
        pointer = self.root / "checkpoints" / "latest"
        return Path(pointer.read_text()) if pointer.exists() else None

    def save(self) -> None:
        path = self.root / "checkpoints" / f"iter_{self.iteration:07d}"
        path.mkdir(parents=True, exist_ok=True)
        state = {"iteration": self.iteration, "consumed": self.consumed, "damage": self.damage}
        (path / "state.json").write_text(json.dumps(state))
        (path.parent / "latest").write_text(str(path))
        self.act(
            self.recovery.on_checkpoint(
                iteration=self.iteration, path=str(path), consumed_samples=self.consumed
            )
        )

    def act(self, action: Action) -> None:
        self.actions.append(action)

    def faulty(self) -> bool:
        """Whether this iteration's gradients are wrong."""
        return self.iteration > self.fault_at and not self.safe

    def run(self, until: int) -> int:
        """Train; return the exit code, 0 at the end."""
        bad = 0
        while self.iteration < until:
            self.iteration += 1
            self.consumed += BATCH
            self.damage += self.faulty()
            if self.iteration % INTERVAL == 0:
                bad = bad + 1 if self.faulty() else 0
                found = verdict(self.iteration - INTERVAL) if bad >= 2 else QUIET
                action = self.recovery.on_verdict(
                    found, iteration=self.iteration, consumed_samples=self.consumed
                )
                self.act(action)
                if action.kind in ("rollback", "gave_up"):
                    return {"rollback": 85, "gave_up": 86}[action.kind]
            if self.iteration % SAVE_EVERY == 0:
                self.save()
        return 0

    def events(self, kind: str) -> list[dict]:
        return [fields for action in self.actions for name, fields in action.events if name == kind]
