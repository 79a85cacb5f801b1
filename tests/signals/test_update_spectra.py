"""Update spectra against plain dense float64 singular values."""

import pytest
import torch

from mcore_monitors.signals import update_grams as forming
from mcore_monitors.signals import update_measures as measuring
from mcore_monitors.signals import update_spectra as solving
from mcore_monitors.signals.spectra import Measures, effective_rank, measures
from mcore_monitors.signals.update_grams import update_grams
from mcore_monitors.signals.update_measures import delta2_measures, recorded, update_measures
from mcore_monitors.signals.update_spectra import (
    UpdateSpectra,
    spectra_from_grams,
    update_spectra,
)
from mcore_monitors.signals.update_spectra_qr import update_spectra_qr

H, d, D = 4, 8, 40
ROUTES = [update_spectra, update_spectra_qr]
FLOAT32 = torch.float32


@pytest.fixture(params=["as a whole", "in blocks"], autouse=True)
def both_ways(request, monkeypatch):
    """Small matrices are taken as a whole, larger ones in blocks: here each in turn."""
    if request.param == "in blocks":
        monkeypatch.setattr(forming, "SMALL", 4)
        monkeypatch.setattr(solving, "SMALL", 4)


def weights(heads=H, decay=0.0, seed=0, shape=(d, D)):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(heads, *shape, generator=g, dtype=torch.float64)
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    s = s * torch.logspace(0, -decay, s.shape[1], dtype=torch.float64)
    return 0.02 * (u * s[:, None, :]) @ v


def update(w, ratio, rank, noise=0.0, seed=1):
    g = torch.Generator().manual_seed(seed)
    left = torch.randn(w.shape[0], w.shape[1], rank, generator=g, dtype=torch.float64)
    right = torch.randn(w.shape[0], rank, w.shape[2], generator=g, dtype=torch.float64)
    u = left @ right + noise * torch.randn(w.shape, generator=g, dtype=torch.float64)
    return u * (ratio * w.norm() / u.norm())


def case(ratio, rank, noise, decay, dtype=FLOAT32, groups=H, shape=(d, D)):
    wq, wk = weights(H, decay, 2, shape), weights(groups, decay, 3, shape)
    dq, dk = update(wq, ratio, rank, noise, seed=4), update(wk, ratio, rank, noise, seed=5)
    return [x.to(dtype) for x in (wq, wk, wq + dq, wk + dk)]


def dense(wq_old, wk_old, wq_new, wk_new) -> UpdateSpectra:
    """The obvious way: every matrix of every head written out, and all its singular values."""
    rows = []
    repeats = wq_old.shape[0] // wk_old.shape[0]
    channels = wq_old.shape[1]

    def squared(matrix, length):
        s = torch.linalg.svdvals(matrix)[:length].square()
        return torch.nn.functional.pad(s, (0, length - len(s)))

    for h in range(wq_old.shape[0]):
        q, k = wq_old[h].double().T, wk_old[h // repeats].double().T  # [D, d]
        dq, dk = wq_new[h].double().T - q, wk_new[h // repeats].double().T - k
        rows.append(
            (
                squared(dq @ k.T + q @ dk.T, 2 * channels),
                squared(dq @ dk.T, channels),
                squared(dq, channels),
                squared(dk, channels),
            )
        )
    delta2, delta3, query, key = (torch.stack(x) for x in zip(*rows, strict=True))
    return UpdateSpectra(delta2, delta3, query, key[::repeats])


def same_measures(got: Measures, want: Measures, rtol: float, name: str = ""):
    for what, x, y in zip(Measures._fields, got, want, strict=True):
        # An entropy may be zero: its absolute error is the effective rank's relative one.
        relative, absolute = (0, rtol) if what == "spectral_entropy" else (rtol, 0)
        torch.testing.assert_close(
            x, y, rtol=relative, atol=absolute, msg=f"{name} {what}: {x} {y}"
        )


def assert_same_measures(got: UpdateSpectra, want: UpdateSpectra, rtol: float):
    """All four measures of all four matrices."""
    for name, one, other in zip(want._fields, got, want, strict=True):
        assert one.shape == other.shape and one.dtype == torch.float64
        assert (one.diff(dim=-1) <= 0).all(), "descending"
        same_measures(measures(one), measures(other), rtol, name)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("shape", [(8, 40), (16, 64), (6, 5), (8, 12), (40, 96)])
@pytest.mark.parametrize("rank, noise", [(8, 0.0), (1, 0.1)])
def test_all_matrices_and_measures(groups, shape, rank, noise):
    """MHA, grouped and single key; also fewer hidden dimensions than head channels."""
    w = case(1e-3, rank, noise, 0.5, groups=groups, shape=shape)
    want = dense(*w)
    assert_same_measures(update_spectra(*w), want, 1e-9)
    assert_same_measures(update_spectra(*w, gram_dtype=FLOAT32), want, 1e-3)
    assert_same_measures(update_spectra_qr(*w), want, 1e-10)


@pytest.mark.parametrize("ratio", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("rank, noise", [(d, 0.0), (1, 0.1), (1, 0.0), (3, 0.01)])
@pytest.mark.parametrize("decay", [0.0, 3.0])
def test_any_spectrum_and_size_of_update(ratio, rank, noise, decay):
    w = case(ratio, rank, noise, decay)
    want = dense(*w)
    assert_same_measures(update_spectra(*w), want, 1e-9)
    assert_same_measures(update_spectra(*w, gram_dtype=FLOAT32), want, 1e-3)
    assert_same_measures(update_spectra_qr(*w), want, 1e-11)


def test_update_that_cancels_in_the_product():
    """ΔW_q = M W_q and ΔW_k = −Mᵀ W_k: what is left of Δ2 is float32's rounding of the weights."""
    wq, wk = weights(seed=2), weights(seed=3)
    m = 1e-3 * torch.randn(H, d, d, generator=torch.Generator().manual_seed(0)).double()
    w = [x.float() for x in (wq, wk, wq + m @ wq, wk - m.mT @ wk)]
    want = dense(*w)
    assert_same_measures(update_spectra(*w), want, 1e-3)
    assert_same_measures(update_spectra_qr(*w), want, 1e-6)


@pytest.mark.parametrize("route", ROUTES)
def test_grouped_queries_are_repeated_keys(route):
    wq, wk, wq2, wk2 = case(1e-3, 3, 0.01, 0.0)
    grouped = route(wq, wk[:2], wq2, wk2[:2])
    repeated = route(wq, wk[:2].repeat_interleave(2, 0), wq2, wk2[:2].repeat_interleave(2, 0))
    for one, other in zip(grouped[:3], repeated[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12 * other.max().item())
    torch.testing.assert_close(grouped.key, repeated.key[::2])


def test_pieces_give_what_one_piece_gives(monkeypatch):
    w = case(1e-3, 3, 0.01, 0.0)
    monkeypatch.setattr(forming, "_PIECE_BYTES", {"cpu": 1})
    pieces = update_grams(*w)
    monkeypatch.setattr(forming, "_PIECE_BYTES", {"cpu": 2**30})
    for one, other in zip(pieces, update_grams(*w), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("shape", [(8, 40), (33, 96), (6, 5)])
@pytest.mark.parametrize("rank, noise", [(8, 0.0), (1, 0.1), (1, 0.0)])
@pytest.mark.parametrize("by", ["traces", "eigenvalues"])
def test_measures_without_singular_values(monkeypatch, by, groups, shape, rank, noise):
    monkeypatch.setattr(measuring, "LEAST_ROWS", 2 if by == "traces" else 10**6)
    monkeypatch.setattr(measuring, "LEAST_WORK", 0)
    w = case(1e-3, rank, noise, 0.5, groups=groups, shape=shape)
    want, found = dense(*w), update_measures(*w)
    for one, other in zip(found, want, strict=True):
        same_measures(one, measures(other), 1e-9)
    grams = update_grams(*w)
    delta2, singles = recorded(grams)
    spectra = spectra_from_grams(grams)
    for alone in (delta2, delta2_measures(grams)):
        same_measures(alone, found.delta2, 1e-12)
    stacked = torch.cat([spectra.query, spectra.key, spectra.delta3])
    torch.testing.assert_close(singles, stacked, rtol=0, atol=0)


def test_planted_rank_one_update():
    wq, wk = weights(seed=2), weights(seed=3)
    wq2 = wq + update(wq, 1e-3, rank=1)
    one = torch.ones(H, dtype=torch.float64)
    for dtype, rtol in ((torch.float64, 1e-9), (FLOAT32, 1e-3)):
        got = update_spectra(wq, wk, wq2, wk, gram_dtype=dtype)
        torch.testing.assert_close(effective_rank(got.delta2), one, rtol=rtol, atol=0)
        assert got.delta3.eq(0).all() and got.key.eq(0).all()
    # rank one in each of W_q and W_k: two directions
    wk2 = wk + update(wk, 1e-3, rank=1)
    both = effective_rank(update_spectra(wq, wk, wq2, wk2).delta2)
    assert ((both > 1.5) & (both <= 2 + 1e-9)).all()


def test_random_update_uses_most_directions():
    """Independent Gaussian factors: 2d directions of nearly equal energy when D ≫ d."""
    g = torch.Generator().manual_seed(0)
    wq, wk, dq, dk = torch.randn(4, 8, 4, 2000, generator=g)
    got = update_spectra(wq, wk, wq + 1e-3 * dq, wk + 1e-3 * dk)
    for spectrum, directions in zip(got, (8, 4, 4, 4), strict=True):
        rank = effective_rank(spectrum)
        assert ((rank > 0.98 * directions) & (rank <= directions)).all()


@pytest.mark.parametrize("route", ROUTES)
def test_scale_of_weights_and_of_update(route):
    w = case(1e-3, 3, 0.01, 0.0, torch.float64)
    want = [measures(x) for x in route(*w)]

    def assert_scaled(got, factors, rtol=1e-7):
        for one, other, factor in zip(got, want, factors, strict=True):
            one = measures(one)
            torch.testing.assert_close(one.frobenius, factor * other.frobenius, rtol=rtol, atol=0)
            torch.testing.assert_close(one.effective_rank, other.effective_rank, rtol=rtol, atol=0)

    wq, wk, wq2, wk2 = w
    for s in (1e-12, 1e12):
        assert_scaled(route(*(s * x for x in w)), (s * s, s * s, s, s))
        assert_scaled(route(s * wq, wk, s * wq2, wk2), (s, s, s, 1))
    for s in (1e-6, 1e-2):  # to first order Δ2 is linear in the update; rounding of W + ΔW shows
        small = route(wq, wk, wq + s * (wq2 - wq), wk + s * (wk2 - wk))
        assert_scaled(small, (s, s * s, s, s), rtol=1e-4)


@pytest.mark.parametrize("route", ROUTES)
def test_a_head_that_did_not_move_has_zeros(route):
    wq, wk, wq2, wk2 = case(1e-3, 3, 0.01, 0.0)
    wq2[1], wk2[1] = wq[1], wk[1]
    wq2[2] = wq[2]
    wk2[3] = wk[3]
    got = route(wq, wk, wq2, wk2)
    zero = [x.eq(0).all(1).tolist() for x in got]
    assert zero[0] == [False, True, False, False]  # an update of one of the two is an update
    assert zero[1] == [False, True, True, True]
    assert zero[2] == [False, True, True, False]
    assert zero[3] == [False, True, False, True]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_weight_spoils_its_own_matrices_only(route, bad):
    clean = case(1e-3, 3, 0.01, 0.0, groups=2)
    want = route(*clean)
    for which, index, heads, queries, keys in (
        (0, 1, [1], [1], []),
        (2, 3, [3], [3], []),
        (1, 1, [2, 3], [], [1]),
        (3, 0, [0, 1], [], [0]),
    ):
        w = [x.clone() for x in clean]
        w[which][index, 2, 5] = bad
        spoiled = (heads, heads, queries, keys)
        for got, other, rows in zip(route(*w), want, spoiled, strict=True):
            good = [i for i in range(len(other)) if i not in rows]
            assert got[rows].isnan().all()
            torch.testing.assert_close(got[good], other[good], rtol=1e-9, atol=1e-20)


def test_smallest_possible_update():
    """One element moved by one unit in the last place."""
    wq, wk = weights(seed=2).float(), weights(seed=3).float()
    wq2 = wq.clone()
    wq2[:, 0, 0] = torch.nextafter(wq[:, 0, 0], torch.tensor(1.0))
    rank = effective_rank(update_spectra(wq, wk, wq2, wk).delta2)
    torch.testing.assert_close(rank, torch.ones(H, dtype=torch.float64), rtol=1e-9, atol=0)


def test_bfloat16_weights_are_subtracted_in_full():
    w = case(1e-1, 3, 0.1, 0.0, torch.bfloat16)
    assert_same_measures(update_spectra(*w), dense(*w), 1e-9)
    assert_same_measures(update_spectra(*w, gram_dtype=FLOAT32), dense(*w), 1e-3)


@pytest.fixture
def reduced_precision():
    """A training that has switched reduced precision on for float32 products."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def test_reduced_precision_of_the_training_stays_out(reduced_precision):
    w = case(1e-4, 1, 0.1, 3.0, shape=(32, 256))
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [b.fp32_precision for b in backends]
    assert before == ["tf32", "bf16"]
    seen = []
    copy = torch.Tensor.copy_

    def watched(self, *args, **kwargs):
        seen.append([b.fp32_precision for b in backends])
        return copy(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", watched)
        assert_same_measures(update_spectra(*w, gram_dtype=FLOAT32), dense(*w), 1e-3)
    assert seen and all(s == ["ieee", "ieee"] for s in seen)
    assert [b.fp32_precision for b in backends] == before
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "shapes",
    [
        [(4, 8, 40), (3, 8, 40), (4, 8, 40), (3, 8, 40)],
        [(4, 8, 40), (4, 8, 40), (4, 8, 40), (2, 8, 40)],
        [(4, 8, 40), (4, 6, 40), (4, 8, 40), (4, 6, 40)],
        [(8, 40), (8, 40), (8, 40), (8, 40)],
    ],
)
def test_shapes_that_do_not_fit(route, shapes):
    with pytest.raises(ValueError, match="multiple of G"):
        route(*(torch.zeros(s) for s in shapes))
