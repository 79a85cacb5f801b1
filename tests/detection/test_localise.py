"""From residuals to the site that lies: every pattern of broken and holding identities."""

from __future__ import annotations

import math

import pytest

from mcore_monitors.catalogue import SIGNALS
from mcore_monitors.catalogue.conservation import ATTENTION_RESIDUALS, NORMS
from mcore_monitors.detection.localise import localise, ranges

KEY, VALUE, QUERY = ATTENTION_RESIDUALS
NAN = math.nan


def sizes(*broken: str, layer: int = 1, groups: int = 4, at: tuple[int, ...] = (), x: float = 9.0):
    """Two healthy layers in which some heads of one are broken."""
    found = {s: {n: [0.1] * groups for n in (1, 2)} for s in ATTENTION_RESIDUALS}
    for signal in broken:
        for unit in at or range(groups):
            found[signal][layer][unit] = x
    return found


def test_nothing_is_broken() -> None:
    assert localise(sizes()) == []
    assert localise({}) == []
    assert localise({KEY: {1: [NAN, 1.0]}}) == []  # the limit itself is within


def test_the_sentence_names_layer_heads_size_and_what_holds() -> None:
    (site,) = localise(sizes(KEY, at=(0, 1, 2)))
    assert site.sentence == (
        "layer 1, query groups 0–2: Σ_j dK_j ≠ 0 at 9 times the limit of the number format, while "
        "⟨V, dV⟩ = ⟨O, dO⟩ and ⟨Q, dQ⟩ = ⟨K, dK⟩: backward pass, the row term rowsum(dO∘O) of the "
        "softmax backward is wrong (biased, rounded, or of another call)"
    )


@pytest.mark.parametrize(
    ("broken", "where", "words"),
    [
        ((KEY,), "backward", "row term"),
        ((VALUE,), "forward or backward", "stored O is not P·V"),
        ((QUERY,), "backward", "same dS"),
        ((KEY, VALUE), "forward or backward", "O or the probabilities of the forward"),
        ((KEY, QUERY), "backward", "dK is wrong"),
        ((VALUE, QUERY), "backward", "two of dQ, dK and dV"),
        ((KEY, VALUE, QUERY), "forward or backward", "no gradient of this kernel"),
    ],
)
def test_each_pattern_of_an_attention(broken, where, words) -> None:
    (site,) = localise(sizes(*broken, layer=2))
    assert (site.layers, site.place, site.units, site.where) == ((2,), "attention", (), where)
    assert words in site.fault
    assert (site.broken, set(site.holding)) == (broken, set(ATTENTION_RESIDUALS) - set(broken))
    assert site.sentence.startswith("layer 2, attention: ")


def test_what_was_not_measured_is_not_said_to_hold() -> None:
    found = sizes(KEY)
    del found[VALUE]
    found[QUERY][1] = [NAN] * 4
    (site,) = localise(found)
    assert site.holding == () and "while" not in site.sentence


def test_heads_that_are_broken_in_unlike_ways_are_told_apart() -> None:
    found = sizes(KEY, at=(0, 1))
    found[QUERY][1][1] = 20.0
    worst, other = localise(found)
    assert (worst.units, worst.broken, worst.size) == ((1,), (KEY, QUERY), 20.0)
    assert (other.units, other.broken, other.size) == ((0,), (KEY,), 9.0)


def test_layers_that_are_broken_in_the_same_way_are_one_site() -> None:
    found = sizes(KEY)
    found[KEY][2] = [30.0] * 4
    (site,) = localise(found)
    assert (site.layers, site.size) == ((1, 2), 30.0)
    assert site.sentence.startswith("layers 1–2, attention: Σ_j dK_j ≠ 0 at 30 times")


BIAS = "attention/key_shift_bias"


@pytest.mark.parametrize(
    ("bias", "words"), [([1.5, 1.2], "by an offset"), ([0.0, 1.2], "a share of itself")]
)
def test_a_bias_below_the_limit_of_a_single_sample(bias, words) -> None:
    found = sizes() | {BIAS: {1: bias, 2: [0.2, 0.0]}}
    (site,) = localise(found)
    assert (site.layers, site.broken, site.hidden) == ((1,), (KEY,), True)
    assert "on average" in site.sentence and "times" not in site.sentence
    assert words in site.fault
    # where the residual itself is over its limit, its direction says what of the row term is wrong
    (site,) = localise(found | {KEY: {1: [9.0] * 4}})
    assert words in site.fault and not site.hidden


def test_query_key_that_only_many_sequences_give_away() -> None:
    spread = {"attention/query_key_spread": {1: [0.0, 0.1, 3.0, 0.0], 2: [0.0] * 4}}
    (site,) = localise(sizes() | spread)
    assert (site.layers, site.units, site.broken, site.hidden) == ((1,), (2,), (QUERY,), True)
    assert "by more than rounding leaves" in site.sentence and "times" not in site.sentence
    # where a sample is over its limit as well, its size is said
    found = sizes() | spread
    found[QUERY] = {1: [0.1, 0.1, 9.0, 0.1]}
    (site,) = localise(found)
    assert (site.broken, site.hidden, site.size) == ((QUERY,), False, 9.0)


@pytest.mark.parametrize(
    ("signal", "start", "words"),
    [
        ("router/shift", "layer 2, router: Σ_e dz_e ≠ 0 at 4 times", "column lost"),
        ("output/vocabulary_shift", "output layer: Σ_v dlogit_v ≠ 0", "shard of the vocabulary"),
    ],
)
def test_router_and_output(signal, start, words) -> None:
    (site,) = localise(sizes() | {signal: {1: [0.5], 2: [4.0]}})
    assert site.sentence.startswith(start)
    assert words in site.fault


def test_norms_by_name() -> None:
    scale = {1: [0.1] * 4 + [NAN], 2: [0.1, 7.0, NAN, NAN, 8.0]}
    final, inner = localise({"norm/scale": scale})
    assert (final.place, inner.place) == ("final norm", "pre-MLP norm")
    assert inner.sentence == (
        "layer 2, pre-MLP norm: ⟨x, dx⟩ ≠ 0 at 7 times the limit of the number format: backward "
        "pass, the norm's backward lacks (part of) its projection term, or uses other statistics "
        "than the forward pass"
    )
    (mean,) = localise({"norm/scale": {1: [0.1]}, "norm/shift": {1: [3.0]}})
    assert mean.broken == ("norm/shift",) and "⟨x, dx⟩ = 0" in mean.sentence
    assert "does not take the mean off" in mean.fault


def test_every_residual_of_the_catalogue_is_localised() -> None:
    for info in SIGNALS.values():
        if info.family == "conservation":
            found = localise({info.name: {1: [2.0] * (len(NORMS) if info.unit == "norm" else 1)}})
            assert found, info.name


@pytest.mark.parametrize(
    ("numbers", "text"), [([3], "3"), ([0, 1, 2, 5], "0–2, 5"), ([4, 2], "2, 4"), ([], "")]
)
def test_ranges(numbers, text) -> None:
    assert ranges(numbers) == text
