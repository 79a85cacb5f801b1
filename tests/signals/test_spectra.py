"""Δ2's effective rank against dense float64 singular values."""

import pytest
import torch

from mcore_monitors.signals import spectra
from mcore_monitors.signals.spectra import (
    delta2_effective_rank,
    delta2_effective_rank_qr,
    effective_rank,
    spectral_entropy,
)

H, d, D = 4, 8, 40


def weights(heads=H, decay=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(heads, d, D, generator=g, dtype=torch.float64)
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    s = s * torch.logspace(0, -decay, d, dtype=torch.float64)
    return 0.02 * (u * s[:, None, :]) @ v


def update(w, ratio, rank=d, noise=0.0, seed=1):
    g = torch.Generator().manual_seed(seed)
    left = torch.randn(w.shape[0], d, rank, generator=g, dtype=torch.float64)
    right = torch.randn(w.shape[0], rank, D, generator=g, dtype=torch.float64)
    u = left @ right + noise * torch.randn(w.shape, generator=g, dtype=torch.float64)
    return u * (ratio * w.norm() / u.norm())


def dense(wq_old, wk_old, wq_new, wk_new):
    """The obvious way: the [D, D] matrix of each head and all its singular values."""
    values = []
    for h in range(wq_old.shape[0]):
        q, k = wq_old[h].double().T, wk_old[h].double().T  # [D, d]
        dq, dk = wq_new[h].double().T - q, wk_new[h].double().T - k
        s = torch.linalg.svdvals(dq @ k.T + q @ dk.T)
        p = s**2 / (s**2).sum()
        p = p[p > 0]
        values.append(torch.exp(-(p * p.log()).sum()))
    return torch.stack(values)


def case(ratio, rank, noise, decay, dtype=torch.float32):
    wq, wk = weights(decay=decay, seed=2), weights(decay=decay, seed=3)
    dq, dk = update(wq, ratio, rank, noise, seed=4), update(wk, ratio, rank, noise, seed=5)
    return [x.to(dtype) for x in (wq, wk, wq + dq, wk + dk)]


@pytest.mark.parametrize("ratio", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("rank, noise", [(d, 0.0), (1, 0.1), (1, 0.0), (3, 0.01)])
@pytest.mark.parametrize("decay", [0.0, 3.0])
def test_matches_dense_singular_values(ratio, rank, noise, decay):
    w = case(ratio, rank, noise, decay)
    want = dense(*w)
    torch.testing.assert_close(delta2_effective_rank(*w), want, rtol=1e-9, atol=0)
    single = delta2_effective_rank(*w, gram_dtype=torch.float32)
    torch.testing.assert_close(single, want, rtol=1e-3, atol=0)
    torch.testing.assert_close(delta2_effective_rank_qr(*w), want, rtol=1e-12, atol=0)


def test_update_that_cancels_in_the_product():
    """ΔW_q = M W_q and ΔW_k = −Mᵀ W_k: what is left of Δ2 is float32's rounding of the weights."""
    wq, wk = weights(seed=2), weights(seed=3)
    m = 1e-3 * torch.randn(H, d, d, generator=torch.Generator().manual_seed(0)).double()
    w = [x.float() for x in (wq, wk, wq + m @ wq, wk - m.mT @ wk)]
    want = dense(*w)
    torch.testing.assert_close(delta2_effective_rank(*w), want, rtol=1e-3, atol=0)
    torch.testing.assert_close(delta2_effective_rank_qr(*w), want, rtol=1e-6, atol=0)


def test_more_channels_than_hidden_size():
    g = torch.Generator().manual_seed(0)
    wq, wk, dq, dk = torch.randn(4, 2, 6, 5, generator=g, dtype=torch.float64)
    w = [wq, wk, wq + 1e-3 * dq, wk + 1e-3 * dk]
    torch.testing.assert_close(delta2_effective_rank(*w), dense(*w), rtol=1e-9, atol=0)


@pytest.mark.parametrize("function", [delta2_effective_rank, delta2_effective_rank_qr])
def test_grouped_queries_are_repeated_keys(function):
    wq, wk, wq2, wk2 = case(1e-3, 3, 0.01, 0.0)
    grouped = function(wq, wk[:2], wq2, wk2[:2])
    repeated = function(wq, wk[:2].repeat_interleave(2, 0), wq2, wk2[:2].repeat_interleave(2, 0))
    torch.testing.assert_close(grouped, repeated, rtol=1e-12, atol=0)


def test_pieces_give_what_one_piece_gives(monkeypatch):
    wq, wk, wq2, wk2 = case(1e-3, 3, 0.01, 0.0)
    whole = delta2_effective_rank(wq, wk[:2], wq2, wk2[:2])
    monkeypatch.setattr(spectra, "_PIECE_BYTES", 1)
    torch.testing.assert_close(delta2_effective_rank(wq, wk[:2], wq2, wk2[:2]), whole)


def test_planted_rank_one_update():
    wq, wk = weights(seed=2), weights(seed=3)
    wq2 = wq + update(wq, 1e-3, rank=1)
    one = torch.ones(H, dtype=torch.float64)
    torch.testing.assert_close(delta2_effective_rank(wq, wk, wq2, wk), one, rtol=1e-9, atol=0)
    single = delta2_effective_rank(wq, wk, wq2, wk, gram_dtype=torch.float32)
    torch.testing.assert_close(single, one, rtol=1e-3, atol=0)
    # rank one in each of W_q and W_k: two directions
    wk2 = wk + update(wk, 1e-3, rank=1)
    both = delta2_effective_rank(wq, wk, wq2, wk2)
    assert ((both > 1.5) & (both <= 2 + 1e-9)).all()


def test_random_update_uses_most_directions():
    """Independent Gaussian factors: 2d directions of nearly equal energy when D ≫ d."""
    g = torch.Generator().manual_seed(0)
    wq, wk, dq, dk = torch.randn(4, 8, 4, 2000, generator=g)
    rank = delta2_effective_rank(wq, wk, wq + 1e-3 * dq, wk + 1e-3 * dk)
    assert ((rank > 7.9) & (rank <= 8)).all()


@pytest.mark.parametrize("function", [delta2_effective_rank, delta2_effective_rank_qr])
def test_scale_of_weights_and_of_update_does_not_matter(function):
    wq, wk, wq2, wk2 = case(1e-3, 3, 0.01, 0.0, torch.float64)
    want = function(wq, wk, wq2, wk2)
    for s in (1e-12, 1e12):
        torch.testing.assert_close(function(s * wq, s * wk, s * wq2, s * wk2), want)
        torch.testing.assert_close(function(s * wq, wk, s * wq2, wk2), want)
    for s in (1e-6, 1e-2):  # Δ2 is linear in the update
        small = function(wq, wk, wq + s * (wq2 - wq), wk + s * (wk2 - wk))
        torch.testing.assert_close(small, want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("function", [delta2_effective_rank, delta2_effective_rank_qr])
def test_no_update_is_nan(function):
    wq, wk, wq2, wk2 = case(1e-3, 3, 0.01, 0.0)
    wq2[1], wk2[1] = wq[1], wk[1]
    assert function(wq, wk, wq2, wk2).isnan().tolist() == [False, True, False, False]
    # an update of one of the two alone is an update
    wq2[2] = wq[2]
    wk2[3] = wk[3]
    assert function(wq, wk, wq2, wk2).isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("function", [delta2_effective_rank, delta2_effective_rank_qr])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weight_spoils_its_own_head_only(function, bad):
    clean = case(1e-3, 3, 0.01, 0.0)
    want = function(clean[0], clean[1][:2], clean[2], clean[3][:2])
    for which, index, spoiled in ((0, 1, [1]), (2, 3, [3]), (1, 1, [2, 3]), (3, 0, [0, 1])):
        w = [x.clone() for x in (clean[0], clean[1][:2], clean[2], clean[3][:2])]
        w[which][index, 2, 5] = bad
        got = function(*w)
        good = [h for h in range(H) if h not in spoiled]
        assert got[spoiled].isnan().all()
        torch.testing.assert_close(got[good], want[good], rtol=1e-12, atol=0)


def test_smallest_possible_update():
    """One element moved by one unit in the last place."""
    wq, wk = weights(seed=2).float(), weights(seed=3).float()
    wq2 = wq.clone()
    wq2[:, 0, 0] = torch.nextafter(wq[:, 0, 0], torch.tensor(1.0))
    rank = delta2_effective_rank(wq, wk, wq2, wk)
    torch.testing.assert_close(rank, torch.ones(H, dtype=torch.float64), rtol=1e-9, atol=0)


def test_bfloat16_weights_are_subtracted_in_full():
    w = case(1e-1, 3, 0.1, 0.0, torch.bfloat16)
    torch.testing.assert_close(delta2_effective_rank(*w), dense(*w), rtol=1e-9, atol=0)
    single = delta2_effective_rank(*w, gram_dtype=torch.float32)
    torch.testing.assert_close(single, dense(*w), rtol=1e-4, atol=0)


def test_entropy_and_rank_of_known_spectra():
    flat, one = torch.ones(5, dtype=torch.float64), torch.tensor([3.0, 0, 0, 0, 0]).double()
    torch.testing.assert_close(effective_rank(torch.stack([flat, one])).tolist(), [5.0, 1.0])
    half = torch.tensor([2.0, 1.0, 1.0, 0.0]).double()
    assert spectral_entropy(half).item() == pytest.approx(1.5 * torch.tensor(2.0).log().item())
    assert effective_rank(torch.zeros(4)).isnan()


@pytest.mark.parametrize("function", [delta2_effective_rank, delta2_effective_rank_qr])
@pytest.mark.parametrize(
    "shapes",
    [
        [(4, 8, 40), (3, 8, 40), (4, 8, 40), (3, 8, 40)],
        [(4, 8, 40), (4, 8, 40), (4, 8, 40), (2, 8, 40)],
        [(4, 8, 40), (4, 6, 40), (4, 8, 40), (4, 6, 40)],
        [(8, 40), (8, 40), (8, 40), (8, 40)],
    ],
)
def test_shapes_that_do_not_fit(function, shapes):
    with pytest.raises(ValueError, match="multiple of G"):
        function(*(torch.zeros(s) for s in shapes))
