"""Leading directions against a dense singular value decomposition."""

import pytest
import torch

from mcore_monitors.signals.direction import direction_overlap, leading_directions
from mcore_monitors.signals.update_grams import update_grams

H = 4


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(groups=H, d=8, D=40, rank=None, push=0.0, seed=0):
    wq, wk = 0.02 * draw(H, d, D, seed=seed), 0.02 * draw(groups, d, D, seed=seed + 1)
    moves = []
    for i, w in enumerate((wq, wk)):
        move = draw(*w.shape, seed=seed + 2 + i)
        if rank:
            n = w.shape[0]
            move = draw(n, d, rank, seed=seed + 4 + i) @ draw(n, rank, D, seed=seed + 6 + i)
        coherent = draw(w.shape[0], d, 1, seed=8 + i) @ draw(w.shape[0], 1, D, seed=10 + i)
        moves.append(w + 1e-4 * (move + push * coherent))
    return wq, wk, *moves


def dense_directions(wq, wk, wq2, wk2):
    repeats = wq.shape[0] // wk.shape[0]
    wq, wk, wq2, wk2 = (x.double() for x in (wq, wk, wq2, wk2))
    wk, wk2 = wk.repeat_interleave(repeats, 0), wk2.repeat_interleave(repeats, 0)
    left, s, right = torch.linalg.svd((wq2 - wq).mT @ wk + wq.mT @ (wk2 - wk))
    return torch.stack([left[..., :2].mT, right[..., :2, :]], dim=1), s


def found(w):
    return leading_directions(update_grams(*w), *w)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("d, D", [(8, 40), (32, 256), (6, 5), (1, 12)])
@pytest.mark.parametrize("push", [0.0, 1.0])
@pytest.mark.parametrize("rank", [None, 1])
def test_are_the_leading_singular_vectors(groups, d, D, push, rank):
    w = case(groups, d, D, rank, push)
    want, s = dense_directions(*w)
    got = found(w)
    assert got.dtype == torch.float32 and got.shape == (H, 2, 2, D)
    relative = s[:, 1:] / s[:, :1]
    several = relative[:, 0] > 1e-6  # else the second direction is anything
    gram = (got @ got.mT)[several]
    torch.testing.assert_close(gram, torch.eye(2).expand_as(gram), atol=1e-5, rtol=0)
    # What 8 passes leave of the ninth vector, over the gap in which it shows.
    ninth = relative[:, 7] if relative.shape[1] > 7 else torch.zeros(H)
    for i, gap in ((0, 1 - relative[:, 0] ** 2), (1, 1 - (relative[:, 1] / relative[:, 0]) ** 2)):
        left = (ninth / (relative[:, 0] if i else 1)) ** 16 / gap
        cos = (got[:, :, i].double() * want[:, :, i]).sum(-1).abs().amin(1)
        good = (1 - cos <= 3 * left.square() + 1e-6) | ((i == 1) & ~several)
        assert good.all(), (i, cos, relative)


def test_two_directions_of_one_strength_span_the_same_plane():
    """Which mixture of the two comes first is chance; the plane and the overlap are not."""
    # Weights in one half of the hidden space and pushes in the other: singular vectors of Δ2.
    wq, wk = torch.linalg.qr(draw(2, H, 32, 8, seed=60)).Q.mT
    wq, wk = (torch.nn.functional.pad(w, (0, 32)) for w in (wq, wk))
    left, right = draw(2, H, 8, 1, seed=62)
    a, b = torch.nn.functional.pad(draw(2, H, 1, 32, seed=63), (32, 0))
    moved = []
    for size in (1.01, 0.99):  # the query's push leads, then the key's
        strength = size * (right.norm(dim=1) * b.norm(dim=2) / left.norm(dim=1) / a.norm(dim=2))
        step = 1e-4 * strength[..., None] * left @ a, 1e-4 * right @ b
        moved.append(found((wq, wk, wq + step[0], wk + step[1])))
    alone = (moved[0][:, 0, 0] * moved[1][:, 0, 0]).sum(1).abs()
    assert (alone < 0.1).all()
    assert (direction_overlap(*moved) > 0.999).all()


def test_directions_of_separate_draws_and_of_one_push():
    """A push that both samples share is in both directions; without it they have none in common."""
    for push, low, high in ((0.0, 0.0, 0.3), (3.0, 0.9, 1.0)):
        one = found(case(d=32, D=256, push=push, seed=20))
        other = found(case(d=32, D=256, push=push, seed=40))
        overlap = direction_overlap(one, other)
        assert ((overlap >= low) & (overlap <= high)).all(), overlap


def test_heads_without_update_or_with_bad_weights():
    wq, wk, wq2, wk2 = case()
    wq2[1], wk2[1] = wq[1], wk[1]
    wq2[2, 0, 0] = float("nan")
    got = found((wq, wk, wq2, wk2))
    assert got[1].eq(0).all() and got[2].isnan().all()
    want, _ = dense_directions(*case())
    good = direction_overlap(got[[0, 3]].double(), want[[0, 3]])
    assert (good > 1 - 1e-6).all()
    assert direction_overlap(got[1], got[0]).item() == 0
    assert direction_overlap(got[2], got[0]).isnan()


def test_bfloat16_weights():
    w = [x.bfloat16() for x in case(push=30.0)]
    want, _ = dense_directions(*w)
    got = found(w)
    assert got.dtype == torch.float32
    assert (direction_overlap(got.double(), want) > 1 - 1e-6).all()


def test_overlap_of_known_planes():
    x, y, z, w = torch.eye(4)
    cases = [
        ([x, y], [y, x], 1),
        ([x, y], [z, -y], 1),
        ([x, y], [z, w], 0),
        ([x, y], [(x + z) / 2**0.5, w], 0.5**0.5),
        ([x, y], [(x + 2 * z) / 5**0.5, (2 * y + w) / 5**0.5], 0.8**0.5),
        ([x, 0 * x], [0.6 * x + 0.8 * y, 0 * x], 0.6),
    ]
    new, old = (torch.stack([torch.stack(c[i]) for c in cases]) for i in (0, 1))
    want = [c[2] for c in cases]
    same = torch.stack([new, new], dim=1)
    for sides in ([new, old], [old, new]):  # the smaller of the two sides
        other = torch.stack([x if x is old else new for x in sides], dim=1)
        assert direction_overlap(same, other).tolist() == pytest.approx(want, abs=1e-6)


def test_independent_directions_share_little():
    planes = torch.linalg.qr(draw(2, 2000, 2, 256, 2, seed=70)).Q.mT
    assert direction_overlap(*planes).mean().item() == pytest.approx(1.5 / 256**0.5, rel=0.1)


@pytest.mark.parametrize("moved", ["query", "key"])
def test_rank_one_updates_of_few_channels_do_not_agree_by_chance(moved):
    """Where ΔW_k leads, left vectors lie in the few rows of W_q; the other side tells."""
    wq, wk = 0.02 * draw(2, 50, 4, 256, seed=80)
    samples = []
    for seed in (81, 82):
        push = 1e-4 * draw(50, 4, 1, seed=seed) @ draw(50, 1, 256, seed=seed + 10)
        move = (push, 0) if moved == "query" else (0, push)
        samples.append(found((wq, wk, wq + move[0], wk + move[1])))
    confined = 0 if moved == "key" else 1
    cos = (samples[0][:, confined, 0] * samples[1][:, confined, 0]).sum(1).abs()
    assert cos.mean() > 0.3
    assert (direction_overlap(*samples) < 0.5).all()
