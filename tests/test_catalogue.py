"Papers found by name, what a tier may change, and that JAT's settings are those of version 0.2."
import csv
import json
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path

import pytest

from jat_nb import catalogue
from jat_nb.catalogue import TIER, Paper, Row, adapt, papers, recipe, recipes, register, setting
from jat_nb.data import default_budget
from jat_nb.papers.jat import PAPER, RECIPES, ROWS
from jat_nb.recipes import Recipe
from jat_nb.training import fit

ROOT = Path(__file__).parent.parent
OLD = json.loads((Path(__file__).parent / "recipes_of_0.2.json").read_text(encoding="utf-8"))
RUNS = [path for path in sorted((ROOT / "nbs" / "results").rglob("run.json"))
        if ":" not in json.loads(path.read_text(encoding="utf-8"))["about"]["name"]]  # a generator has no recipe


def options(r):
    "The keywords of the only attack."
    return r.attacks["attack"][0][1] if r.attacks else {}


# The same settings as before papers had rooms of their own

@pytest.mark.parametrize("data, tier", [(data, tier) for data in OLD["adapted"] for tier in OLD["adapted"][data]])
def test_settings_are_those_of_0_2(data, tier):
    for name, changed in OLD["adapted"][data][tier].items():
        old, new = OLD["defaults"] | changed, json.loads(json.dumps(asdict(adapt(recipe(name), data, tier))))
        assert new["attacks"] == ({} if old["attack"] is None else {"attack": [[old["attack"], old["attack_options"]]]}), name
        assert new["augment"] == ["crop_flip"] and old["augment"] is True
        same = set(old) - {"attack", "attack_options", "augment"}
        assert {k: new[k] for k in same} == {k: old[k] for k in same}, name
        added = {"data": data, "model": OLD["models"][tier], "model_options": {}, "iterations": None, "knots": [], "essential": [],
                 "needs": {}, "labelled": 1.0, "unlabelled": 0.0, "probes": {}}
        assert {k: new[k] for k in set(new) - same - {"attacks", "augment"}} == added, name
        assert adapt(recipe(name), data, tier) == Recipe.from_dict(old, data=data, model=OLD["models"][tier])


def test_tiers_are_those_of_0_2():
    assert {name: [tier.images, tier.held_out] for name, tier in TIER.items()} == OLD["images"]
    assert set(OLD["recipes"]) == set(RECIPES)


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.parent.relative_to(ROOT / "nbs" / "results").as_posix())
def test_committed_runs_are_runs_of_todays_recipes(path):
    facts = json.loads(path.read_text(encoding="utf-8"))
    about = facts["about"]
    written = Recipe.from_dict(facts["recipe"], model=about["model"], data=about["data"])
    plan = replace(adapt(recipe(about["name"]), about["data"], about["tier"]), seed=about["seed"], **about.get("changes", {}))
    assert written == plan


def test_there_are_runs():
    assert len(RUNS) >= 26


# JAT

@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name):
    assert Recipe.from_dict(json.loads(json.dumps(asdict(RECIPES[name])))) == RECIPES[name] == recipe(name)


def test_recipes_are_those_of_the_paper():
    a = RECIPES["jat/one-step-joint"]
    assert a.objective == "jat" and options(a)["step_pixel"] == 8 / 255 and options(a)["step_flow"] == 0.3
    assert (a.epochs, a.milestones, a.lr, a.momentum, a.weight_decay, a.batch_size) == (300, (100, 150), 0.1, 0.9, 2e-4, 128)
    assert (a.data, a.model) == ("cifar10", "wrn_28_10_cifar")
    madry = RECIPES["jat/madry"]
    assert (madry.epochs, madry.milestones, options(madry)["steps"]) == (100, (60, 90), 7)
    assert options(RECIPES["jat/multi-step-joint"])["step_flow"] == 0.1
    assert RECIPES["jat/one-step-pixel"].objective_options == {"target": "most_confusing"}
    assert options(RECIPES["jat/cascade-independent"])["independent"] is True
    assert [RECIPES[f"jat/joint-{k}-labels"].objective_options["labels"] for k in ("hard", "uniform")] == ["hard", "uniform"]
    assert options(RECIPES["jat/joint-ps"])["order"] == "pixel-spatial"
    small = options(RECIPES["jat/budget-2-0.1"])
    assert (small["eps_pixel"], small["step_pixel"], small["eps_flow"], small["step_flow"]) == (2 / 255, 2 / 255, 0.1, 0.1)


@pytest.mark.parametrize("table", [1, 2, 3, 6, 7])
def test_rows_are_the_rows_of_the_published_table(table):
    text = (files("jat_nb") / "published" / f"jat_table{table}.csv").read_text(encoding="utf-8")
    printed = {row["model_or_method"] for row in csv.DictReader(text.splitlines())}
    assert {row.label for row in ROWS if row.table == table} == printed


def test_the_budget_grid_is_the_published_one():
    text = (files("jat_nb") / "published" / "jat_table4.csv").read_text(encoding="utf-8")
    printed = {row["setting"].split(";test")[0].replace("train ", "") for row in csv.DictReader(text.splitlines())}
    assert {row.label for row in ROWS if row.table == 4} == printed and len(printed) == 12
    for row in (row for row in ROWS if row.table == 4):
        o = options(RECIPES[row.recipe])
        assert row.label == f"eps_x={round(255 * o['eps_pixel'])}/255;eps_w={o['eps_flow']}px"


@pytest.mark.parametrize("tier", TIER)
@pytest.mark.parametrize("data", ["cifar10", "digits", "svhn", "mnist"])
def test_a_tier_never_changes_the_method(tier, data):
    budget = default_budget(data)
    for published in RECIPES.values():
        r, before = adapt(published, data, tier), options(published)
        assert (r.objective, r.objective_options) == (published.objective, published.objective_options)
        assert {k: [name for name, _ in v] for k, v in r.attacks.items()} == {k: [n for n, _ in v] for k, v in published.attacks.items()}
        assert set(options(r)) == set(before)
        for k in ("steps", "order"):
            assert options(r).get(k) == before.get(k)
        if "eps_pixel" in before:
            assert abs(options(r)["eps_pixel"] - before["eps_pixel"] / (8 / 255) * budget.eps_pixel) < 1e-12
        assert r.probe_options["eps_flow"] == budget.eps_flow
        assert adapt(adapt(published, data), data) == adapt(published, data)  # at home nothing is left to do
    if tier == "paper" and data == "cifar10":
        assert replace(r, probe_options=published.probe_options) == published


@pytest.mark.parametrize("name", [n for n in RECIPES if "budget" not in n])
def test_every_recipe_trains_at_the_smoke_tier(name):
    s = setting(name, data="digits", tier="smoke", epochs=1)
    row = fit(s.model, s.train.subset(64), replace(s.recipe, probe_images=8), validation=s.validation.subset(8))[0]
    assert row["loss"] > 0 and 0 <= row["val_robust"] <= 1


def test_seeds_change_the_weights_and_not_the_images():
    a, b = setting("jat/natural", data="digits", seed=0), setting("jat/natural", data="digits", seed=1)
    assert (a.train.images == b.train.images).all() and (a.validation.labels == b.validation.labels).all()
    assert any((p != q).any() for p, q in zip(a.model.parameters(), b.model.parameters()))
    with pytest.raises(ValueError, match="unknown tier"): setting("jat/natural", data="digits", tier="huge")
    with pytest.raises(TypeError): setting("jat/natural", data="digits", epoch=3)


# Any paper

MADRY = {"attack": [["pgd", {"eps": 0.3, "step": 0.01, "steps": 40}]]}
CURVED = Recipe(objective="adversarial", attacks=MADRY, data="mnist", model="small_cnn_mnist", epochs=40, milestones=(10, 30),
                probe="pgd", probe_options={"steps": 20})


def test_budgets_scale_relative_to_the_home_data():
    at_home = adapt(CURVED, "mnist", "paper")
    assert options(at_home) == MADRY["attack"][0][1] and at_home.data == "mnist"
    assert at_home == adapt(CURVED)  # home is where a recipe runs if nobody says otherwise
    away = options(adapt(CURVED, "cifar10"))
    assert abs(away["eps"] - 8 / 255) < 1e-12 and abs(away["step"] - 8 / 255 / 30) < 1e-12 and away["steps"] == 40
    assert at_home.probe_options == {"steps": 20, "eps": 0.3, "step": 0.075}
    assert adapt(CURVED, "svhn").lr == 0.01 and adapt(replace(CURVED, data="svhn"), "svhn").lr == 0.1


def test_every_attack_of_a_recipe_is_scaled():
    chain = {"attack": [["ggsm", {"eps": 0.3, "norm": "linf"}], ["pgd", {"eps": 8 / 255}]]}
    r = adapt(Recipe(objective="adversarial", attacks=chain, epochs=3), "digits")
    budget, [[_, flow], [_, pixel]] = default_budget("digits"), r.attacks["attack"]
    assert abs(flow["eps"] - budget.eps_flow) < 1e-12 and flow["norm"] == "linf"
    assert abs(pixel["eps"] - budget.eps_pixel) < 1e-12


@pytest.mark.parametrize("tier, epochs", [("smoke", 2), ("cpu", 8), ("gpu", 30), ("paper", 40)])
def test_a_tier_caps_the_length(tier, epochs):
    r = adapt(CURVED, "mnist", tier)
    assert r.epochs == epochs and (r.schedule, r.milestones) == (("onecycle", ()) if tier != "paper" else ("multistep", (10, 30)))
    assert adapt(replace(CURVED, epochs=1, milestones=()), "mnist", tier).epochs == 1  # never made longer
    kept = adapt(replace(CURVED, essential=("schedule",)), "mnist", tier)
    assert (kept.schedule, kept.milestones) == ("multistep", (epochs / 4, 3 * epochs / 4)) and kept.epochs == epochs
    curve = replace(CURVED, schedule="piecewise", knots=((0, 0), (16, 1), (40, 0)), essential=("schedule", "batch_size"))
    assert adapt(curve, "mnist", tier).knots == ((0, 0), (0.4 * epochs, 1), (epochs, 0))
    assert adapt(curve, "mnist", tier).batch_size == 128
    fixed = adapt(replace(CURVED, essential=("epochs", "model", "weight_decay")), "mnist", tier)
    assert (fixed.epochs, fixed.weight_decay, fixed.model) == (40, 2e-4, "small_cnn_mnist")


@pytest.mark.parametrize("tier, iterations", [("smoke", 2), ("cpu", 8 * 118), ("gpu", 30 * 391), ("paper", 80_000)])
def test_a_tier_caps_iterations_by_its_images(tier, iterations):
    r = Recipe(iterations=80_000, milestones=(40_000, 60_000), essential=("schedule", "batch_size"))
    short = adapt(r, "cifar10", tier)
    assert (short.iterations, short.epochs) == (iterations, None) and short.milestones == (iterations / 2, 3 * iterations / 4)


def test_a_tier_replaces_the_published_network():
    assert [adapt(Recipe(epochs=1), tier=tier).model for tier in TIER] == list(OLD["models"].values())
    assert adapt(Recipe(epochs=1, model="resnet18"), tier="cpu").model == "resnet18"
    s = setting("jat/natural", data="digits", model="small_cnn_mnist", model_options={"drop_rate": 0.1})
    assert s.recipe.model == s.model.metadata["name"] == "small_cnn_mnist" and s.model.metadata["options"] == {"drop_rate": 0.1}


def test_a_paper_of_ones_own(monkeypatch):
    monkeypatch.setattr(catalogue, "_REGISTERED", {})
    tiny = Paper("tiny", "A made-up paper", {"tiny/natural": Recipe(epochs=4, data="digits", model="wrn_10_1_cifar")},
                 (Row(1, "Natural", "tiny/natural", "digits"),))
    built_in, before = list(papers()), set(recipes())
    assert register(tiny) is tiny and list(papers()) == [*built_in, "tiny"] and papers()["jat"] is PAPER
    assert recipe("tiny/natural").epochs == 4 and set(recipes()) == before | {"tiny/natural"}
    s = setting("tiny/natural")
    assert (s.recipe.data, s.recipe.epochs, s.train.name) == ("digits", 2, "digits")
    with pytest.raises(ValueError, match="already a paper 'tiny'"): register(tiny)
    with pytest.raises(ValueError, match="already a paper 'jat'"): register(replace(tiny, key="jat", recipes={}, rows=()))
    with pytest.raises(ValueError, match="'tiny/...', got 'natural'"): replace(tiny, recipes={"natural": Recipe(epochs=1)})
    with pytest.raises(ValueError, match="does not have: tiny/madry"): replace(tiny, rows=(Row(1, "Madry", "tiny/madry"),))
    with pytest.raises(ValueError, match="does not have: tiny/b"): replace(tiny, rows=(Row(1, "a", "tiny/natural", source="tiny/b"),))
    with pytest.raises(ValueError, match="unknown recipe 'tiny/x': choose one of .*jat/natural, .*tiny/natural"): recipe("tiny/x")
