"""Standard, adversarial and robust risk."""
from functools import partial

import pytest
import torch
from torch import nn

from jat_nb.attacks import pgd
from jat_nb.evaluation import evaluate
from jat_nb.randomness import image_generators
from jat_nb.rigid import Rigid, grid_adv, pgd_plus, rand_adv, rigid_grid
from jat_nb.risks import Risks, risks

N, SIDE = 24, 10


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh(), nn.BatchNorm2d(8, momentum=1.0), nn.Flatten(), nn.Linear(8 * 64, 3))
    x, y = torch.rand(N, 1, SIDE, SIDE), torch.randint(3, (N,))
    with torch.no_grad(): model.train()(x)
    return model.eval(), x, y


ATTACKS = {"grid": partial(grid_adv, max_deg=4.0, max_px=0.3, n_deg=3, n_px=3), "random": partial(rand_adv, max_deg=4.0, max_px=0.3),
           "pixels": partial(pgd, eps=0.02, step=0.01, steps=3),
           "both": partial(pgd_plus, eps=0.01, step=0.005, steps=3, max_deg=2.0, max_px=0.2, n_deg=3, n_px=3)}


def own(): return image_generators(0, range(N))


@pytest.mark.parametrize("name", ATTACKS)
def test_lemma_1_and_theorem_1_image_by_image(case, name):
    r = risks(*case, ATTACKS[name], generator=own)
    stand, adv, rob = (v.int() for v in (r.standard, r.adversarial, r.robust))
    assert torch.equal(adv, stand + (1 - stand) * rob) and (adv <= stand + rob).all()
    assert r.gap == pytest.approx(r.means["standard"] + r.means["robust"] - r.means["adversarial"], abs=1e-12)
    assert 0 < stand.sum() < N and 0 < rob.sum() < N and 0 < r.gap


def test_a_finite_neighbourhood_is_counted_exactly(case):
    model, x, y = case
    points = torch.cat([torch.zeros(1, 3), rigid_grid(max_deg=4.0, max_px=0.3, n_deg=3, n_px=3)])
    with torch.no_grad(): answers = torch.stack([model(Rigid().apply(x, p.expand(N, 3))).argmax(1) for p in points])
    r = risks(model, x, y, ATTACKS["grid"])
    assert torch.equal(r.standard, answers[0] != y) and torch.equal(r.adversarial, (answers != y).any(0))
    assert torch.equal(r.robust, (answers != answers[0]).any(0))


def test_one_minus_the_adversarial_risk_is_robust_accuracy(case):
    model, x, y = case
    table = evaluate(model, x, y, {"pixels": ATTACKS["pixels"]})
    assert torch.equal(risks(model, x, y, ATTACKS["pixels"], generator=own).adversarial, ~table.correct[-1])


def test_an_attack_that_does_nothing(case):
    r = risks(*case, lambda model, x, y, generator=None: x)
    assert torch.equal(r.standard, r.adversarial) and not r.robust.any() and r.gap == 0


def test_the_robust_risk_does_not_read_the_labels(case):
    model, x, y = case
    other = risks(model, x, (y + 1) % 3, ATTACKS["pixels"], generator=own)
    assert torch.equal(risks(model, x, y, ATTACKS["pixels"], generator=own).robust, other.robust)


def test_a_network_without_an_answer_is_wrong_and_keeps_nothing(case):
    _, x, y = case
    class Blind(nn.Module):
        def forward(self, x): return x.new_full((len(x), 3), float("nan"))
    r = risks(Blind(), x, y, lambda model, x, y, generator=None: x)
    assert r.standard.all() and r.adversarial.all() and r.robust.all()


def test_the_model_is_left_in_its_mode(case):
    model, x, y = case
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    risks(model, x, y, ATTACKS["pixels"])
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.eval()


def test_means_of_a_few():
    r = Risks(torch.tensor([True, False]), torch.tensor([True, True]), torch.tensor([False, True]))
    assert r.means == {"standard": 0.5, "adversarial": 1.0, "robust": 0.5} and r.gap == 0


def test_refusals(case):
    model, x, y = case
    with pytest.raises(ValueError, match=r"images in \[0, 1\]"): risks(model, 2 * x, y, ATTACKS["grid"])
    with pytest.raises(ValueError): risks(model, x, y[:2], ATTACKS["grid"])
