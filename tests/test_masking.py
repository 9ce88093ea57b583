"""Signs of masking: blind noise, transfer, surfaces, masks that are found."""
import json
from functools import partial

import pytest
import torch
from conftest import ROOT
from patients import Scale, quadrants
from torch import nn
from torch.testing import assert_close

from jat_nb.attacks import ggsm
from jat_nb.contract import check_attack
from jat_nb.evaluation import budget_curve, evaluate, ggsm_at, joint_at, pgd_at
from jat_nb.masking import (CHECKS, BudgetSurface, autoattack_agrees, budget_surface, checks_by_name,
                            local_linearity, masking_report, random_flow, random_pixels, steps_curve, transfer)
from jat_nb.randomness import image_generators
from jat_nb.threats import Flow


@pytest.fixture(scope="module")
def trained():
    return quadrants()


# -- noise, transfer, effort, surface

def test_random_baselines_keep_the_contract():
    assert all(c.passed for c in check_attack(random_pixels(0.05), eps_pixel=0.05, zero=random_pixels(0.0)))
    generators = image_generators(0, range(2))
    moved = random_flow(0.5)(None, torch.rand(2, 3, 7, 9), None, generator=generators)
    assert moved.shape == (2, 3, 7, 9) and 0 <= moved.min() and moved.max() <= 1
    with pytest.raises(ValueError, match="eps_flow must be finite"):
        random_flow(float("nan"))


def test_random_flow_is_the_start_of_ggsm(trained):
    model, x, y = trained
    start = ggsm(model, x, y, eps=0.7, step=0.0, steps=1, generator=image_generators(0, range(24)))
    assert_close(random_flow(0.7)(model, x, y, generator=image_generators(0, range(24))), start, rtol=0, atol=0)


def test_transfer_from_itself_is_white_box(trained):
    model, x, y = trained
    suite = {"PGD": pgd_at(0.1, 2), "Joint": joint_at(0.1, 0.5, 2), "two": [pgd_at(0.1, 2), ggsm_at(0.5, 2)]}
    white, own = evaluate(model, x, y, suite, batch_size=7, seed=3), transfer(model, model, x, y, suite, seed=3)
    assert own.names == white.names and torch.equal(own.correct, white.correct) and own.seed == 3


def test_transfer_crafts_on_the_source(trained):
    model, x, y = trained
    seen, judge = [], nn.Sequential(model, Scale(2.0))
    source = nn.Sequential(model, Scale(1.0)).train()
    def spy(model, x, y, generator=None):
        seen.append(model)
        assert not any(m.training for m in model.modules())
        return pgd_at(0.15, 2)(model, x, y, generator=generator)
    found = transfer(source, judge, x, y, {"spy": spy})
    assert seen == [source] and source.training and found.passes[0, 1] == 0


def test_steps_curve(trained):
    model, x, y = trained
    found = steps_curve(model, x, y, partial(pgd_at, 0.12), (1, 4), restarts=3, unbounded=pgd_at(0.5, 20))
    assert found.names == ("1", "4", "4 x 3", "unbounded")
    assert (found.correct[2] <= found.correct[1]).all() and found.correct[3].sum() == 0
    assert torch.equal(found.correct[1], evaluate(model, x, y, {"PGD": pgd_at(0.12, 4)}).correct[0])
    for steps in ((), (0, 1), (2, 2)):
        with pytest.raises(ValueError, match="expected increasing steps"):
            steps_curve(model, x, y, partial(pgd_at, 0.1), steps)


def test_surface_corner_and_axes(trained):
    model, x, y = trained
    pixel, flow = [0, 0.06, 0.15], [0, 0.5, 1.0]
    surface = budget_surface(model, x, y, pixel, flow, steps=2, seed=5)
    assert surface.correct.shape == (3, 3, 24) and surface.seed == 5
    assert torch.equal(surface.correct[0, 0], model(x).argmax(1) == y)
    along = lambda attack_at, budgets: budget_curve(model, x, y, partial(attack_at, steps=2), budgets, seed=5).correct
    assert torch.equal(surface.correct[1:, 0], along(pgd_at, pixel[1:]))
    assert torch.equal(surface.correct[0, 1:], along(ggsm_at, flow[1:]))
    joint = {"Joint": joint_at(0.06, 1.0, 2)}
    assert torch.equal(surface.correct[1, 2], evaluate(model, x, y, joint, seed=5).correct[0])
    assert list(surface.table().index) == [0.0, 0.06, 0.15] and surface.table().shape == (3, 3)


def test_surface_closure():
    torch.manual_seed(0)
    raw = BudgetSurface((0, 1, 2, 3), (0, 1, 2), torch.rand(4, 3, 50) > 0.2, seed=0)
    closed = raw.worst().correct
    for p in range(4):
        for f in range(3):
            assert torch.equal(closed[p, f], raw.correct[:p + 1, :f + 1].all(0).all(0))


def test_surface_refuses(trained):
    for pixel, flow in (([], [0]), ([0], [0.5, 0.5]), ([-1], [0])):
        with pytest.raises(ValueError, match="expected increasing budgets"):
            budget_surface(*trained, pixel, flow)


# -- masking

BRIEF = dict(eps_pixel=0.15, eps_flow=4.0, steps=(8, 16), restarts=2)


class Rounded(nn.Module):
    "Logits in whole numbers: the same classes almost everywhere, no gradient anywhere."
    def forward(self, logits):
        return (20 * logits).round()


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        return logits.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Backwards(nn.Module):
    "The right logits, with a gradient that points the wrong way."
    def forward(self, logits):
        return Reversed.apply(logits)


def test_an_honest_model_passes(trained):
    report = masking_report(*trained, **BRIEF, siamese=trained[0], n_autoattack=2)
    assert report.failed == () and [r["held"] for r in report.rows] == [True] * 6
    assert [r["check"] for r in report.rows] == list(CHECKS)
    assert json.loads(json.dumps(report.record(), allow_nan=False)) == report.record()
    assert "clean 1" in report.table().loc["more effort", "seen"]


@pytest.mark.parametrize("mask", [Scale(1e6), Rounded(), Scale(0.0)], ids=["loud", "rounded", "mute"])
def test_planted_masks_are_found(trained, mask):
    model, x, y = trained
    masked = nn.Sequential(model, mask)
    if isinstance(mask, Scale) and not mask.factor:
        y = torch.zeros_like(y)  # all logits equal: class 0 everywhere
    report = masking_report(masked, x, y, **BRIEF, siamese=model)
    assert {"unbounded", "noise", "linearity"} <= set(report.failed)
    assert masking_report(masked, x, y, **BRIEF).record()["rows"][3]["held"] is None


def test_a_gradient_that_points_backwards(trained):
    model, x, y = trained
    wrong = y.clone()
    wrong[:8] = (wrong[:8] + 1) % 4  # images wrong when clean, which FGSM then "corrects"
    report = masking_report(nn.Sequential(model, Backwards()), x, wrong, **BRIEF)
    seen = report.rows[0]["seen"]
    assert seen["FGSM"] > seen["clean"] and {"more effort", "unbounded", "noise"} <= set(report.failed)


def test_autoattack_check(trained):
    model, x, y = trained
    loud = nn.Sequential(model, Scale(1e6))
    report = masking_report(loud, x, y, **BRIEF, n_autoattack=2)
    assert "autoattack" in report.failed and report.rows[4]["seen"]["AutoAttack"] < report.rows[4]["seen"]["PGD"]


def test_report_does_not_depend_on_the_batch(trained):
    reports = [masking_report(*trained, **BRIEF, siamese=trained[0], batch_size=b).record() for b in (5, 24)]
    cosines = [r["rows"][5]["seen"].pop("cosine") for r in reports]
    assert reports[0] == reports[1] and cosines[0] == pytest.approx(cosines[1], abs=1e-5)


def test_report_without_flow_and_bad_input(trained):
    report = masking_report(*trained, **BRIEF | dict(eps_flow=0), siamese=trained[0])
    assert set(report.rows[2]["seen"]) == {"noise", "PGD"} and set(report.rows[3]["seen"]) == {"own PGD", "borrowed PGD"}
    with pytest.raises(ValueError, match="n_autoattack from 0 to 24"):
        masking_report(*trained, n_autoattack=25)
    for wrong in (dict(eps_pixel=0), dict(steps=(5, 20)), dict(steps=(20, 10))):
        with pytest.raises(ValueError, match="eps_pixel > 0.* increasing steps from 8 on"):
            masking_report(*trained, **wrong)


def test_local_linearity(trained):
    model, x, y = trained
    two = nn.Sequential(nn.Flatten(), nn.Linear(144, 2))
    assert_close(local_linearity(two, x, y % 2), torch.ones(24, dtype=torch.float64))
    assert local_linearity(nn.Sequential(two, Scale(0.0)), x, y % 2).abs().max() == 0
    whole, parts = local_linearity(model, x, y, eps=0.05), local_linearity(model, x, y, eps=0.05, batch_size=5)
    assert_close(whole, parts, atol=1e-5, rtol=0)
    assert (whole.abs() <= 1 + 1e-9).all() and whole.mean() > 0.5
    faint = local_linearity(nn.Sequential(two, Scale(1e-30)), x, y % 2)  # squares of such gradients vanish
    assert_close(faint, torch.ones(24, dtype=torch.float64))


# -- names, and one rule for AutoAttack

@pytest.mark.parametrize("pgd, auto, n, agrees", [
    (151, 150, 1000, True), (149, 150, 1000, True), (148, 150, 1000, False),  # AutoAttack may keep one image more
    (200, 150, 1000, True), (201, 150, 1000, False),  # 50 of 1000 images are five points
    (30, 20, 200, True), (31, 20, 200, False), (3, 2, 3, True), (3, 1, 3, False), (0, 0, 5, True)])
def test_one_rule_for_the_gap_counts_images(pgd, auto, n, agrees):
    assert autoattack_agrees(pgd / n, auto / n, n) is agrees


@pytest.mark.parametrize("survivors", range(1, 200, 7))
def test_five_points_are_five_points_wherever_they_start(survivors):
    assert autoattack_agrees((survivors + 10) / 211, survivors / 211, 211)
    assert not autoattack_agrees((survivors + 11) / 211, survivors / 211, 211)


def test_committed_records_keep_their_verdicts():
    "By letter in the records, by name now; AutoAttack's gap as it was judged when they were written."
    folders = sorted(p.parent for p in (ROOT / "nbs/results").glob("*/*/eval-masking.json"))
    assert len(folders) >= 10
    for folder in folders:
        kept = json.loads((folder / "eval-masking.json").read_text())["metrics"]["rows"]
        named = checks_by_name(kept)
        assert list(named) == list(CHECKS)
        assert [row["held"] for row in named.values()] == [row["held"] for row in kept]
        assert checks_by_name(named.values()) == named
        counts = [json.loads((folder / f"eval-{suite}.json").read_text())["metrics"] for suite in ("autoattack", "jat")]
        n = counts[0]["n"]
        auto, pgd = (bits[:n].count("1") / n for bits in (counts[0]["correct"]["AutoAttack"], counts[1]["correct"]["PGD100"]))
        assert autoattack_agrees(pgd, auto, n) == (-1 / n <= pgd - auto <= 0.05)


def test_unknown_checks_are_named():
    with pytest.raises(ValueError, match="unknown check 'g'.*more effort, unbounded"):
        checks_by_name([{"check": "g", "held": True}])


def test_flow_threat_budget_of_the_random_flow():
    w = Flow(0.4).init(torch.rand(3, 1, 9, 9), True, None)
    assert (w.norm(dim=1) <= 0.4 + 1e-6).all()
