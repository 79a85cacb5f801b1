"""``mcore_monitors.attach``: what it refuses, and that it may come twice."""

from __future__ import annotations

from mcore_monitors.errors import EXIT_BAD_CONFIG

from .gone_through import Rollbacks


def test_what_cannot_be_used_ends_the_start(rollbacks: Rollbacks) -> None:
    for codes in rollbacks.seen["refused"]:
        for name in ("unknown", "nothing", "no file", "layer", "twice"):
            assert codes[name] == EXIT_BAD_CONFIG, name


def test_a_second_call_changes_nothing(rollbacks: Rollbacks) -> None:
    for codes in rollbacks.seen["refused"]:
        assert codes["again"] is True


def test_in_place_is_refused_where_the_data_cannot_be_put_back(rollbacks: Rollbacks) -> None:
    """At the first step, since the script may say how until then."""
    for codes in rollbacks.seen["refused"]:
        assert codes["no way"] == [EXIT_BAD_CONFIG, 1]
