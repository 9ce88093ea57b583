"The Pareto paper's room: recipes that train, suites that run, rows that cover its tables, tiers that keep budgets."
import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from jat_nb.catalogue import TIER, adapt, papers, recipe, setting
from jat_nb.data import default_budget, load
from jat_nb.models import create
from jat_nb.papers.pareto import COLUMNS, NUMBERS, OWN_SUITES, RECIPES, ROWS, family_columns, paper_attack
from jat_nb.papers.pareto_claims import PAPER
from jat_nb.recipes import Recipe, bind
from jat_nb.results import published
from jat_nb.suites import Job, attack_from, check_answer, run_suite
from jat_nb.tables import paper_table, printed_numbers
from jat_nb.training import fit

GRID = ("flow", "rt", "integrated")
KINDS = ("natural", "pgd", "flow", "rt", "spatial", "max", "average", "pareto-2.2", "relative--0.6", "pgd-5")


def links(r):
    "Every attack of a recipe with its options."
    return [(name, options) for chain in r.attacks.values() for name, options in chain]


# Recipes

@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_binds_and_survives_json(name):
    for tier in ("paper", "cpu"):
        r = adapt(recipe(name), tier=tier)
        assert set(bind(r).attacks) == set(r.attacks)
        assert Recipe.from_dict(json.loads(json.dumps(asdict(r)))) == r
    assert RECIPES[name].data == name.split("/")[1].split("-")[0]


@pytest.mark.parametrize("name", [f"pareto/mnist-{kind}" for kind in KINDS] + [
    "pareto/cifar10-strong-pareto-3.5", "pareto/cifar10-max-pgd-24"])
def test_recipes_train_two_batches_at_the_smoke_tier(name):
    s = setting(name, data="digits", images=16, batch_size=8, epochs=1, amp=False, probe_images=4)
    row = fit(s.model, s.train, s.recipe, validation=s.validation.subset(4))[0]
    assert row["iterations"] == 2 and row["loss"] > 0 and 0 <= row["val_robust"] <= 1
    assert ("objective" in row) == ("pareto-" in name or "relative" in name)


def test_training_is_as_printed():
    mnist, cifar = RECIPES["pareto/mnist-average"], RECIPES["pareto/cifar10-average"]
    caltech = RECIPES["pareto/caltech256-average"]
    assert (mnist.model, mnist.epochs, mnist.lr, mnist.batch_size, mnist.milestones, mnist.augment) == (
        "small_cnn_mnist", 100, 0.01, 128, (55, 75, 90), ())
    assert (cifar.model, cifar.model_options, cifar.epochs, cifar.lr, cifar.milestones, cifar.weight_decay) == (
        "preact_resnet18_cifar", {"norm": "group"}, 76, 0.1, (75,), 2e-4)
    assert (caltech.model, caltech.epochs, caltech.lr, caltech.batch_size, caltech.schedule) == ("resnet18", 10, 0.01, 32, "constant")
    steps = {r.data: {role: chain[0][1]["steps"] for role, chain in r.attacks.items()} for r in (mnist, cifar, caltech)}
    assert steps == {"mnist": dict(pgd=30, flow=20, rt=20), "cifar10": dict(pgd=3, flow=5, rt=5),
                     "caltech256": dict(pgd=5, flow=10, rt=10)}
    for r in RECIPES.values():
        n = NUMBERS[r.data]
        assert (r.probe, r.probe_options) == ("pgd", {"eps": n.eps_pixel, "step": n.step_pixel, "steps": n.pgd_steps})


def test_a_network_of_the_paper_is_the_one_it_names():
    r = RECIPES["pareto/cifar10-natural"]
    assert sum(p.numel() for p in create(r.model, **r.model_options).parameters()) == 11_171_146


def test_sweeps_hold_what_the_paper_prints():
    demands = {data: {r.objective_options["r"] for name, r in RECIPES.items() if f"{data}-pareto-" in name} for data in NUMBERS}
    assert demands["mnist"] == {0.2, 0.5, 0.8, 1.0, 1.2, 1.5, 1.8, 2.0, 2.2}
    assert demands["cifar10"] == {0.5, 1.0, 1.25, 1.5, 2.25, 3.0, 3.5, 4.0} and demands["caltech256"] == demands["cifar10"] | {6.0}
    for r in (3.5, 3.7, 4.0, 4.2):
        strong = RECIPES[f"pareto/cifar10-strong-pareto-{r}"]
        assert strong.objective_options == {"r": r}
        assert {k: strong.attacks["pgd"][0][1][k] for k in ("eps", "step", "steps")} == {"eps": 16 / 255, "step": 8 / 255, "steps": 3}
        assert strong.attacks["flow"] == RECIPES["pareto/cifar10-average"].attacks["flow"]
    positions = [r.objective_options for name, r in RECIPES.items() if "mnist-relative" in name]
    assert len(positions) >= 5 and all(o["mode"] == "relative" and -1 < o["r"] < 1 for o in positions)


def test_figure_6_changes_nothing_but_the_pixel_budget():
    for g in (4, 8, 12, 16, 24):
        both, alone = RECIPES[f"pareto/cifar10-max-pgd-{g}"], RECIPES[f"pareto/cifar10-pgd-{g}-255"]
        assert both.attacks["pgd"] == alone.attacks["attack"] and both.objective == "maximum"
        options = alone.attacks["attack"][0][1]
        assert math.isclose(options["eps"], g / 255) and math.isclose(options["step"], g / 255 / 4)
        assert {k: both.attacks[k] for k in ("flow", "rt")} == {k: RECIPES["pareto/cifar10-max"].attacks[k] for k in ("flow", "rt")}


# Tiers

def reach(options):
    "How far each length of an attack gets, by the name of its budget."
    pairs = {k: k.replace("eps", "step") for k in options if k.startswith("eps")}
    return {eps: min(options["steps"] * options[step], options[eps]) for eps, step in pairs.items()}


@pytest.mark.parametrize("tier", TIER)
def test_tiers_keep_budgets_and_reach(tier):
    for name, published_ in RECIPES.items():
        r = adapt(published_, tier=tier)
        assert (r.objective, r.objective_options) == (published_.objective, published_.objective_options)
        for (attack, now), (same, before) in zip(links(r), links(published_), strict=True):
            assert attack == same and set(now) == set(before)
            changed = {k for k in now if now[k] != before[k]}
            assert all(k.startswith("step") for k in changed)
            for eps, far in reach(before).items():
                assert now[eps] == before[eps] and reach(now)[eps] >= far * (1 - 1e-12)
            assert now["steps"] <= before["steps"]
            if "attacks" in r.essential: assert not changed
            elif tier in ("cpu", "smoke"): assert now["steps"] <= 7


def test_steps_at_the_cpu_tier():
    mnist = {role: chain[0][1] for role, chain in adapt(RECIPES["pareto/mnist-max"], tier="cpu").attacks.items()}
    assert {role: o["steps"] for role, o in mnist.items()} == {"pgd": 7, "flow": 5, "rt": 5}
    assert math.isclose(mnist["pgd"]["step"], 0.3 / 7) and math.isclose(mnist["flow"]["step"], 2.8 / 5) and mnist["rt"]["step"] == 0.1
    assert adapt(RECIPES["pareto/cifar10-max"], tier="cpu").attacks == RECIPES["pareto/cifar10-max"].attacks
    r = adapt(RECIPES["pareto/cifar10-natural"], tier="cpu")
    assert (r.model, r.model_options) == ("wrn_10_1_cifar", {"norm": "group"})
    assert adapt(RECIPES["pareto/cifar10-natural"], tier="gpu").model == "preact_resnet18_cifar"


def test_strength_is_not_cut():
    for n in (5, 10, 20, 40):
        assert adapt(RECIPES[f"pareto/mnist-pgd-{n}"], tier="cpu").attacks["attack"][0][1]["steps"] == n


def test_a_run_elsewhere_scales_flows_and_pixels_and_no_map():
    small = adapt(RECIPES["pareto/caltech256-spatial"], "tiny-imagenet-10").attacks["attack"][0][1]
    assert math.isclose(small["eps_flow"], 0.3 * 64 / 2) and math.isclose(small["step_flow"], 1e-5 * 64 / 2)
    assert (small["eps_affine"], small["step_affine"]) == (1.0, 0.1)


# Attacks

@pytest.mark.parametrize("data", NUMBERS)
def test_lengths_are_half_sides(data):
    n, side = NUMBERS[data], {"mnist": 28, "cifar10": 32, "caltech256": 224}[data]
    flow, both = (paper_attack(family, data, 5)[1] for family in ("flow", "integrated"))
    assert math.isclose(flow["eps"], 0.15 * side) and math.isclose(flow["step"], n.step_flow * side / 2)
    assert (flow["eps"], flow["step"]) == (both["eps_flow"], both["step_flow"])
    assert all(paper_attack(f, data, 5)[1]["random_start"] is False for f in GRID)
    assert "random_start" not in paper_attack("pgd", data, 5)[1]  # PGD starts at random


def test_integrated_without_one_part_is_the_other():
    model, test = create("wrn_10_1_cifar", in_chans=1).eval(), load("digits", "test").subset(4)
    def images(family, **other):
        return attack_from(paper_attack(family, "mnist", 2, **other), {})(model, test.x, test.labels)
    assert torch.allclose(images("integrated", eps_affine=0.0), images("flow"), atol=1e-5)
    assert torch.allclose(images("integrated", eps_flow=0.0), images("rt"), atol=1e-5)


# Rows and columns

def test_rows_cover_both_tables():
    known = printed_numbers(PAPER)
    for number, cells in ((1, 72), (2, 34)):
        frame = published("pareto", number)
        assert len(frame) == cells
        table = paper_table("pareto", number, []).dropna(subset=["paper"])
        assert sorted(table["row"].unique()) == sorted(row.label for row in ROWS if row.table == number)
        assert len(table[~table["column"].str.contains("as printed")]) == cells
    assert {key[0] for key in known} == {row.recipe for row in ROWS} and len(ROWS) == 24
    assert len({(row.table, row.label) for row in ROWS}) == 24


def test_headline_numbers_are_found_by_recipe():
    found = {value for (name, *_), value in printed_numbers(PAPER).items() if name == "pareto/mnist-pareto-2.2"}
    assert {88.06, 58.70, 90.40, 176.71} <= found


def test_columns_have_the_suite_of_their_home():
    for data in NUMBERS:
        name = f"pareto/{data}-natural"
        for column in OWN_SUITES[f"pareto-{data}"].columns:
            assert PAPER.suite_of(column, name) == f"pareto-{data}" and column in COLUMNS
    counts = {f: [int(c[len(f):]) for c in OWN_SUITES["pareto-mnist"].columns if c.startswith(f)] for f in ("PGD", "Flow", "RT")}
    assert counts == {"PGD": [10, 20, 30, 40], "Flow": [5, 10, 15, 20], "RT": [5, 10, 15, 20]}


# Suites

@pytest.mark.parametrize("name", OWN_SUITES)
def test_every_suite_runs_on_an_untrained_network(name):
    torch.manual_seed(0)
    test, suite = load("digits", "test").subset(2), OWN_SUITES[name]
    model = create("wrn_10_1_cifar", in_chans=1).eval()
    job = Job(model, test.x, model(test.x).argmax(1), default_budget("digits"), data="digits")  # right before the attack
    short = {c: (a, o | {"steps": min(o.get("steps", 1), 5)} if "steps" in o else o) for c, (a, o) in suite.columns.items()}
    few = replace(suite, columns={c: short[c] for c in [*short][:2] + [*short][-2:]})
    if "displacement" in suite.also:
        few = replace(few, also={"displacement": replace(suite.also["displacement"], columns=dict([*short.items()][-2:]))})
    answer = run_suite(few, job)
    check_answer(few, answer)
    assert json.loads(json.dumps(answer)) == answer and answer["correct"]["Clean"] == "11"
    for lengths in answer.get("displacement", {}).values():
        assert len(lengths) == 2 and max(lengths) > 0


def test_a_suite_fits_the_data_it_is_put_to():
    test = load("digits", "test").subset(2)
    home, here = default_budget("mnist"), default_budget("digits")
    job = Job(create("wrn_10_1_cifar", in_chans=1).eval(), test.x, test.labels, here)
    columns = {"Flow5": family_columns("flow", "mnist")["Flow5"]}
    far = OWN_SUITES["pareto-mnist"].also["displacement"]
    found = run_suite(replace(far, columns=columns), job)["Flow5"]
    at_home = run_suite(replace(far, columns=columns), replace(job, budget=home))["Flow5"]
    assert math.isclose(max(at_home), 5 * 0.14 * math.sqrt(2), rel_tol=1e-4)
    assert math.isclose(max(found), 5 * 0.14 * math.sqrt(2) * here.eps_flow / home.eps_flow, rel_tol=1e-4)


def test_a_damaged_displacement_is_refused():
    suite = OWN_SUITES["pareto-mnist"].also["displacement"]
    check_answer(suite, {"Flow5": [0.0, 1.5]})
    with pytest.raises(ValueError, match="at least 0"): check_answer(suite, {"Flow5": [-1.0]})
    with pytest.raises(ValueError): check_answer(suite, {"Flow5": ["far"]})


def test_the_paper_is_found():
    assert papers()["pareto"] is PAPER and PAPER.home == "mnist"
