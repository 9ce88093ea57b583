"""Blended images: laws of the draws, the objectives against losses written out here, and parts against wholes."""
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jat_nb.attacks import double_pass, ggsm, pgd
from jat_nb.augmentations import AUGMENTATIONS, random_cutout
from jat_nb.batches import _pieces, batches
from jat_nb.data import load
from jat_nb.mixing import attack_then_mix, draw_share, iat, mart, mix, mixed_loss, mixup, partners, robust_mixup
from jat_nb.models import create
from jat_nb.objectives import OBJECTIVES, adversarial, natural, roles
from jat_nb.recipes import Recipe
from jat_nb.rigid import worst_of_k
from jat_nb.training import fit
from jat_nb.updates import train_step
from jat_nb.weights import pretrained
from scipy import stats
from torch.testing import assert_close

NEAR = partial(pgd, eps=0.1, step=0.05, steps=2, random_start=False)
MIXED = {"mixup": (), "robust_mixup": ("attack",), "attack_then_mix": ("attack",), "iat": ("attack",)}


def net(seed=0):
    torch.manual_seed(seed)
    return create("wrn_10_1_cifar", in_chans=1, norm="group")


@pytest.fixture(scope="module")
def data():
    digits = load("digits").subset(40)
    return replace(digits, images=digits.images[:, :, ::2, ::2])


@pytest.fixture
def batch(data):
    return next(batches(data, 24, shuffle=True, seed=3))


def given(name, attack=NEAR):
    return dict.fromkeys(MIXED[name], attack)


def by_hand(batch, tau):
    "Share, permutation and blended label from the batch's own generator."
    source = torch.Generator().manual_seed(0)
    share, order = draw_share(tau, source), torch.randperm(len(batch.y), generator=source)
    label = share * F.one_hot(batch.y, 10) + (1 - share) * F.one_hot(batch.y[order], 10)
    return batch._replace(generator=torch.Generator().manual_seed(0)), share, order, label


@pytest.mark.parametrize("tau", [0.01, 0.1, 0.5, 1.0, 4.0])
def test_shares_follow_the_beta_law(tau):
    g = torch.Generator().manual_seed(1)
    drawn = np.array([draw_share(tau, g) for _ in range(800)])
    law = stats.beta(tau, tau)
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert abs(drawn.mean() - 0.5) < 4 * law.std() / 800 ** 0.5
    for edge in (0.01, 0.1, 0.3):
        p = law.cdf(edge)
        assert abs((drawn < edge).mean() - p) < 4 * (p * (1 - p) / 800) ** 0.5 + 1e-9
    if tau == 0.1:
        assert abs((np.minimum(drawn, 1 - drawn) < 0.01).mean() - 0.64) < 0.07


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_mixed_loss_is_cross_entropy_with_the_mixed_label(alpha):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 10, generator=g, dtype=torch.float64, requires_grad=True)
    y, other = torch.randint(10, (2, 64), generator=g)
    ours = mixed_loss(y, other, alpha)(logits, y)
    soft = alpha * F.one_hot(y, 10) + (1 - alpha) * F.one_hot(other, 10).double()
    theirs = F.cross_entropy(logits, soft, reduction="none")
    assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert_close(*(torch.autograd.grad(v.sum(), logits)[0] for v in (ours, theirs)), rtol=1e-6, atol=1e-6)


def test_blends_stay_between_and_in_range():
    g = torch.Generator().manual_seed(0)
    x, z = torch.rand(2, 500, 1, 4, 4, generator=g).round(decimals=1)
    for alpha in torch.rand(20, generator=g).tolist():
        blend = mix(x, z, alpha)
        assert (blend >= torch.minimum(x, z)).all() and (blend <= torch.maximum(x, z)).all()
        assert_close(blend, alpha * x + (1 - alpha) * z)
    assert torch.equal(mix(x, z, 1.0), x) and torch.equal(mix(x, z, 0.0), z)


def test_partners_are_one_permutation(batch):
    found = partners(batch)
    assert sorted(found.order.tolist()) == list(range(24)) and 0 <= found.alpha <= 1
    assert torch.equal(found.x, batch.x[found.order]) and torch.equal(found.y, batch.y[found.order])


def test_a_share_of_one_is_plain_training(batch):
    model = net()
    assert torch.equal(mixup(model, batch, alpha=1.0), natural(model, batch))
    for objective in (robust_mixup, attack_then_mix):
        assert torch.equal(objective(model, batch, NEAR, alpha=1.0), adversarial(model, batch, NEAR))
    half = (natural(model, batch) + adversarial(model, batch, NEAR)) / 2
    assert_close(iat(model, batch, NEAR, alpha=1.0), half)


def test_mixup_and_iat_against_soft_labels(batch):
    model = net()
    own, share, order, label = by_hand(batch, 1.0)
    clean = F.cross_entropy(model(share * own.x + (1 - share) * own.x[order]), label)
    assert_close(mixup(model, own), clean, rtol=1e-5, atol=1e-5)
    own = by_hand(batch, 1.0)[0]
    x_adv = NEAR(model, own.x, own.y)
    dirty = F.cross_entropy(model(share * x_adv + (1 - share) * x_adv[order]), label)
    assert_close(iat(model, own, NEAR), (clean + dirty) / 2, rtol=1e-4, atol=1e-4)
    assert_close(attack_then_mix(model, by_hand(batch, 1.0)[0], NEAR, tau=1.0), dirty, rtol=1e-4, atol=1e-4)


def test_robust_mixup_written_out(batch):
    model = net()
    own, share, order, label = by_hand(batch, 1.0)
    blend = share * own.x + (1 - share) * own.x[order]
    x = blend
    for _ in range(2):
        x = x.detach().requires_grad_()
        slope = torch.autograd.grad(F.cross_entropy(model(x), label, reduction="sum"), x)[0]
        x = (x + 0.05 * slope.sign()).clamp(blend - 0.1, blend + 0.1).clamp(0, 1).detach()
    assert_close(robust_mixup(model, own, NEAR, tau=1.0), F.cross_entropy(model(x), label), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("attack", [partial(pgd, steps=2), partial(ggsm, steps=2), partial(double_pass, steps=1),
                                    partial(pgd, steps=2, keep_best=True, restarts=2)])
def test_any_gradient_attack(batch, attack):
    model = net()
    loss = robust_mixup(model, batch, attack, tau=1.0)
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.parameters())


def test_a_search_is_refused(batch):
    with pytest.raises(ValueError, match="take one that climbs a gradient"):
        robust_mixup(net(), batch, partial(worst_of_k, k=2, max_deg=5.0, max_px=1.0))
    two = mixed_loss(torch.tensor([0, 1]), torch.tensor([1, 1]), 0.5)
    with pytest.raises(ValueError, match="in their order"):
        two(torch.zeros(2, 2), torch.tensor([0, 0]))  # same number, other images


def test_equation_9_on_a_trained_network():
    trained, digits = pretrained("digits-joint"), load("digits", "test").subset(80)
    strong, holds = partial(pgd, eps=0.1, step=0.02, steps=20), []
    for i, part in enumerate(batches(digits, 4)):
        draw = [part._replace(generator=torch.Generator().manual_seed(i)) for _ in range(2)]
        with torch.no_grad():
            holds.append((robust_mixup(trained, draw[0], strong, tau=1.0)
                          >= attack_then_mix(trained, draw[1], strong, tau=1.0)).item())
    assert np.mean(holds) >= 0.95


# Parts of a batch

@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("parts", [2, 3])
def test_accumulation_is_one_batch(data, name, parts):
    ends = []
    for accumulate in (1, parts):
        model, batch = net(), next(batches(data, 23, seed=4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = train_step(model, batch, optimizer, partial(OBJECTIVES[name], tau=1.0), given(name), accumulate=accumulate)
        ends.append((loss, torch.nn.utils.parameters_to_vector(model.parameters()).detach()))
    assert_close(ends[0][0], ends[1][0], rtol=1e-4, atol=1e-5)
    assert_close(ends[0][1], ends[1][1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MIXED)
def test_processes_and_their_parts_are_one_batch(data, name):
    model = net()
    shares = [next(batches(data, 23, shuffle=True, augment=("crop_flip",), seed=4, part=p, parts=2)) for p in range(2)]
    whole = shares[0].whole()
    assert torch.equal(torch.cat([s.x for s in shares]), whole.x) and torch.equal(whole.x, shares[1].whole().x)
    pieces = [piece for share in shares for piece, _ in _pieces(share, 2, 2)]
    assert [p.start for p in pieces] == [0, 6, 12, 18]
    objective = partial(OBJECTIVES[name], tau=1.0)
    together = sum(piece.share * objective(model, piece, **given(name)) for piece in pieces)
    assert_close(together, objective(model, whole, **given(name)), rtol=1e-4, atol=1e-5)


def test_the_whole_disturbs_no_draw(data):
    calm, curious = ([b for b in batches(data, 20, part=1, parts=2, augment=("crop_flip",))] for _ in range(2))
    for a, b in zip(calm, curious, strict=True):
        b.whole()
        assert torch.equal(torch.rand(3, generator=a.generator), torch.rand(3, generator=b.generator))


# MART

def test_mart_written_out(batch):
    model = net()
    x_adv = NEAR(model, batch.x, batch.y)
    p, q, hit = model(batch.x).softmax(1), model(x_adv).softmax(1), F.one_hot(batch.y, 10).bool()
    boosted = -q[hit].log() - (1 - q.masked_fill(hit, 0).amax(1)).log()
    divergence = F.kl_div(q.log(), p, reduction="none").sum(1)
    assert_close(mart(model, batch, NEAR, beta=2.5), (boosted + 2.5 * divergence * (1 - p[hit])).mean(), rtol=1e-4, atol=1e-4)


def test_mart_is_finite_where_it_is_sure(batch):
    for sign in (1.0, -1.0):
        weight = torch.nn.Parameter(torch.tensor(300.0 * sign))
        sure = lambda x: weight * F.one_hot(batch.y, 10).float()
        loss = mart(sure, batch, lambda model, x, y, **options: x)
        loss.backward()
        assert loss.isfinite() and weight.grad.isfinite()


# By name

def test_names_and_roles():
    assert [roles(OBJECTIVES[name]) for name in MIXED] == list(MIXED.values()) and roles(OBJECTIVES["mart"]) == ("attack",)


def test_a_recipe_trains_and_is_repeated_to_the_bit(data):
    plan = Recipe(objective="robust_mixup", objective_options={"tau": 1.0}, attacks={"attack": [["pgd", {"steps": 1}]]},
                  augment=("crop_flip", "cutout"), data="digits", model="wrn_10_1_cifar", epochs=1, batch_size=20, accumulate=2)
    models = [net(), net()]
    for model in models:
        fit(model, data, plan)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))
    assert not torch.equal(next(models[0].parameters()), next(net().parameters()))


@pytest.mark.parametrize("call, message", [
    (lambda b: draw_share(0.0), "got 0.0"), (lambda b: draw_share(-0.1), "got -0.1"), (lambda b: draw_share(9), "got 9"),
    (lambda b: partners(b, alpha=-0.1), "share alpha"), (lambda b: mixup(net(), b, tau=0), "got 0")])
def test_refusals(batch, call, message):
    with pytest.raises(ValueError, match=message):
        call(batch)


# Cutout

@pytest.mark.parametrize("as_float", [True, False])
def test_cutout_by_hand(as_float):
    x = torch.randint(256, (300, 3, 20, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x, fill = (x / 255, torch.tensor([0.1, 0.2, 0.3])) if as_float else (x, torch.tensor([1, 2, 3]))
    out = random_cutout(x, fill, side_px=6, generator=torch.Generator().manual_seed(7))
    g = torch.Generator().manual_seed(7)
    rows, columns = (torch.randint(n, (300, 1), generator=g).flatten().tolist() for n in (20, 32))
    for image, ours, r, c in zip(x, out, rows, columns, strict=True):
        slow = image.clone()
        slow[:, max(r - 3, 0):r + 3, max(c - 3, 0):c + 3] = fill.to(x).view(3, 1, 1)
        assert torch.equal(ours, slow)


@pytest.mark.parametrize("name, colour", [("cifar10", (125, 123, 114)), ("mine", None)])
def test_cutout_by_name(name, colour):
    x = torch.randint(256, (50, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    out = AUGMENTATIONS["cutout"](x, name, torch.Generator().manual_seed(0))
    colour = x.new_tensor(colour or x.float().mean((0, 2, 3)).round().tolist())
    hidden = (out == colour.view(1, 3, 1, 1)).all(1)
    assert out.dtype == torch.uint8 and 64 <= hidden.flatten(1).sum(1).min() and hidden.flatten(1).sum(1).max() <= 256
    assert ((out == x).all(1) | hidden).all()


@pytest.mark.parametrize("name", ["cifar10", "mnist", "digits"])
def test_colours_are_the_means_of_the_sets(name):
    from jat_nb.augmentations import _MEANS
    from jat_nb.data import available
    if name != "digits" and not available(name):
        pytest.skip(f"{name} is not at hand")
    assert_close(torch.tensor(load(name).mean) * 255, torch.tensor(_MEANS[name]).float(), rtol=0, atol=0.5)
