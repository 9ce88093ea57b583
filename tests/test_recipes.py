"Recipes: what is refused before the first batch, schedules, optimisers, and names that become functions."
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from conftest import ALONE

from jat_nb.attacks import ATTACKS, ggsm, pgd
from jat_nb.batches import Batch
from jat_nb.losses import margin_loss
from jat_nb.objectives import jat, natural
from jat_nb.recipes import Recipe, bind
from jat_nb.schedules import learning_rate, make_optimizer

OLD = json.loads((Path(__file__).parent / "recipes_of_0.2.json").read_text(encoding="utf-8"))
JOINT = {"attack": [["double_pass", {"steps": 1}]]}
BASE = dict(objective="jat", attacks=JOINT, epochs=300, milestones=(100, 150))


def of(name="double_pass", **options):
    return {"attacks": {"attack": [[name, options]]}}


# What is refused

@pytest.mark.parametrize("options, message", [
    (dict(objective="trade"), "unknown objective 'trade'"), (of("pdg"), "unknown attack 'pdg': choose one of fgsm"),
    (dict(probe="none"), "unknown probe"), (of(eps=1.0), "takes eps_pixel"), (of(target=3), "takes eps_pixel"),
    (of(return_info=True), "takes eps_pixel"), (dict(probe_options={"generator": 0}), "takes eps_pixel"),
    (dict(objective="adversarial", objective_options={"target": "random"}), "takes no options"),
    (dict(attacks={}), r"'jat' needs attacks for the roles \['attack'\]"),
    (dict(objective="natural"), r"'natural' needs attacks for the roles \[\], the recipe has them for \['attack'\]"),
    (dict(attacks={"attack": [], }), "expected attacks"), (dict(attacks={"attack": ["pgd", {}]}), "expected attacks"),
    (dict(attacks={"near": [["pgd", {}]]}), "needs attacks"), (dict(attacks={"attack": [["pgd", 5]]}), "options of 'pgd'"),
    (dict(attacks={"attack": 5}), "expected attacks"), (dict(attacks={"attack": "pgd"}), "expected attacks"), (dict(attacks=[]), "expected attacks"),
    (dict(epochs=0), "epochs"), (dict(epochs=10), "milestones"), (dict(batch_size=2.5), "batch_size"),
    (dict(iterations=10), "either epochs or iterations"), (dict(epochs=None), "either epochs or iterations"),
    (dict(epochs=None, iterations=0), "either epochs"), (dict(epochs=None, iterations=120), "within 120 iterations"),
    (dict(optimizer="adam"), "optimizer to be 'sgd' or 'adamw', got 'adam'"), (dict(schedule="step"), "schedule to be 'multistep' or"), (dict(lr=0.0), "lr > 0"),
    (dict(lr=math.nan), "JSON data, lr does not"), (dict(momentum=1.0), "momentum < 1"), (dict(warmup=0), "warmup"),
    (dict(ema=1.0), "ema < 1"), (dict(clip_norm=-1.0), "clip_norm"), (dict(accumulate=0), "accumulate"),
    (of(eps_pixel=torch.ones(1)), "JSON"), (of(eps_pixel=math.inf), "JSON"),
    (dict(augment=("mosaic",)), "unknown augmentation 'mosaic'"), (dict(augment=True), "expected augment"),
    (dict(augment="crop_flip"), "expected augment"), (dict(essential=("epoch",)), "unknown field 'epoch'"),
    (dict(schedule="piecewise"), "expected knots"), (dict(schedule="piecewise", knots=((0, 1), (301, 0))), "expected knots"),
    (dict(schedule="piecewise", knots=((9, 1), (3, 0))), "ascending"), (dict(knots=((1, 2, 3),)), "expected knots"),
    (dict(model_options=3), "expected model_options"), (dict(amp="False"), "expected amp to be bool"),
])
def test_refused_recipes(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{**BASE, **options})


@pytest.mark.parametrize("options, message", [
    (of(random_start="False"), "expected random_start of attack 'double_pass' to be bool, got 'False'"),
    (of(steps=2.5), "expected steps of attack 'double_pass' to be int, got 2.5"), (of(steps=True), "expected steps"),
    (of("pgd", eps="8/255"), "expected eps of attack 'pgd' to be float"), (of("ggsm", norm=2), "expected norm"),
    (of("fgsm", loss="hinge"), "unknown loss 'hinge': choose one of cross_entropy, margin, soft_margin, dlr"),
    (of("pgd", loss=None), "unknown loss None"), (of("cascade", independent=1), "expected independent"),
    (dict(probe_options={"keep_best": "yes"}), "expected keep_best of probe 'double_pass'"),
    (dict(objective_options={"labels": "sharp"}), "labels of objective 'jat' .*'bilateral'"),
    (dict(objective_options={"ratoi": 9.0}), "takes target, labels, ratio, floor, eps_y"),
    (dict(objective_options={"target": False}), "target of objective 'jat'"),
    (dict(objective_options={"ratio": "9"}), "ratio of objective 'jat' to be float"),
])
def test_nested_options_are_checked_by_kind(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{**BASE, **options})


@pytest.mark.parametrize("options, message", [
    (of(steps=0), "attack 'double_pass': expected at least one step"), (of("pgd", norm="l3"), "attack 'pgd': .*norm"),
    (of("pgd", eps=8), "attack 'pgd': "), (of("mi_fgsm", restarts=0), "attack 'mi_fgsm': expected at least one start"),
    (of("ggsm", eps=-0.3), "attack 'ggsm': "), (of("ggsm", padding="mirror"), "attack 'ggsm': .*padding"),
    (of("one_pass", order="both"), "unknown order 'both'"), (dict(probe="pgd", probe_options={"eps": 80}), "probe 'pgd': "),
    (dict(attacks={"attack": [["pgd", {}], ["cascade", {"steps": -1}]]}), "attack 'cascade': "),
])
def test_values_that_an_attack_would_refuse_are_refused_in_the_recipe(options, message):
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=message): Recipe(**{**BASE, **options})
    Recipe(**BASE)
    assert torch.equal(before, torch.get_rng_state())


def test_a_movement_may_be_as_long_as_the_images_of_any_data_set():
    Recipe(**{**BASE, **of("worst_of_k", k=3, max_px=31.0)})
    with pytest.raises(ValueError, match="max_px=80 moves images of 64 x 64 out of sight"):
        Recipe(**{**BASE, **of("worst_of_k", k=3, max_px=80.0)})


def test_recipes_share_nothing():
    options = {"steps": 1}
    a = Recipe(**{**BASE, **of(**options)})
    shared = {"attack": [["pgd", options]]}
    b = Recipe(**{**BASE, "attacks": shared})
    options["steps"] = 9
    shared["attack"].append(["pgd", {}])
    assert a.attacks == {"attack": [["double_pass", {"steps": 1}]]} and b.attacks == {"attack": [["pgd", {"steps": 1}]]}
    assert Recipe(epochs=1).probe_options is not Recipe(epochs=1).probe_options


@pytest.mark.parametrize("options", [
    BASE, dict(iterations=80_000, milestones=(40_000.5,)), dict(epochs=40, schedule="piecewise", knots=((0, 0), (16, 1), (40, 0))),
    dict(epochs=3, augment=(), model="small_cnn_mnist", model_options={"drop_rate": 0.5}, data="mnist", essential=("lr", "epochs")),
])
def test_a_trip_through_json(options):
    r = Recipe(**options)
    assert Recipe.from_dict(json.loads(json.dumps(asdict(r)))) == r


# Version 0.2

@pytest.mark.parametrize("name", OLD["recipes"])
def test_recipes_of_0_2_are_read(name):
    old = OLD["defaults"] | OLD["recipes"][name]
    r = Recipe.from_dict(old)
    assert r.attacks == ({} if old["attack"] is None else {"attack": [[old["attack"], old["attack_options"]]]})
    same = set(old) - {"attack", "attack_options", "augment"}
    written = json.loads(json.dumps(asdict(r)))
    assert {k: written[k] for k in same} == {k: old[k] for k in same}
    assert r.augment == ("crop_flip",) and (r.data, r.model, r.iterations) == ("cifar10", "wrn_28_10_cifar", None)


def test_what_a_record_of_0_2_leaves_open():
    old = {k: v for k, v in OLD["defaults"].items() if k not in ("ema", "clip_norm", "accumulate")}
    r = Recipe.from_dict(old | {"augment": False}, model="wrn_10_1_cifar", data="svhn")
    assert (r.augment, r.model, r.data, r.ema, r.clip_norm, r.accumulate) == ((), "wrn_10_1_cifar", "svhn", 0.0, 0.0, 1)
    assert Recipe.from_dict(asdict(r), model="other", data="other") == r  # what is written counts
    with pytest.raises(ValueError, match="unknown field 'momentun'"): Recipe.from_dict(old | {"momentun": 0.8})


# Schedules

SCHEDULES = st.sampled_from(["multistep", "onecycle", "cosine", "constant", "piecewise"])
PLAIN = Recipe(epochs=300, milestones=(100, 150), knots=((0, 0.1), (120, 1), (300, 0)))


@given(SCHEDULES, st.floats(0, 1), st.floats(1e-4, 10))
@settings(max_examples=80, deadline=None)
def test_learning_rate_is_positive_and_scales_with_its_peak(schedule, t, lr):
    r = replace(PLAIN, schedule=schedule, lr=lr)
    assert -1e-12 <= learning_rate(r, t) <= lr * (1 + 1e-9)
    assert math.isclose(learning_rate(replace(r, lr=2 * lr), t), 2 * learning_rate(r, t), abs_tol=1e-12)


def test_knots():
    r = replace(PLAIN, lr=1.0)
    assert_close([learning_rate(r, e / 300) for e in (0, 99, 100, 149, 150, 300)], [1.0, 1.0, 0.1, 0.1, 0.01, 0.01])
    r = replace(r, schedule="onecycle", warmup=0.25)
    assert_close([learning_rate(r, t) for t in (0, 0.25, 1)], [1 / 25, 1.0, 1 / 250_000])
    assert_close([learning_rate(replace(r, schedule="cosine"), t) for t in (0, 0.5, 1)], [1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="0, 1"): learning_rate(r, -0.1)


KNOTS = st.lists(st.tuples(st.integers(0, 30), st.floats(0, 3)), min_size=1, max_size=6,
                 unique_by=lambda knot: knot[0]).map(lambda knots: tuple(sorted(knots)))


@given(KNOTS, st.integers(1, 400), st.sampled_from(["epochs", "iterations"]))
@settings(max_examples=80, deadline=None)
def test_piecewise_is_exact_at_knots_and_straight_between(knots, per_epoch, unit):
    r = Recipe(**{unit: 30}, schedule="piecewise", knots=knots, lr=0.2)
    for place, factor in knots:
        assert learning_rate(r, place * per_epoch / (30 * per_epoch)) == 0.2 * factor  # exactly
    for (a, f), (b, g) in zip(knots, knots[1:]):
        for share in (0.25, 0.5, 0.9):
            between = learning_rate(r, (a + share * (b - a)) / 30)
            assert math.isclose(between, 0.2 * (f + share * (g - f)), rel_tol=1e-9, abs_tol=1e-12)
    assert learning_rate(r, 0) == 0.2 * knots[0][1] and learning_rate(r, 1) == 0.2 * knots[-1][1]


def test_piecewise_may_jump():
    r = Recipe(epochs=10, schedule="piecewise", knots=((0, 1), (5, 1), (5, 0.1), (10, 0.1)), lr=1.0)
    assert [learning_rate(r, t) for t in (0, 0.4999, 0.5, 1)] == [1, 1, 0.1, 0.1]


@pytest.mark.parametrize("steps, warmup", [(40, 0.3), (100, 0.25), (7, 0.5)])
def test_one_cycle_is_pytorchs(steps, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps + 1,
                                                    pct_start=(warmup * steps + 1) / (steps + 1))
    r = Recipe(epochs=1, schedule="onecycle", warmup=warmup)
    for i in range(steps):
        assert_close(learning_rate(r, i / steps), optimizer.param_groups[0]["lr"], rtol=1e-9, atol=1e-12)
        optimizer.step()
        scheduler.step()


def test_milestones_of_iterations_are_iterations():
    r = Recipe(iterations=80_000, milestones=(40_000, 60_000), lr=1.0)
    assert_close([learning_rate(r, i / 80_000) for i in (39_999, 40_000, 60_000)], [1.0, 0.1, 0.01])


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_by_hand(nesterov):
    layer = nn.Linear(1, 1, bias=False)
    optimizer = make_optimizer(layer, Recipe(epochs=1, nesterov=nesterov, weight_decay=0.1))
    theta, v = layer.weight.item(), 0.0
    for g in (1.0, -2.0, 0.5):
        layer.weight.grad = torch.tensor([[g]])
        optimizer.step()
        d = g + 0.1 * theta
        v = 0.9 * v + d
        theta -= 0.1 * (d + 0.9 * v if nesterov else v)
    assert math.isclose(layer.weight.item(), theta, rel_tol=1e-5)


# Names become functions

def batch_of(n=6):
    g = torch.Generator().manual_seed(0)
    return Batch(torch.rand(n, 1, 8, 8, generator=g), torch.arange(n) % 3, torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def test_bind_gives_the_functions_that_are_named():
    model, batch = net(), batch_of()
    assert torch.equal(bind(Recipe(epochs=1)).objective(model, batch), natural(model, batch))
    r = Recipe(**{**BASE, **of("pgd", eps=0.1, steps=2)}, objective_options={"labels": "uniform", "eps_y": 0.3})
    bound, again = bind(r), batch._replace(generator=seeded(1))
    ours = bound.objective(model, batch, **bound.attacks)
    assert torch.equal(ours, jat(model, again, lambda *a, **k: pgd(*a, eps=0.1, steps=2, **k), labels="uniform", eps_y=0.3))


@pytest.mark.parametrize("name", ALONE)
def test_losses_by_name(name):
    model, (x, y, *_) = net(), batch_of()
    bound = bind(Recipe(**{**BASE, **of(name, loss="margin")}, probe=name, probe_options={"loss": "margin"}))
    expected = ATTACKS[name](model, x, y, loss=margin_loss, generator=seeded())
    assert torch.equal(bound.attacks["attack"](model, x, y, generator=seeded()), expected)
    assert torch.equal(bound.probe(model, x, y, generator=seeded()), expected)


def test_a_list_of_attacks_is_a_chain():
    model, (x, y, *_) = net(), batch_of()
    chain = bind(Recipe(**{**BASE, "attacks": {"attack": [["ggsm", {"steps": 2}], ["pgd", {"steps": 1, "eps": 0.1}]]}}))
    generator = seeded()
    by_hand = pgd(model, ggsm(model, x, y, steps=2, generator=generator), y, steps=1, eps=0.1, generator=generator)
    assert torch.equal(chain.attacks["attack"](model, x, y, generator=seeded()), by_hand)
