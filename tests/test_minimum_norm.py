"""Nearest mistakes: closed forms, definitions written out, searches that lie, and the contract."""
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from patients import Scale, linear, quadrants
from torch import nn
from torch.testing import assert_close

from jat_nb import minimum_norm
from jat_nb.attacks import ATTACKS, Adversarial
from jat_nb.contract import check_attack
from jat_nb.evaluation import evaluate
from jat_nb.losses import cross_entropy, margin_loss, random_target
from jat_nb.minimum_norm import (THRESHOLDS, Nearest, _brighten, _saliency, at_threshold, cw_l2, ddn, distance, jsma, nearest,
                                 pointwise)
from jat_nb.randomness import image_generators

QUICK = {"ddn": partial(ddn, steps=15), "cw_l2": partial(cw_l2, search_steps=3, steps=15, first_price=1.0, lr=0.05),
         "jsma": partial(jsma, gamma=0.3), "pointwise": partial(pointwise, restarts=2)}
NORM = {"ddn": "l2", "cw_l2": "l2", "jsma": "share", "pointwise": "pixels"}
LIMIT = {"ddn": "max_l2", "cw_l2": "max_l2", "jsma": "gamma", "pointwise": "max_pixels"}
each_attack = pytest.mark.parametrize("name", QUICK)
each_gradient_attack = pytest.mark.parametrize("name", ["ddn", "cw_l2"])


@pytest.fixture(autouse=True)
def _library(request):
    "Skip what needs Foolbox where it is not installed."
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    if name in ("ddn", "cw_l2"): pytest.importorskip("foolbox")


@pytest.fixture(scope="module")
def trained():
    return quadrants()


def own(n): return image_generators(0, range(n))


def wrong(model, x, y):
    with torch.no_grad(): return model(x).argmax(1) != y


def closest(model, x, y):
    "Distance to the nearest border of a linear model, in closed form, where the range does not matter."
    w, b = model[1].weight.detach(), model[1].bias.detach()
    apart = w[y][:, None] - w
    margin = torch.einsum("njd,nd->nj", apart, x.flatten(1)) + b[y][:, None] - b
    ways = (margin / apart.norm(dim=2)).scatter(1, y[:, None], torch.inf).amin(1)
    return ways.clamp(min=0).double()


# -- distances and curves

def test_distances_by_hand():
    x = torch.full((2, 3, 2, 2), 0.5)
    x_adv = x.clone()
    x_adv[0, :, 1, 0] += torch.tensor([0.1, -0.2, 0.2])
    x_adv[1, 0] = 0.0
    for norm, expected in (("l2", [0.3, 1.0]), ("pixels", [1, 4]), ("share", [3 / 12, 4 / 12])):
        assert_close(distance(x, x_adv, norm), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)
    for bad in ((x, x_adv[:1], "l2"), (x, x_adv, "l1"), (x[0], x_adv[0], "l2")):
        with pytest.raises(ValueError, match="of one shape and a norm out of l2, pixels, share"): distance(*bad)


def test_accuracies_at_thresholds():
    norms = torch.tensor([0.0, 1.0, 1.0, 2.5, torch.inf])
    found = at_threshold(norms, [0, 0.99, 1, 2.5, 1e9])
    assert_close(found, torch.tensor([0.8, 0.8, 0.4, 0.2, 0.2], dtype=torch.float64))
    assert (at_threshold(5 * torch.rand(50), torch.linspace(0, 6, 200).tolist()).diff() <= 0).all()
    for bad in ((norms - 1, [1.0]), (norms, [-0.1]), (norms, [math.nan]), (norms * math.nan, [1.0]), (norms[:0], [1.0])):
        with pytest.raises(ValueError, match="all >= 0"): at_threshold(*bad)
    assert THRESHOLDS["mnist"] == {"pixels": (12,), "l2": (1.0, 2.0, 3.0)} and THRESHOLDS["cifar10"]["pixels"] == (50,)


# -- the check that all of them pass through

@pytest.mark.parametrize("lie", [lambda x: x, lambda x: torch.zeros_like(x), lambda x: x + 7, lambda x: x * math.nan, lambda x: -x * math.inf])
def test_what_a_search_claims_is_asked_of_the_network(lie):
    model, x, y = linear()
    found = nearest(model, x, y, lambda predict, x, y, target: lie(x), norm="l2", return_info=True)
    bad = wrong(model, found.images, y)
    assert torch.equal(found.norms.isfinite(), bad) and torch.equal(found.success, bad)
    assert 0 <= found.images.min() and found.images.max() <= 1 and found.images.isfinite().all()
    before = wrong(model, x, y)
    assert before.any() and (found.norms[before] == 0).all() and torch.equal(found.images[before], x[before])
    assert_close(found.norms[bad], distance(x, found.images, "l2")[bad], rtol=0, atol=0)
    assert torch.equal(found.x_adv[~bad], x[~bad])


def test_what_a_limit_leaves():
    model, x, y = linear()
    push = lambda predict, x, y, target: x + 0.3 * torch.sign(torch.arange(12.0) % 3 - 1)[:, None, None, None]
    free = nearest(model, x, y, push, norm="l2", return_info=True)
    limit = free.norms[free.norms.isfinite() & (free.norms > 0)].median().item()
    held = nearest(model, x, y, push, norm="l2", limit=limit, return_info=True)
    assert torch.equal(held.norms, free.norms) and torch.equal(held.images, free.images)
    assert torch.equal(held.success, free.norms <= limit) and held.success.sum() > 2
    assert torch.equal(wrong(model, held.x_adv, y), held.success) and held.within.all()
    assert_close(held.x_adv, x + held.params[0])
    assert_close(held.loss, cross_entropy(model(held.x_adv), y).detach())


def test_a_search_runs_as_promised():
    model, x, y = linear()
    seen = {}
    def search(predict, images, labels, target):
        seen.update(grad=torch.is_grad_enabled(), training=model.training, type=predict(images).dtype)
        assert not torch.is_autocast_enabled("cpu") and not any(p.requires_grad for p in model.parameters())
        images.requires_grad_()
        predict(images).sum().backward()
        torch.manual_seed(5), torch.rand(3)
        return images
    model.train()
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = nearest(model, x, y, search, norm="l2", return_info=True)
    assert seen == {"grad": True, "training": False, "type": torch.float32} and model.training
    assert torch.equal(state, torch.get_rng_state()) and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert (found.n_forward, found.n_backward) == (5, 1) and not found.images.requires_grad
    with pytest.raises(ValueError, match=r"a candidate for each image, \(12, 1, 6, 6\), got \(12, 1, 6, 5\)"):
        nearest(model, x, y, lambda predict, x, y, target: x[..., 1:], norm="l2")
    with pytest.raises(ValueError, match="limit >= 0"): nearest(model, x, y, search, norm="l2", limit=-1.0)


def test_logits_that_are_no_numbers_are_mistakes_already():
    class Blind(nn.Module):
        def forward(self, x): return math.nan * x.flatten(1)
    found = jsma(Blind(), torch.rand(2, 1, 4, 4), torch.tensor([0, 1]), return_info=True)
    assert found.norms.tolist() == [0, 0] and found.success.all()


# -- all four

@each_attack
def test_what_is_returned_is_wrong_and_measured(name, trained):
    model, x, y = trained
    found = QUICK[name](model, x, y, generator=own(24), return_info=True)
    assert isinstance(found, Nearest) and isinstance(found, Adversarial)
    assert torch.equal(found.norms.isfinite(), wrong(model, found.images, y)) and found.norms.isfinite().sum() > 8
    hit = found.norms.isfinite()
    assert_close(found.norms[hit], distance(x, found.images, NORM[name])[hit], rtol=0, atol=0)
    assert 0 <= found.images.min() and found.images.max() <= 1 and torch.equal(found.images, found.x_adv) and found.n_forward > 3
    assert torch.equal(found.x_adv, QUICK[name](model, x, y, generator=own(24)))


@each_attack
def test_the_contract(name):
    attack, key = QUICK[name], LIMIT[name]
    limit = {"ddn": 0.5, "cw_l2": 0.5, "jsma": 0.2, "pointwise": 9}[name]
    near = lambda x, x_adv: distance(x, x_adv, NORM[name]) <= limit
    checks = check_attack(partial(attack, **{key: limit}), within=near, zero=partial(attack, **{key: 0.0}), shapes=((3, 5, 4, 3),))
    assert all(c.passed for c in checks), [c for c in checks if not c.passed]


@each_attack
def test_a_target_is_aimed_at(name, trained):
    model, x, y = trained
    target = (model(x).argmax(1) + 2) % 4
    target[:3] = model(x[:3]).argmax(1)
    found = QUICK[name](model, x, y, target=target, generator=own(24), return_info=True)
    answers = model(found.images).argmax(1)
    assert torch.equal(found.norms.isfinite(), answers == target) and (found.norms[3:].isfinite().any())
    assert (found.norms[:3] == 0).all() and (found.norms[3:] > 0).all()


@each_attack
def test_an_evaluation_by_name_is_the_curve_at_its_threshold(name, trained):
    model, x, y = trained
    assert ATTACKS[name] is QUICK[name].func
    norms = QUICK[name](model, x, y, generator=own(24), return_info=True).norms
    limit = norms[norms.isfinite()].median().item()
    suite = {"named": partial(ATTACKS[name], **QUICK[name].keywords | {LIMIT[name]: limit})}
    found = evaluate(model, x, y, suite, batch_size=24).accuracy[0]
    assert found == at_threshold(norms, [limit])[0] and 0 < found < 1


@each_attack
def test_double_precision_and_odd_callers(name):
    model, x, y = linear(size=4)
    found = QUICK[name](model.double(), x.double() / 3, y, generator=own(12), return_info=True)
    assert found.x_adv.dtype == torch.float64 and torch.equal(found.x_adv[~found.success], (x.double() / 3)[~found.success])
    model.float()
    plain = QUICK[name](model, x, y, generator=own(12), loss=margin_loss)
    with torch.inference_mode(): inside = QUICK[name](model, x * 1.0, y, generator=own(12), loss="margin")
    assert torch.equal(plain, inside)
    with pytest.raises(ValueError, match="divide bytes by 255"): QUICK[name](model, 255 * x, y)
    with pytest.raises(ValueError, match="labels from 0 to 4"): QUICK[name](model, x, y + 5)


# -- DDN and C&W

@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("name, options, slack", [("ddn", {}, 0.02), ("cw_l2", dict(lr=0.005, steps=150), 0.02)])
def test_a_linear_network_has_a_known_answer(name, options, slack, classes):
    model, x, y = linear(classes=classes)
    expected = closest(model, x, y)
    sure = nn.Sequential(model, Scale(100.0)) if name == "ddn" else model  # the cross-entropy sees the nearest border
    found = ATTACKS[name](sure, x, y, return_info=True, **options)
    ahead = expected > 0.02  # below, a step of Adam is longer than the whole way
    assert ahead.sum() >= 6 and (found.norms[expected == 0] == 0).all()
    assert (found.norms >= expected - 1e-6).all()
    assert (found.norms <= (1 + slack) * expected)[ahead].all(), (found.norms / expected)[ahead]


def test_ddn_misses_the_nearest_border_of_an_unsure_network():
    pytest.importorskip("foolbox")
    model, x, y = linear(classes=5)
    expected = closest(model, x, y)
    beyond = (ddn(model, x, y, return_info=True).norms / expected)[expected > 0]
    assert (beyond > 1.1).all() and (beyond < 1.3).all()  # the cross-entropy pulls towards all classes at once


class Spy(nn.Module):
    "A network that keeps what it sees and says."

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x):
        logits = self.inner(x)
        self.seen.append((x.detach().clone(), logits.detach().clone()))
        return logits


@each_gradient_attack
def test_the_nearest_of_all_mistakes_seen_is_kept(name, trained):
    model, x, y = trained
    spy = Spy(model)
    found = QUICK[name](spy, x, y, return_info=True)
    lengths = torch.stack([torch.where(logits.argmax(1) != y, distance(x, images, "l2"), torch.inf) for images, logits in spy.seen])
    best = lengths[:-2].cummin(0).values  # without the pass that judges the end
    assert_close(found.norms, best[-1], rtol=1e-4, atol=1e-5)
    assert best[3].gt(best[-1]).any()


def test_more_rounds_of_cw_never_end_farther_away(trained):
    pytest.importorskip("foolbox")
    model, x, y = trained
    norms = [cw_l2(model, x, y, search_steps=n, steps=30, return_info=True).norms for n in (1, 3, 4, 5, 7)]
    assert all((more <= fewer).all() for fewer, more in zip(norms, norms[1:])) and (norms[-1] < norms[2]).any()


def test_cw_takes_all_its_steps_whatever_the_batch_does():
    pytest.importorskip("foolbox")
    model, x, y = linear()
    found = cw_l2(model, x, y, search_steps=2, steps=50, lr=1e-6, return_info=True)  # no progress at all
    assert (found.n_forward, found.n_backward) == (2 * 50 + 3, 2 * 50)


def test_no_foolbox_before_it_is_needed(monkeypatch):
    code = "import sys, jat_nb.minimum_norm; print('foolbox' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
    monkeypatch.setitem(sys.modules, "foolbox", None)
    for attack in (ddn, cw_l2):
        with pytest.raises(ImportError, match="pip install foolbox"): attack(*linear())
    for attack in (jsma, pointwise): attack(*linear(size=4))


# -- JSMA

def by_definition(model, image, label, target, most, aimed):
    "JSMA of one image from the whole Jacobian, value by value."
    image, changed = image.clone(), set()
    while len(changed) < most:
        answer = model(image[None]).argmax()
        if answer == target if aimed else answer != label: break
        jacobian = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], image).flatten(1)
        worth = []
        for i in range(image.numel()):
            up, rest = float(jacobian[target, i]), float(jacobian[:, i].sum() - jacobian[target, i])
            helps = up >= 0 >= rest and i not in changed and image.view(-1)[i] < 1
            worth.append(-up * rest if helps else 0.0)
        best = max(range(len(worth)), key=worth.__getitem__)
        if worth[best] == 0: break
        image.view(-1)[best] = 1.0
        changed.add(best)
    return image


@pytest.mark.parametrize("aimed", [True, False])
def test_jsma_is_its_definition(trained, aimed):
    model, x, y = trained
    x, y = x[:6].clone(), y[:6]
    x[:, :, :2] = 1.0  # cannot be raised
    guide = random_target(y, 4, own(6))  # what jsma draws; a class that was not given only steers
    given = guide if aimed else None
    found = _brighten(model, x.clone(), y, given, gamma=14 / 144, generator=own(6))
    expected = torch.stack([by_definition(model, *each, most=14, aimed=aimed) for each in zip(x, y, guide)])
    assert torch.equal(found, expected) and (expected != x).any()
    info = jsma(model, x, y, gamma=14 / 144, target=given, generator=own(6), return_info=True)
    answers = model(expected).argmax(1)
    assert torch.equal(info.success, answers == guide if aimed else answers != y)


def test_saliency_from_two_gradients_is_that_of_the_jacobian(trained):
    model, x, y = trained
    target = (y + 1) % 4
    ours = _saliency(model, x[:3], target[:3])[1]
    for worth, image, t in zip(ours, x, target):
        jacobian = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], image)
        up, rest = jacobian[t], jacobian.sum(0) - jacobian[t]
        assert_close(worth, torch.where((up >= 0) & (rest <= 0), up * rest.abs(), 0.0), rtol=1e-4, atol=1e-6)
        assert (worth > 0).any()


@pytest.mark.parametrize("gamma", [0.0, 0.05, 0.29, 1.0])
def test_jsma_only_raises_and_within_its_share(trained, gamma):
    model, x, y = trained
    found = jsma(model, x, y, gamma=gamma, generator=own(24), return_info=True)
    raw = _brighten(model, x.clone(), y, None, gamma=gamma, generator=own(24))
    assert (distance(x, raw, "share") <= gamma).all() and (raw >= x).all() and (raw[raw != x] == 1).all()
    assert (found.norms[found.norms.isfinite()] <= gamma).all()
    longer = jsma(model, x, y, gamma=1.0, generator=own(24), return_info=True).norms
    assert torch.equal(found.norms, torch.where(longer <= gamma, longer, torch.inf))  # one run gives the curve


def test_jsma_draws_every_wrong_class(monkeypatch):
    asked, plain = [], minimum_norm._saliency
    def spy(predict, x, target):
        asked.extend(target.tolist())
        return plain(predict, x, target)
    monkeypatch.setattr(minimum_norm, "_saliency", spy)
    model, x, y = linear(size=4)
    x, y = x[:1].repeat(60, 1, 1, 1), model(x[:1]).argmax(1).repeat(60)
    jsma(model, x, y, gamma=1 / 16, generator=own(60))
    assert sorted(set(asked)) == [k for k in range(5) if k != y[0]] and len(asked) == 60


def test_jsma_passes_over_what_is_white_already():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False))
    model[1].weight.data = torch.tensor([[-3.0, -2, -1], [3, 2, 1]])
    x = torch.tensor([1.0, 0.2, 0.2]).view(1, 1, 1, 3)
    found = _brighten(model, x.clone(), torch.tensor([1]), torch.tensor([1]), gamma=1.0, generator=None)
    assert torch.equal(found, x)  # is the target: nothing to do
    model[1].bias = nn.Parameter(torch.tensor([20.0, 0.0]))
    found = _brighten(model, x.clone(), torch.tensor([0]), torch.tensor([1]), gamma=1 / 3, generator=None)
    assert found.flatten().tolist() == [1.0, 1.0, x[0, 0, 0, 2].item()]


# -- point-wise

def test_no_pixel_can_be_given_back(trained):
    model, x, y = trained
    x = x.repeat(1, 2, 1, 1)
    double = nn.Sequential(Mean(), model)
    found = pointwise(double, x, y, restarts=3, generator=own(24), return_info=True)
    assert found.success.sum() > 8
    for image, clean, label in zip(found.images[found.success], x[found.success], y[found.success]):
        changed = (image != clean).any(0).nonzero()
        assert ((image[:, (image != clean).any(0)] - 0.5).abs() == 0.5).all()  # black or white, all channels alike
        for row, column in changed.tolist():
            back = image.clone()
            back[:, row, column] = clean[:, row, column]
            assert double(back[None]).argmax() == label


class Mean(nn.Module):
    def forward(self, x): return x.mean(1, keepdim=True)


def test_pointwise_finds_the_least_number_of_pixels():
    class Count(nn.Module):
        "Errs as soon as so many pixels are white."
        def forward(self, x): return torch.stack([torch.full((len(x),), self.needed - 0.5), (x > 0.9).flatten(1).sum(1).float()], 1)
    x, y, model = torch.zeros(5, 1, 6, 7), torch.zeros(5, dtype=torch.int64), Count()
    for model.needed in (1, 4, 9): assert (pointwise(model, x, y, generator=own(5), return_info=True).norms == model.needed).all()
    model.needed = 43
    found = pointwise(model, x, y, generator=own(5), return_info=True)
    assert (found.norms == torch.inf).all() and torch.equal(found.x_adv, x) and not found.success.any()


def test_every_image_gives_back_in_an_order_of_its_own():
    fools = lambda images, rows: (images > 0.5).flatten(1).sum(1) >= 3
    x = torch.zeros(20, 1, 4, 5)
    kept = minimum_norm._give_back(fools, x, torch.ones_like(x), torch.rand(20, 20)).flatten(1)
    assert (kept.sum(1) == 3).all() and len({tuple(row) for row in kept.tolist()}) > 15


def test_more_starts_change_fewer_pixels(trained):
    model, x, y = trained
    norms = [pointwise(model, x, y, restarts=n, generator=own(24), return_info=True).norms for n in (1, 2, 6)]
    assert all((more <= fewer).all() for fewer, more in zip(norms, norms[1:])) and (norms[2] < norms[0]).any()


@pytest.mark.parametrize("name", ["jsma", "pointwise"])
def test_an_image_does_not_know_its_batch(name, trained):
    model, x, y = trained
    together = QUICK[name](model, x[:8], y[:8], generator=own(8))
    alone = torch.cat([QUICK[name](model, x[i:i + 1], y[i:i + 1], generator=[own(8)[i]]) for i in range(8)])
    assert torch.equal(together, alone) and (together != x[:8]).any()


def test_pointwise_is_no_worse_than_foolbox(trained):
    foolbox = pytest.importorskip("foolbox")
    model, x, y = trained
    x, y = x[~wrong(model, x, y)], y[~wrong(model, x, y)]
    start = torch.stack([x[(y != label).nonzero()[0, 0]] for label in y])  # its own noise need not fool, and then it raises
    np.random.seed(0)
    network, criterion = foolbox.PyTorchModel(model, (0, 1), device="cpu"), foolbox.criteria.Misclassification(y)
    theirs = foolbox.attacks.PointwiseAttack(l2_binary_search=False).run(network, x, criterion, starting_points=start)
    ours = pointwise(model, x, y, generator=own(len(x)), return_info=True).norms
    assert ours.median() <= distance(x, theirs, "pixels").median() < 144


@pytest.mark.parametrize("attack, options, message", [
    (ddn, dict(steps=0), "steps=0"), (ddn, dict(gamma=1.0), "gamma between 0 and 1"), (ddn, dict(max_l2=-1.0), "limit >= 0"),
    (ddn, dict(max_l2=math.nan), "limit >= 0"), (cw_l2, dict(steps=1.5), "steps=1.5"), (cw_l2, dict(search_steps=0), "search_steps=0"),
    (cw_l2, dict(lr=0.0), "lr and first_price above 0"), (jsma, dict(gamma=1.1), r"share in \[0, 1\]"), (jsma, dict(gamma=-0.1), "share"),
    (pointwise, dict(restarts=0), "restarts=0"), (pointwise, dict(max_pixels=-3), "limit >= 0"), (jsma, dict(loss="mse"), "unknown loss"),
    (pointwise, dict(generator=own(2)), "one generator per image"), (jsma, dict(target=torch.zeros(2, dtype=torch.int64)), "one label per image"),
])
def test_bad_calls(attack, options, message):
    with pytest.raises(ValueError, match=message): attack(*linear(size=4), **options)
