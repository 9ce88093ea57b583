"""The audit: AutoAttack within our contract, closed forms, transfer, surfaces, masks that are found, and SSIM."""
import json
import logging
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from jat_nb.attacks import ggsm
from jat_nb.audit import (BudgetSurface, autoattack, budget_surface, local_linearity, masking_report, random_flow,
                          random_pixels, steps_curve, transfer)
from jat_nb.evaluation import budget_curve, check_attack, evaluate, ggsm_at, jat_suite, pgd_at
from jat_nb.randomness import image_generators
from jat_nb.threats import Flow


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, logits):
        return self.factor * logits


def linear(classes=5, size=6, seed=1):
    "A linear model, images away from 0 and 1, and labels it mostly gets right."
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(size * size, classes))
    x = 0.3 + 0.4 * torch.rand(12, 1, size, size)
    y = model(x).argmax(1)
    y[::6] = (y[::6] + 1) % classes
    return model, x, y


def optimum(model, x, y, eps):
    "Who survives every perturbation of at most eps per pixel: the margin against each class, in closed form."
    w, b = model[1].weight.detach(), model[1].bias.detach()
    apart = w[y][:, None] - w
    margin = torch.einsum("njd,nd->nj", apart, x.flatten(1)) + b[y][:, None] - b - eps * apart.abs().sum(2)
    return (margin.scatter(1, y[:, None], 1.0) > 0).all(1)


@pytest.fixture(scope="module")
def trained():
    "A small network that tells which quadrant of an image is bright, and the images."
    torch.manual_seed(0)
    y = torch.randint(4, (256,))
    x = 0.35 * torch.rand(256, 1, 12, 12)
    for image, q in zip(x, y):
        image[:, 6 * (q // 2):6 * (q // 2) + 6, 6 * (q % 2):6 * (q % 2) + 6] += 0.25
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(3), nn.Flatten(),
                          nn.Dropout(0.1), nn.Linear(8 * 16, 4))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    optimizer.zero_grad()
    return model.eval(), x[:24], y[:24]


# -- AutoAttack

@pytest.mark.parametrize("eps", [0.0, 0.004, 0.01, 0.03])
def test_autoattack_finds_the_optimum_of_a_linear_model(eps):
    model, x, y = linear()
    expected = optimum(model, x, y, eps)
    suite = {"AutoAttack": partial(autoattack, eps=eps, attacks=["apgd-ce", "apgd-t"]), "PGD": pgd_at(eps)}
    found = evaluate(model, x, y, suite)
    assert torch.equal(found.correct[0], expected)
    assert found.accuracy[0] <= found.accuracy[1]


def test_autoattack_standard_is_the_library_s_standard(monkeypatch):
    from pyautoattack import AutoAttack
    model, x, y = linear(classes=10, size=4)
    seen = []
    def settings(library, x, y, batch_size):
        plain = lambda part: {k: v for k, v in vars(part).items() if isinstance(v, (int, float, str, list))}
        seen.append([plain(v) for v in (library, library.apgd, library.apgd_targeted, library.fab, library.square)])
        return x, y
    monkeypatch.setattr(AutoAttack, "run_standard_evaluation", settings)
    AutoAttack(model, eps=0.02, seed=7, device=x.device).run_standard_evaluation(x, y, batch_size=12)
    autoattack(model, x, y, eps=0.02, seed=7)
    theirs, ours = seen
    assert (theirs[0].pop("version"), ours[0].pop("version")) == ("standard", "custom") and ours == theirs
    assert ours[0]["attacks_to_run"] == ["apgd-ce", "apgd-t", "fab-t", "square"] and ours[4]["n_queries"] == 5000


def test_autoattack_gives_the_library_s_images():
    from pyautoattack import AutoAttack
    model, x, y = linear(classes=10, size=4)
    members = ["apgd-ce", "fab-t"]
    library = AutoAttack(model.requires_grad_(False), eps=0.01, seed=7, device="cpu", version="custom", attacks=members)
    library.apgd.n_restarts = 1
    with torch.random.fork_rng():
        theirs = library.run_standard_evaluation(x, y)[0]
    assert_close(autoattack(model, x, y, eps=0.01, seed=7, attacks=members), theirs, rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["Linf", "l2"])
def test_autoattack_budget_and_range(trained, norm):
    model, x, y = trained
    x = x[:6].clone()
    x[0], x[1] = 0.0, 1.0
    eps = 0.2 if norm == "Linf" else 2.0
    found = autoattack(model, x, y[:6], eps=eps, norm=norm, attacks=["apgd-ce", "fab-t"])
    size = (found - x).flatten(1).norm(dim=1, p=torch.inf if norm == "Linf" else 2)
    assert (size <= eps + 1e-6).all() and found.min() >= 0 and found.max() <= 1 and (size > 0).any()
    assert not found.requires_grad and found.dtype == x.dtype


def test_autoattack_square_sees_without_gradients(trained):
    model, x, y = trained
    flat = nn.Sequential(model, Scale(1e6))
    hard = evaluate(flat, x, y, {"PGD": pgd_at(0.15, 5)}).union.nonzero()[:4, 0]
    found = evaluate(flat, x[hard], y[hard], {"Square": partial(autoattack, eps=0.15, attacks=["square"])})
    assert len(hard) == 4 and found.correct.sum() == 0


def test_autoattack_leaves_everything_as_found(trained, capfd, caplog):
    model, x, y = trained
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    modes, wants = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    state, kept, trace = torch.get_rng_state(), x.clone(), sys.gettrace()
    with caplog.at_level(logging.WARNING), torch.autocast("cpu", dtype=torch.bfloat16):
        autoattack(nn.Sequential(model, Scale(0.0)), x[:2], y[:2], attacks=["apgd-ce", "apgd-t", "fab-t"])  # no gradient
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(kept, x) and sys.gettrace() is trace
    assert modes == [m.training for m in model.modules()] and wants == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert capfd.readouterr() == ("", "") and not caplog.records
    model.eval().requires_grad_(True)


def test_autoattack_is_deterministic(trained):
    model, x, y = trained
    attack = partial(autoattack, model, x[:4], y[:4], eps=0.2, attacks=["apgd-ce"])
    draws = lambda seed: image_generators(seed, range(4))
    assert torch.equal(attack(seed=1), attack(seed=1)) and not torch.equal(attack(seed=1), attack(seed=2))
    assert torch.equal(attack(generator=draws(0)), attack(generator=draws(0)))
    assert not torch.equal(attack(generator=draws(0)), attack(generator=draws(1)))
    one = lambda: torch.Generator().manual_seed(3)
    assert torch.equal(attack(generator=one()), attack(generator=one()))


def test_autoattack_one_at_a_time_keeps_the_whole_contract():
    model, x, y = linear(size=4)
    attack = partial(autoattack, eps=0.02, attacks=["apgd-ce"], batch_size=1)
    checks = check_attack(attack, eps_pixel=0.02, zero=partial(attack, eps=0.0), model=model, x=x[1:3], y=y[1:3], shapes=())
    assert all(c.passed for c in checks), [c for c in checks if not c.passed]


def test_autoattack_batches_share_draws():
    model, x, y = linear(size=4)
    attack = partial(autoattack, eps=0.02, attacks=["apgd-ce"])
    checks = check_attack(attack, eps_pixel=0.02, model=model, x=x[1:3], y=y[1:3], shapes=())
    assert {c.promise for c in checks if not c.passed} <= {"companions do not matter", "alone or in another order"}


@pytest.mark.parametrize("classes", [2, 3])
def test_autoattack_with_few_classes(classes):
    model, x, y = linear(classes, size=4)
    quick = dict(eps=0.05, batch_size=4)
    found = autoattack(model, x[:2], y[:2], **quick)  # everything the classes allow
    assert torch.equal(evaluate(model, found, y[:2], {"-": lambda model, x, y, **_: x}).union,
                       optimum(model, x[:2], y[:2], 0.05))
    with pytest.raises(ValueError, match=f"'apgd-t' needs 4 classes, the model has {classes}"):
        autoattack(model, x, y, attacks=["apgd-t"])


def test_autoattack_in_double_precision_and_alone():
    model, x, y = linear(size=4)
    kept = x[1:2].double() / 3  # not representable in float32
    found = autoattack(model.double(), kept, y[1:2], eps=1e-4, attacks=["apgd-ce"])
    assert found.dtype == torch.float64 and torch.equal(found, kept)  # survived: as it was, to the last digit


def test_autoattack_under_inference_mode(trained):
    model, x, y = trained
    with torch.inference_mode():
        assert autoattack(model, x[:2] * 1.0, y[:2], attacks=["apgd-ce"]).shape == x[:2].shape


@pytest.mark.parametrize("options, message", [
    (dict(attacks=["pgd"]), "expected attacks out of apgd-ce"), (dict(attacks=[]), "got none"),
    (dict(norm="L1"), "expected norm 'Linf' or 'L2'"), (dict(batch_size=0), "batch_size >= 1"),
    (dict(eps=-0.1), "eps_pixel must be finite and >= 0")])
def test_autoattack_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        autoattack(*linear(), **options)


def test_autoattack_refuses_bytes_and_foreign_labels():
    model, x, y = linear()
    with pytest.raises(ValueError, match="divide bytes by 255"):
        autoattack(model, 255 * x, y)
    with pytest.raises(ValueError, match="labels from 0 to 4"):
        autoattack(model, x, y + 5)


def test_autoattack_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ImportError, match=r'pip install "jat_nb\[autoattack\]"'):
        autoattack(*linear())


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
    suite = jat_suite(eps_pixel=0.1, eps_flow=0.5, steps=2) | {"two": [pgd_at(0.1, 2), ggsm_at(0.5, 2)]}
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
    joint = jat_suite(eps_pixel=0.06, eps_flow=1.0, steps=2, names=["Joint"])
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
    assert [r["check"] for r in report.rows] == list("abcdef")
    assert json.loads(json.dumps(report.record(), allow_nan=False)) == report.record()
    assert "clean 1" in report.table().loc["a", "seen"]


@pytest.mark.parametrize("mask", [Scale(1e6), Rounded(), Scale(0.0)], ids=["loud", "rounded", "mute"])
def test_planted_masks_are_found(trained, mask):
    model, x, y = trained
    masked = nn.Sequential(model, mask)
    if isinstance(mask, Scale) and not mask.factor:
        y = torch.zeros_like(y)  # all logits equal: class 0 everywhere
    report = masking_report(masked, x, y, **BRIEF, siamese=model)
    assert {"b", "c", "f"} <= set(report.failed)
    assert masking_report(masked, x, y, **BRIEF).record()["rows"][3]["held"] is None


def test_a_gradient_that_points_backwards(trained):
    model, x, y = trained
    wrong = y.clone()
    wrong[:8] = (wrong[:8] + 1) % 4  # images wrong when clean, which FGSM then "corrects"
    report = masking_report(nn.Sequential(model, Backwards()), x, wrong, **BRIEF)
    seen = report.rows[0]["seen"]
    assert "a" in report.failed and seen["FGSM"] > seen["clean"] and {"b", "c"} <= set(report.failed)


def test_autoattack_check(trained):
    model, x, y = trained
    loud = nn.Sequential(model, Scale(1e6))
    report = masking_report(loud, x, y, **BRIEF, n_autoattack=2)
    assert "e" in report.failed and report.rows[4]["seen"]["AutoAttack"] < report.rows[4]["seen"]["PGD"]


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


def test_flow_threat_budget_of_the_random_flow():
    w = Flow(0.4).init(torch.rand(3, 1, 9, 9), True, None)
    assert (w.norm(dim=1) <= 0.4 + 1e-6).all()
