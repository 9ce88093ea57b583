"""AutoAttack within our contract: closed forms, the library's own settings and images, nothing left behind."""
import logging
import sys
from functools import partial

import pytest
import torch
from patients import Scale, linear, optimum, quadrants
from torch import nn
from torch.testing import assert_close

from jat_nb import evaluation
from jat_nb.autoattack import autoattack, autoattack_at
from jat_nb.contract import check_attack
from jat_nb.evaluation import clean, evaluate, pgd_at
from jat_nb.masking import transfer
from jat_nb.processes import Processes
from jat_nb.randomness import image_generators


@pytest.fixture(scope="module")
def trained():
    return quadrants()


def test_the_ensemble_breaks_what_any_of_its_members_breaks(trained):
    "I55, image by image; one member is weaker than the ensemble."
    model, x, y = trained
    members = ["apgd-ce", "apgd-t", "fab-t", "square"]
    suite = {name: partial(autoattack, eps=0.1, seed=0, attacks=name.split()) for name in (" ".join(members), *members)}
    ensemble, *alone = evaluate(model, x[:10], y[:10], suite).correct
    assert all((one | ~ensemble).all() for one in alone)
    assert 0 < ensemble.sum() < max(one.sum() for one in alone)


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
    assert torch.equal(evaluate(model, found, y[:2], {"-": clean}).union,
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
    with pytest.raises(ImportError, match="pip install pyautoattack"):
        autoattack(*linear())


# -- G5: one verdict, whatever the batch

def _blurred(n=200):
    "A linear model of five classes, noisy images, and a budget at which Square's luck decides."
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    x = 0.3 + 0.4 * torch.rand(n, 1, 8, 8)
    return model, x, model(x).argmax(1)


@pytest.fixture
def unlucky(monkeypatch):
    "A suite of AutoAttack members whose verdicts depend on what is drawn: few queries, small budget."
    from pyautoattack import AutoAttack
    whole = AutoAttack.run_standard_evaluation
    def brief(library, *args, **options):
        library.square.n_queries = 30
        return whole(library, *args, **options)
    monkeypatch.setattr(AutoAttack, "run_standard_evaluation", brief)


def test_verdicts_do_not_depend_on_the_batch_size(unlucky):
    model, x, y = _blurred()
    suite = {"AutoAttack": autoattack_at(0.1, block=60, attacks=["square"]),
             "after PGD": [pgd_at(0.003, 2), autoattack_at(0.1, block=60, attacks=["square"])]}
    found = [evaluate(model, x, y, suite, batch_size=b).correct for b in (7, 50, 200)]
    assert 20 < found[0][0].sum() < 180
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    other = evaluate(model, x, y, {"a": autoattack_at(0.1, block=61, attacks=["square"])}).correct[0]
    assert not torch.equal(other, found[0][0])  # another block is another attack
    assert torch.equal(evaluate(model, x, y, suite, active=False).correct, found[0])


def test_verdicts_do_not_depend_on_the_number_of_processes(unlucky, monkeypatch):
    model, x, y = _blurred()
    suite = {"AutoAttack": autoattack_at(0.1, block=60, attacks=["square"])}
    alone, seen = evaluate(model, x, y, suite), []
    for rank in (0, 1):  # each process breaks what lies in its blocks; nothing is exchanged
        monkeypatch.setattr(evaluation, "processes", lambda: Processes(rank, 2))
        monkeypatch.setattr(evaluation._Trial, "right", lambda trial: y == model(x).argmax(1))
        seen.append(evaluate(model, x, y, suite).correct[0])
    assert torch.equal(seen[0] & seen[1], alone.correct[0])
    assert seen[0][60:120].all() and seen[1][:60].all() and not seen[0].all() and not seen[1].all()


def test_transferred_autoattack_keeps_its_blocks(unlucky):
    model, x, y = _blurred(130)
    suite = {"AutoAttack": autoattack_at(0.1, block=60, attacks=["square"])}
    made = [transfer(model, model, x, y, suite, batch_size=b).correct for b in (7, 130)]
    assert torch.equal(*made) and torch.equal(made[0], evaluate(model, x, y, suite).correct)


def test_a_block_is_at_least_one_image():
    with pytest.raises(ValueError, match="block >= 1"):
        autoattack_at(0.1, block=0)
