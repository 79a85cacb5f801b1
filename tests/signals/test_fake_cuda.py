"""On fake CUDA tensors: no value is read back (``.item()`` raises there), no device is mixed."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mcore_monitors.faults.attention import attention_row_term
from mcore_monitors.hosts.safe_attention import safe_attention
from mcore_monitors.signals import conservation as c
from mcore_monitors.signals import router
from mcore_monitors.signals.direction import direction_overlap, leading_directions
from mcore_monitors.signals.spectra import measures
from mcore_monitors.signals.spike import persistent_spike, spike
from mcore_monitors.signals.update_grams import update_grams
from mcore_monitors.signals.update_measures import delta2_measures, update_measures
from mcore_monitors.signals.update_spectra import update_spectra
from mcore_monitors.signals.update_spectra_qr import update_spectra_qr


@pytest.fixture
def cuda():
    """Makes fake tensors on a card that need not exist."""
    with FakeTensorMode():
        yield lambda *shape, **kw: torch.empty(*shape, device="cuda", **kw)


def stays_on_card(result, *shape):
    assert result.device.type == "cuda"
    assert tuple(result.shape) == shape


def test_the_guard_itself_raises(cuda):
    with pytest.raises(Exception, match="_local_scalar_dense"):
        cuda(1).item()
    with pytest.raises(Exception, match="device"):
        cuda(2) + torch.ones(2)


@pytest.mark.parametrize("gram_dtype", [torch.float64, torch.float32])
def test_spectra(cuda, gram_dtype):
    w = [cuda(8, 16, 64), cuda(2, 16, 64), cuda(8, 16, 64), cuda(2, 16, 64)]
    shapes = [(8, 32), (8, 16), (8, 16), (2, 16)]
    for route in (update_spectra_qr, partial(update_spectra, gram_dtype=gram_dtype)):
        for spectrum, shape in zip(route(*w), shapes, strict=True):
            stays_on_card(spectrum, *shape)
    for measure in delta2_measures(update_grams(*w, gram_dtype=gram_dtype)):
        stays_on_card(measure, 8)
    for measure in measures(cuda(8, 32)):
        stays_on_card(measure, 8)


def test_measures_of_large_heads(cuda):
    w = [cuda(16, 64, 256), cuda(4, 64, 256), cuda(16, 64, 256), cuda(4, 64, 256)]
    for found, heads in zip(update_measures(*w), (16, 16, 16, 4), strict=True):
        for measure in found:
            stays_on_card(measure, heads)


def test_direction_and_spike(cuda):
    wq, wk = cuda(8, 16, 64, dtype=torch.bfloat16), cuda(2, 16, 64, dtype=torch.bfloat16)
    grams = update_grams(wq, wk, wq, wk)
    direction = leading_directions(grams, wq, wk, wq, wk)
    stays_on_card(direction, 8, 2, 2, 64)
    overlap = direction_overlap(direction, direction)
    stays_on_card(overlap, 8)
    found = spike(cuda(8, 16), 64)
    stays_on_card(found.strength, 8)
    stays_on_card(found.outliers, 8)
    stays_on_card(persistent_spike(found.outliers.expand(3, 8), overlap.expand(2, 8)), 8)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_router(cuda, score):
    for signal in (
        router.weight_similarity,
        router.centred_conditioning,
        router.row_norm_spread,
        router.max_violation,
        router.effective_experts,
        router.dead_experts,
        router.underused_experts,
        router.largest_share,
    ):
        stays_on_card(signal(cuda(3, 8, 64, dtype=torch.bfloat16)), 3, *_rows(signal))
    logits = cuda(8, 32, dtype=torch.bfloat16)
    weighed = router.weigh(router.log_scores(logits, score))
    stays_on_card(router.routing_entropy(weighed), 32)
    stays_on_card(router.predicted_entropy(weighed), 32)
    stays_on_card(router.squared_logsumexp(weighed), 32)
    bare = router.scores(logits.float(), weighed, score)
    stays_on_card(router.choose(bare.t(), 3, groups=4, top_groups=2, group_sum=2)[0], 32, 4)
    limited = router.limit_groups(bare, 4, 2, 2)
    best = router.best_values(limited, 4)
    chosen = router.choice_shares(limited, best, 3)
    stays_on_card(chosen, 8, 32)
    stays_on_card(best, 4, 32)
    stays_on_card(router.mixing_entropy(weighed.log, chosen), 32)
    stays_on_card(router.bias_agreement(chosen, chosen, 3), 32)
    counts = router.QuantileCounts(2, 2, torch.device("cuda"))
    for bins in (router.entropy_bins, router.margin_bins):
        counts.add(cuda(2, dtype=torch.int64), *bins(cuda(2, 2, 32)))
    stays_on_card(counts.upto(), 2, 2, 128)
    edges = cuda(129, dtype=torch.float64)
    stays_on_card(router.quantile(counts.upto(), cuda(2, 2), edges, 0.5), 2, 2)


def _rows(signal):
    """Signals of a load reduce one dimension, those of a weight two."""
    of_weight = (router.weight_similarity, router.centred_conditioning, router.row_norm_spread)
    return () if signal in of_weight else (8,)


def test_conservation_of_attention(cuda):
    q, o, dq, do = (cuda(16, 2, 6, 8, dtype=torch.bfloat16) for _ in range(4))
    k, v, dk, dv = (cuda(16, 2, 3, 8, dtype=torch.bfloat16) for _ in range(4))
    signed, scale = c.key_shift_terms(dk, query=q, output=o, grad_output=do)
    stays_on_card(signed, 2, 3, 8)
    along = c.key_shift_along(signed, c.key_shift_directions(q, o, do, 3))
    stays_on_card(along, 2, 2, 3)
    sums = c.direction_terms(along[0], scale)
    stays_on_card(sums, 3, 4)
    stays_on_card(c.direction_terms(signed, scale), 3, 11)
    for measure in (c.direction_log_p, c.direction_bias, c.direction_coherence):
        stays_on_card(measure(sums), 3)
    stays_on_card(c.direction_layer_log_p(sums))
    terms = c.query_key_terms(q, dq, k, dk)
    stays_on_card(c.query_key_sums(*terms)[2], 3)
    stays_on_card(c.spread_log_p(cuda(3), cuda(3), 1e-3), 3)
    for term in c.key_shift_all_terms(dk, q, o, do)[:2]:
        stays_on_card(term, *term.shape)
    for terms, from_terms in (
        ((signed, scale), c.key_shift_from_terms),
        (c.value_output_terms(v, dv, o, do), c.value_output_from_terms),
        (c.query_key_terms(q.half(), dq.half(), k, dk), c.query_key_from_terms),
    ):
        for result in from_terms(*terms):
            stays_on_card(result, 3)


def test_conservation_of_tokens(cuda):
    x, dx, y, dy = (cuda(16, 2, 8, dtype=torch.bfloat16) for _ in range(4))
    bias = cuda(8)
    for terms, from_terms in (
        (c.router_shift_terms(dx), c.router_shift_from_terms),
        (c.vocabulary_shift_terms(dx), c.vocabulary_shift_from_terms),
        (c.norm_shift_terms(dx), c.norm_shift_from_terms),
        (
            c.norm_scale_terms(x, dx, y, dy, eps=1e-5, centred=True, bias=bias),
            c.norm_scale_from_terms,
        ),
    ):
        for result in terms:
            stays_on_card(result, 16, 2)
        for result in from_terms(*terms):
            stays_on_card(result, 1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_attention(cuda, masked, trained):
    q, k = (cuda(32, 2, n, 8, dtype=torch.bfloat16, requires_grad=trained) for n in (4, 2))
    mask = cuda(2, 1, 32, 32, dtype=torch.bool) if masked else None
    for block in (8, 512):
        out = safe_attention(q, k, k, scale=1.0, causal=True, mask=mask, block=block)
        stays_on_card(out, 32, 2, 4, 8)
    out = safe_attention(q, k, k, scale=1.0, causal=True, window=(4, 0), dropout=0.1)
    stays_on_card(out, 32, 2, 4, 8)
    stays_on_card(attention_row_term(q, k, k, scale=1.0, strength=0.1, mask=mask), 32, 2, 4, 8)
