"""The rule table from alarms to a cause, and the sentence for the person who is woken up."""

from __future__ import annotations

import pytest

from mcore_monitors.detection import Alarm
from mcore_monitors.detection.diagnosis import diagnose
from tests.detection.series import CONDITIONING, ENTROPY, RANK, SHIFT

ALL = {"attention/key_shift", "attention/delta2_effective_rank", ENTROPY, CONDITIONING}
NO_RESIDUAL = ALL - {SHIFT}


def residual(layer: int = 2, unit: int = 0, onset: int = 610) -> Alarm:
    return Alarm(
        signal=SHIFT,
        layer=layer,
        unit=unit,
        iteration=onset + 10,
        onset_iteration=onset,
        severity="critical",
        rule="limit",
        value=5.2e-3 + unit * 1e-3,
        limit=1e-5,
    )


def band(
    signal: str,
    severity: str = "critical",
    layer: int = 2,
    unit: int | None = None,
    z: float = -9.0,
) -> Alarm:
    return Alarm(
        signal=signal,
        layer=layer,
        unit=unit,
        iteration=660,
        onset_iteration=640,
        severity=severity,
        rule="band",
        value=1.8,
        band={"median": 5.8, "low": 2.9, "high": 11.0, "z": z},
    )


SPECTRUM = band(RANK, unit=3)
ROUTER = band(ENTROPY)
WARNING = band(CONDITIONING, severity="warning", z=7.0)


@pytest.mark.parametrize(
    "alarms, judged, cause",
    [
        ([residual()], ALL, "attention_numerics"),
        ([residual(), SPECTRUM], ALL, "attention_numerics"),
        ([SPECTRUM], ALL, "attention_numerics"),
        ([SPECTRUM], NO_RESIDUAL, "attention_numerics"),
        ([residual(), ROUTER], ALL, "combined"),
        ([residual(), SPECTRUM, ROUTER], ALL, "combined"),
        ([SPECTRUM, ROUTER], NO_RESIDUAL, "combined"),
        ([SPECTRUM, ROUTER], ALL, "router_or_learning_rate"),
        ([ROUTER], ALL, "router_or_learning_rate"),
        ([WARNING], ALL, "router_or_learning_rate"),
        ([residual(), WARNING], ALL, "attention_numerics"),
        ([band("loss")], ALL, "data"),
        ([band("grad_norm"), band("loss")], ALL, "data"),
        ([band("something/else")], ALL, "unknown"),
    ],
)
def test_the_table(alarms, judged, cause):
    found = diagnose(alarms, judged)
    assert found.cause == cause
    assert 0.0 < found.confidence < 1.0
    assert f"confidence {found.confidence:.0%}" in found.sentence


def test_no_alarm_no_diagnosis():
    assert diagnose([], ALL) is None


def test_the_residual_makes_an_attention_fault_firmer_and_its_silence_looser():
    firm = diagnose([residual(), SPECTRUM], ALL).confidence
    unmeasured = diagnose([SPECTRUM], NO_RESIDUAL).confidence
    against = diagnose([SPECTRUM], ALL).confidence
    assert firm > unmeasured > against


def test_the_sentence_says_where_what_since_when_and_why():
    found = diagnose([residual(2, 0), residual(2, 1), SPECTRUM], ALL)
    assert found.sentence == (
        "attention/key_shift in layer 2 (query groups 0, 1) is 6.20e-03 against a limit of "
        "1.00e-05 since iteration 610; attention/delta2_effective_rank@50 in layer 2 (head 3) is "
        "1.8 against a band down to 2.9 (usual 5.8) since iteration 640. Likely fault: wrong "
        "numbers in the attention kernel (confidence 95%): the residual is zero whatever the data "
        "or the learning rate, so only a kernel that computes something else can move it; the "
        "router is quiet so far."
    )
    assert found.signals == ("attention/delta2_effective_rank", "attention/key_shift")
    assert (found.severity, found.onset_iteration) == ("critical", 610)


def test_a_band_to_the_other_side_names_its_upper_edge():
    assert "against a band up to 11 (usual 5.8)" in diagnose([band(ENTROPY, z=9.0)], ALL).sentence


def test_many_layers_are_summed_up():
    found = diagnose([residual(layer) for layer in range(3, 48)], ALL)
    assert "in layers 45 from 3 to 47 is" in found.sentence


def test_a_group_that_only_warns_is_not_called_quiet():
    assert "router is quiet" not in diagnose([residual(), WARNING], ALL).sentence


def test_what_is_not_judged_is_not_called_quiet():
    assert "quiet" not in diagnose([residual()], {SHIFT}).sentence


def test_the_event_is_plain_data():
    event = diagnose([ROUTER], ALL).to_event()
    assert event["signals"] == [ENTROPY]
    assert set(event) == {
        "cause",
        "confidence",
        "severity",
        "onset_iteration",
        "signals",
        "sentence",
        "site",
    }


def kernel(signal: str, unit: int | None = None) -> Alarm:
    return Alarm(
        signal=signal,
        layer=2,
        unit=unit,
        iteration=620,
        onset_iteration=610,
        severity="critical",
        rule="limit",
        value=5.2e-3,
        limit=1e-5,
    )


@pytest.mark.parametrize(
    ("alarms", "cause"),
    [
        ([kernel("router/shift")], "router_numerics"),
        ([kernel("router/shift"), ROUTER], "router_numerics"),
        ([kernel("router/shift"), kernel("norm/scale", 1)], "router_numerics"),
        ([kernel("router/shift"), residual()], "combined"),
        ([kernel("norm/scale", 1)], "kernel_numerics"),
        ([kernel("output/vocabulary_shift"), SPECTRUM], "kernel_numerics"),
        ([kernel("norm/scale", 1), residual()], "attention_numerics"),
        ([kernel("attention/key_shift_bias")], "attention_numerics"),
    ],
)
def test_residuals_of_other_kernels(alarms, cause):
    assert diagnose(alarms, ALL | {"router/shift", "norm/scale"}).cause == cause


def test_the_site_is_in_the_sentence():
    sizes = {SHIFT: {2: [0.1, 6.0]}, "attention/query_key": {2: [0.1, 0.2]}}
    found = diagnose([residual(2, 1)], ALL, sizes)
    assert found.site.startswith("layer 2, query group 1: Σ_j dK_j ≠ 0 at 6 times")
    assert found.sentence.endswith(f" Site: {found.site}.")
    assert diagnose([SPECTRUM], ALL, sizes).site == ""
