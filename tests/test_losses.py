"Losses and labels against SciPy, PyTorch and plain loops, and their laws on random inputs."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import chisquare
from torch.testing import assert_close

from jat_nb.losses import (LOSSES, bilateral_labels, correct, cross_entropy, dlr_loss, kl_divergence, margin_loss,
                           most_confusing_target, random_target, smooth_labels, soft_cross_entropy,
                           targeted_dlr_loss, uniform_labels)

PER_EXAMPLE = [cross_entropy, margin_loss, dlr_loss, most_confusing_target, bilateral_labels]


def case(seed: int, num_classes: int = 10, batch: int = 20, scale: float = 5.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, num_classes, generator=g, dtype=dtype)
    return logits, torch.randint(num_classes, (batch,), generator=g)


cases = st.builds(case, st.integers(0, 10**6), st.integers(4, 30), st.integers(1, 8), st.floats(0.01, 30))


@given(cases)
@settings(max_examples=40, deadline=None)
def test_an_example_does_not_know_its_batch(data):
    logits, y = data
    for f in PER_EXAMPLE:
        assert torch.equal(f(logits, y)[-1:], f(logits[-1:], y[-1:]))


@given(cases, st.floats(-50, 50), st.floats(0.1, 100))
@settings(max_examples=40, deadline=None)
def test_shift_and_scale(data, shift, factor):
    logits, y = data
    t = random_target(y, logits.shape[1])
    moved = factor * logits + shift
    assert_close(margin_loss(moved, y), factor * margin_loss(logits, y), rtol=1e-6, atol=1e-6)
    assert_close(dlr_loss(moved, y), dlr_loss(logits, y), rtol=1e-6, atol=1e-6)
    assert_close(targeted_dlr_loss(moved, y, t), targeted_dlr_loss(logits, y, t), rtol=1e-6, atol=1e-6)
    assert_close(cross_entropy(logits + shift, y), cross_entropy(logits, y), rtol=1e-6, atol=1e-6)


@given(cases)
@settings(max_examples=40, deadline=None)
def test_the_sign_is_the_verdict(data):
    logits, y = data
    wrong = logits.argmax(1) != y
    assert torch.equal(margin_loss(logits, y) > 0, wrong)
    assert torch.equal(dlr_loss(logits, y) > 0, wrong)
    assert (cross_entropy(logits, y)[wrong] > math.log(2) - 1e-9).all()
    assert (dlr_loss(logits, y) >= -1).all()


@given(cases, st.floats(0.5, 50), st.floats(1e-4, 1.0))
@settings(max_examples=40, deadline=None)
def test_bilateral_laws(data, ratio, floor):
    logits, y = data
    soft = bilateral_labels(logits, y, ratio, floor)
    own, other = soft.gather(1, y[:, None])[:, 0], soft.scatter(1, y[:, None], -1).amax(1)
    assert (soft >= 0).all()
    assert_close(soft.sum(1), torch.ones(len(y), dtype=soft.dtype))
    assert_close(own, ratio * other, rtol=1e-6, atol=1e-9)
    rival = most_confusing_target(logits, y)
    assert_close(soft.gather(1, rival[:, None])[:, 0], soft.scatter(1, y[:, None], 2).amin(1))


@pytest.mark.parametrize("num_classes, off", [(2, 0.1), (10, 0.5), (100, 99 / 108)])
def test_bilateral_with_equal_rivals(num_classes, off):
    soft = bilateral_labels(torch.zeros(1, num_classes), torch.tensor([1]))
    assert_close(soft[0, 1].item(), 1 - off, rtol=0, atol=1e-6)
    assert_close(soft, uniform_labels(torch.tensor([1]), num_classes, off))


def test_bilateral_by_hand_and_detached():
    logits = torch.tensor([[0.7, 0.2, 0.1]]).log().requires_grad_()
    soft = bilateral_labels(logits, torch.tensor([0]))
    w = [0.01, math.log(0.2 + 1e-8) - math.log(0.1 + 1e-8) + 0.01]
    eps = 1 / (1 + 9 * w[1] / sum(w))
    assert_close(soft[0], torch.tensor([1 - eps, eps * w[0] / sum(w), eps * w[1] / sum(w)]), rtol=1e-5, atol=1e-6)
    assert not soft.requires_grad


def test_against_scipy():
    z, y = case(0)
    q, _ = case(1)
    rows = np.arange(len(y))
    assert_close(cross_entropy(z, y).numpy(), -log_softmax(z.numpy(), axis=1)[rows, y])
    kl = rel_entr(softmax(z.numpy(), axis=1), softmax(q.numpy(), axis=1)).sum(1)
    assert_close(kl_divergence(z, q).numpy(), kl)
    soft = softmax(q.numpy(), axis=1)
    assert_close(soft_cross_entropy(z, torch.tensor(soft)).numpy(), -(soft * log_softmax(z.numpy(), axis=1)).sum(1))


def test_against_loops():
    z, y = case(2, num_classes=6)
    t = random_target(y, 6, torch.Generator().manual_seed(0))
    for i, (row, c, a) in enumerate(zip(z.tolist(), y.tolist(), t.tolist())):
        rival = max(v for k, v in enumerate(row) if k != c)
        s = sorted(row, reverse=True)
        assert math.isclose(margin_loss(z, y)[i], rival - row[c], abs_tol=1e-12)
        assert math.isclose(dlr_loss(z, y)[i], (rival - row[c]) / (s[0] - s[2]), abs_tol=1e-12)
        expected = (row[a] - row[c]) / (s[0] - (s[2] + s[3]) / 2)
        assert math.isclose(targeted_dlr_loss(z, y, t)[i], expected, abs_tol=1e-12)


def test_smoothing_is_pytorchs():
    z, y = case(3)
    for eps in (0.0, 0.1, 0.5, 1.0):
        expected = F.cross_entropy(z, y, label_smoothing=eps, reduction="none")
        assert_close(soft_cross_entropy(z, smooth_labels(y, 10, eps).double()), expected, rtol=1e-6, atol=1e-6)


def test_gradients_on_overconfident_models():
    z = torch.tensor([[200.0, 3.0, 0.0, -4.0]], requires_grad=True)
    y = torch.tensor([0])
    grad = {f: torch.autograd.grad(f(z, y).sum(), z)[0] for f in (cross_entropy, margin_loss, dlr_loss)}
    assert not grad[cross_entropy].any()
    assert grad[margin_loss].tolist() == [[-1.0, 1.0, 0.0, 0.0]]
    assert grad[dlr_loss][0, 0] < 0 < grad[dlr_loss][0, 1]


@pytest.mark.parametrize("f", [dlr_loss, lambda z, y: targeted_dlr_loss(z, y, (y + 1) % 10), cross_entropy, margin_loss,
                               lambda z, y: kl_divergence(z, z.roll(1, 1))])
@pytest.mark.parametrize("value", [0.0, 1e4])
def test_constant_logits_stay_finite(f, value):
    z = torch.full((2, 10), value, requires_grad=True)
    loss = f(z, torch.tensor([0, 9]))
    grad, = torch.autograd.grad(loss.sum(), z)
    assert loss.isfinite().all() and grad.isfinite().all()


def test_kl_is_finite_where_probabilities_underflow():
    a, b = torch.tensor([[500.0, 0.0]]), torch.tensor([[0.0, 500.0]])
    assert_close(kl_divergence(a, b), torch.tensor([500.0]))
    assert kl_divergence(a, a + 7).abs().item() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised(dtype):
    z, y = case(4, dtype=torch.float32)
    half = z.to(dtype)
    t = (y + 1) % 10
    results = [cross_entropy(half, y), margin_loss(half, y), dlr_loss(half, y), targeted_dlr_loss(half, y, t),
               kl_divergence(half, half), soft_cross_entropy(half, smooth_labels(y, 10)), bilateral_labels(half, y)]
    assert all(r.dtype == torch.float32 for r in results)
    assert_close(dlr_loss(half, y), dlr_loss(half.float(), y))


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_random_target_is_uniform(num_classes):
    for c in range(min(num_classes, 3)):
        t = random_target(torch.full((20_000,), c), num_classes, torch.Generator().manual_seed(c))
        counts = torch.bincount(t, minlength=num_classes)
        assert counts[c] == 0 and counts.sum() == 20_000
        others = np.delete(counts.numpy(), c)
        assert num_classes == 2 or chisquare(others).pvalue > 1e-3


def test_random_target_repeats_and_is_independent_of_the_batch():
    y = torch.arange(6)
    per_image = lambda seeds: [torch.Generator().manual_seed(s) for s in seeds]
    a, b = (random_target(y, 10, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(random_target(y, 10, per_image(range(6)))[4:5], random_target(y[4:5], 10, per_image([4])))
    assert random_target(y[:0], 10).shape == (0,)
    with pytest.raises(ValueError, match="generator"):
        random_target(y, 10, per_image([0]))


@pytest.mark.parametrize("f", PER_EXAMPLE)
def test_bad_labels_and_logits(f):
    z, y = case(6)
    with pytest.raises(ValueError, match="in 0..9, got"): f(z, y + 10)
    with pytest.raises(ValueError, match="in 0..9, got"): f(z, y - 10)
    with pytest.raises(ValueError, match="int64"): f(z, y.float())
    with pytest.raises(ValueError, match="one_hot"): f(z, F.one_hot(y, 10))
    with pytest.raises(ValueError, match="logits of shape"): f(z[:3], y)
    with pytest.raises(ValueError, match="logits of shape"): f(z[:, :, None], y)


def test_bad_options():
    z, y = case(7)
    with pytest.raises(ValueError, match="at least 3"): dlr_loss(z[:, :2], y % 2)
    with pytest.raises(ValueError, match="at least 4"): targeted_dlr_loss(z[:, :3], y % 3, y % 3)
    with pytest.raises(ValueError, match="target in 0..9"): targeted_dlr_loss(z, y, y + 10)
    with pytest.raises(ValueError, match="2 classes"): random_target(y, 1)
    with pytest.raises(ValueError, match="2 classes"): margin_loss(z[:, :1], y * 0)
    for eps in (-0.1, 1.1):
        with pytest.raises(ValueError, match="eps_y"): uniform_labels(y, 10, eps)
    for options in (dict(ratio=0.0), dict(floor=0.0)):
        with pytest.raises(ValueError, match="ratio > 0"): bilateral_labels(z, y, **options)
    with pytest.raises(ValueError, match="one shape"): soft_cross_entropy(z, y)
    with pytest.raises(ValueError, match="sum to 1"): soft_cross_entropy(z, torch.ones_like(z))
    with pytest.raises(ValueError, match="one shape"): kl_divergence(z, z[:2])


@given(cases, st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_one_logit_that_is_no_number_makes_the_answer_wrong(data, broken, at):
    logits, y = data
    clean = correct(logits, y)
    assert clean.dtype == torch.bool and torch.equal(clean, logits.argmax(1) == y)
    row, column = at % len(logits), at % logits.shape[1]
    logits[row, column] = broken
    expected = clean.clone()
    expected[row] = False
    assert torch.equal(correct(logits, y), expected)


def test_not_a_number_is_wrong_for_every_class_and_format():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        logits = torch.full((3, 3), math.nan, dtype=dtype)
        assert not correct(logits, torch.arange(3)).any(), "argmax of NaN is class 0"
        assert not correct(torch.full((3, 3), math.inf, dtype=dtype), torch.arange(3)).any()


def test_verdict_refuses_what_losses_refuse():
    with pytest.raises(ValueError, match=r"return logits \(3, K\)"):
        correct(torch.zeros(3), torch.zeros(3).long())
    with pytest.raises(ValueError, match="int64"):
        correct(torch.zeros(3, 2), torch.zeros(3))


def test_losses_by_name_agree_with_the_verdict():
    logits, y = case(3)
    assert list(LOSSES) == ["cross_entropy", "margin", "soft_margin", "dlr"]
    assert (LOSSES["soft_margin"](logits, y) >= LOSSES["margin"](logits, y)).all()
    for name in ("margin", "dlr"):
        assert torch.equal(LOSSES[name](logits, y) <= 0, correct(logits, y))
    assert LOSSES["cross_entropy"] is cross_entropy and LOSSES["margin"] is margin_loss and LOSSES["dlr"] is dlr_loss
