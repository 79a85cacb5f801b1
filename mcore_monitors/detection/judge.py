"""The judge: samples in, verdicts out; a pure function of the history.

It sees a sample exactly as the history records it (seven digits, no infinities), so that replaying
a recorded run gives the verdicts that the run itself got, and a resumed run goes on as if it had
never stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mcore_monitors.catalogue import is_judged
from mcore_monitors.detection.alarm import Diagnosis, Verdict
from mcore_monitors.detection.band import BandRule
from mcore_monitors.detection.config import DetectionConfig
from mcore_monitors.detection.diagnosis import diagnose
from mcore_monitors.detection.limits import LimitRule
from mcore_monitors.sample import Sample


class Judge:
    """Applies every rule to each sample and keeps what is active.

    Args:
        config: the settings of the rules.
        limits: residual (name without window) → limit for the run's number format.
    """

    def __init__(self, config: DetectionConfig, limits: Mapping[str, float] | None = None) -> None:
        self._config, self._given = config, dict(limits or {})
        self._names: dict[str, bool] = {}
        self._start_anew()

    def _start_anew(self) -> None:
        self._rules = (LimitRule(self._config, self._given), BandRule(self._config))
        self._known: tuple[str, float, str] | None = None

    def update(self, sample: Sample) -> Verdict:
        """Judge one sample; iterations must ascend."""
        # What is recorded only can be a thousand times what is judged.
        sample = sample.recorded(self._is_judged)
        alarms = tuple(alarm for rule in self._rules for alarm in rule.update(sample))
        active = tuple(alarm for rule in self._rules for alarm in rule.active())
        judged = {name for rule in self._rules for name in rule.judged}
        standing = diagnose(active, judged, self._rules[0].sizes) if active else None
        return Verdict(
            alarms=alarms, active=active, diagnosis=self._news(standing), standing=standing
        )

    def _is_judged(self, signal: str) -> bool:
        if signal not in self._names:
            self._names[signal] = is_judged(signal, self._config.windows)
        return self._names[signal]

    def _news(self, diagnosis: Diagnosis | None) -> Diagnosis | None:
        """Return the diagnosis if it says something that the last one did not."""
        if diagnosis is None:
            self._known = None
            return None
        known = (diagnosis.cause, diagnosis.confidence, diagnosis.severity)
        if known == self._known:
            return None
        self._known = known
        return diagnosis

    def replay(self, samples: Iterable[Sample]) -> list[Verdict]:
        """Start anew and judge a recorded run, as after a restart.

        Args:
            samples: the effective history (:func:`mcore_monitors.sinks.effective_history`): what
                led to the present weights, without the stretches that were rolled back over.

        Returns:
            The verdict of each sample. What the last one holds as ``active`` is still open, and the
            next verdict of the run carries it on.
        """
        self._start_anew()
        return [self.update(sample) for sample in samples]
