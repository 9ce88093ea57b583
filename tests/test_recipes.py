"Published recipes, the rows they fill, and what a tier may change."
import csv
import json
from dataclasses import asdict, replace
from importlib.resources import files

import pytest

from jat_nb.attacks import ATTACKS
from jat_nb.data import default_budget
from jat_nb.objectives import OBJECTIVES
from jat_nb.recipes import RECIPES, ROWS, TIER, adapt, setting
from jat_nb.training import Recipe, fit


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json_and_name_what_exists(name):
    r = RECIPES[name]
    assert Recipe(**json.loads(json.dumps(asdict(r)))) == r
    assert r.objective in OBJECTIVES and (r.attack is None or r.attack in ATTACKS)


def test_recipes_are_those_of_the_paper():
    a = RECIPES["jat/one-step-joint"]
    assert a == Recipe() and a.attack_options["step_pixel"] == 8 / 255 and a.attack_options["step_flow"] == 0.3
    assert (a.epochs, a.milestones, a.lr, a.momentum, a.weight_decay, a.batch_size) == (300, (100, 150), 0.1, 0.9, 2e-4, 128)
    madry = RECIPES["jat/madry"]
    assert (madry.epochs, madry.milestones, madry.attack_options["steps"]) == (100, (60, 90), 7)
    assert RECIPES["jat/multi-step-joint"].attack_options["step_flow"] == 0.1
    assert RECIPES["jat/one-step-pixel"].objective_options == {"target": "most_confusing"}
    assert RECIPES["jat/cascade-independent"].attack_options["independent"] is True
    assert [RECIPES[f"jat/joint-{k}-labels"].objective_options["labels"] for k in ("hard", "uniform")] == ["hard", "uniform"]
    assert RECIPES["jat/joint-ps"].attack_options["order"] == "pixel-spatial"
    small = RECIPES["jat/budget-2-0.1"].attack_options
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
        o = RECIPES[row.recipe].attack_options
        assert row.label == f"eps_x={round(255 * o['eps_pixel'])}/255;eps_w={o['eps_flow']}px"


@pytest.mark.parametrize("tier", TIER)
@pytest.mark.parametrize("data", ["cifar10", "digits", "svhn", "mnist"])
def test_a_tier_never_changes_the_method(tier, data):
    budget = default_budget(data)
    for name, published in RECIPES.items():
        r = adapt(published, data, tier)
        assert (r.objective, r.objective_options, r.attack) == (published.objective, published.objective_options, published.attack)
        assert set(r.attack_options) == set(published.attack_options)
        for k in ("steps", "order"):
            assert r.attack_options.get(k) == published.attack_options.get(k)
        if "eps_pixel" in r.attack_options:
            share = published.attack_options["eps_pixel"] / (8 / 255)
            assert abs(r.attack_options["eps_pixel"] - share * budget.eps_pixel) < 1e-12
        assert r.probe_options["eps_flow"] == budget.eps_flow
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
