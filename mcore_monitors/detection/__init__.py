"""Readings in, alarms and a diagnosis out: pure functions of the history, without torch."""

from mcore_monitors.detection.alarm import CAUSES, CRITICAL, WARNING, Alarm, Diagnosis, Verdict
from mcore_monitors.detection.config import DetectionConfig
from mcore_monitors.detection.judge import Judge

__all__ = [
    "CAUSES",
    "CRITICAL",
    "WARNING",
    "Alarm",
    "DetectionConfig",
    "Diagnosis",
    "Judge",
    "Verdict",
]
