"The SRT paper's claims: a theorem that notices a wrong answer, surfaces as numbers, comparisons on invented evidence, the list."
import copy
import json
from dataclasses import replace
from pkgutil import resolve_name

import pytest
import torch
from torch import nn

from jat_nb.batches import Batch, shares
from jat_nb.catalogue import papers
from jat_nb.claims import Check, Evidence
from jat_nb.data import default_budget
from jat_nb.differences import Share
from jat_nb.minimum_norm import THRESHOLDS, at_threshold
from jat_nb.papers import srt_claims as room, srt_studies as studies
from jat_nb.papers.srt import LAMBDAS, RECIPES, SYNONYMS
from jat_nb.papers.srt_claims import CLAIMS, PAPER
from jat_nb.papers.srt_studies import SURFACE, distances
from jat_nb.recipes import bind
from jat_nb.records import Record
from jat_nb.results import Run, published
from jat_nb.differences import bits
from jat_nb.suites import Job, Suite, check_answer, run_suite

NOTHING = Evidence((), "cpu", PAPER)
WORDS = {"what": "made up"}


def run(name, data="mnist", seed=0, log=(), **answers):
    about = {"name": f"srt/{data}-{name}", "data": data, "tier": "cpu", "seed": seed}
    records = {s.replace("_", "-"): Record("jat_eval", {"suite": s}, data=data, metrics=a) for s, a in answers.items()}
    return Run(f"{name}-s{seed}", about, {}, {}, list(log), records)


def evidence(*runs):
    return Evidence(tuple(runs), "cpu", PAPER)


class Invented:
    "Shares of 100 images by recipe, the first so many right."

    def __init__(self, **right):
        self.right = right

    def share(self, where, data=""):
        if where[0] not in self.right:
            return None
        bits = (torch.arange(100) < self.right[where[0]]).double()[None]
        return Share((float(bits.mean()),), 100, bits, (where[0],))


def one(kind, right, *names):
    [found] = kind(Invented(**right), Check("", tuple((name, "PGD") for name in names), options=WORDS))
    return found


# The theorem

def test_the_theorem_holds_on_tables_and_on_a_network():
    found = list(studies._exact(NOTHING, CLAIMS[0].checks[0]))
    assert [f.holds for f in found] == [True, True]


def test_the_first_movement_is_none():
    class Brightness(nn.Module):
        def forward(self, x):
            return torch.stack([x.flatten(1).mean(1), 0.2 - x.flatten(1).mean(1)], 1)
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    answers = studies._of_movements(Brightness(), x)
    assert answers.shape == (4, 63) and torch.equal(answers[:, 0], Brightness()(x).argmax(1))


# Surfaces

class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

    def forward(self, x):
        return self.body(x)


@pytest.fixture(scope="module")
def answer():
    x, y = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(5) % 3
    suite = Suite(kind="jat_nb.papers.srt_studies:SURFACE", options={"n": 4, "points": 5, "shown": 2})
    return suite, SURFACE.ask(suite, Job(Linear().eval(), x, y, default_budget("digits")))


def test_surfaces_as_numbers(answer):
    suite, found = answer
    SURFACE.check(suite, found)
    assert found["n"] == 4 and len(found["shown"]["pixel"]["loss"]) == 2
    for name in ("pixel", "spatial"):
        assert set(found[name]) == {"share", "slope", "peak"} and all(len(v) == 4 for v in found[name].values())
        for i, surface in enumerate(found["shown"][name]["loss"]):
            assert abs(max(map(max, surface)) - found[name]["peak"][i]) <= 0.005
        for i, surface in enumerate(found["shown"][name]["decision"]):
            points = torch.tensor(surface)
            slope = (points.diff(dim=0).abs().mean() + points.diff(dim=1).abs().mean()) / 2
            assert abs(slope - found[name]["slope"][i]) <= 0.01


@pytest.mark.parametrize("damage", [
    lambda a: a["pixel"]["share"].append(0.5), lambda a: a["spatial"]["peak"].__setitem__(0, float("nan")),
    lambda a: a["shown"]["pixel"]["decision"][0].pop(), lambda a: a["pixel"]["share"].__setitem__(0, a["pixel"]["share"][0] / 2 + 0.5)])
def test_surfaces_know_their_damage(answer, damage):
    suite, found = answer
    broken = copy.deepcopy(found)
    damage(broken)
    with pytest.raises(ValueError):
        SURFACE.check(suite, broken)


def test_an_undecided_network_has_a_valid_record():
    class Undecided(nn.Module):
        def forward(self, x):
            return torch.tensor([0.002, 0.0, 0.0]).repeat(len(x), 1) + 0 * x.flatten(1)[:, :1]
    suite = Suite(kind="jat_nb.papers.srt_studies:SURFACE", options={"points": 3})
    job = Job(Undecided().eval(), torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.long), default_budget("digits"))
    SURFACE.check(suite, SURFACE.ask(suite, job))


# Distances

@pytest.fixture(scope="module")
def nearest():
    "The norms of a small network, kept image by image and judged at the thresholds of the table."
    x, model = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(2)), Linear().eval()
    model.body[1].bias.data = torch.tensor([1.5, 0.0, 0.0])
    job = Job(model, x, torch.tensor([0, 0, 0, 0, 0, 1]), default_budget("mnist"))
    return PAPER.suites["srt-distances-mnist"], run_suite("srt-distances-mnist", job), run_suite("srt-norms-mnist", job)


def test_distances_give_the_verdicts_of_every_threshold(nearest):
    suite, kept, judged = nearest
    check_answer("srt-distances-mnist", json.loads(json.dumps(kept)))
    limits = {"DDNA": THRESHOLDS["mnist"]["l2"][1], "JSMA": 0.1, "Point-wise": THRESHOLDS["mnist"]["pixels"][0]}
    assert list(limits) == list(suite.columns) and kept["n"] == 6
    for name, limit in limits.items():
        norms = distances(kept, name)
        assert bits(norms > limit) == judged["correct"][name], name
        curve = at_threshold(norms, torch.linspace(0, 64, 50).tolist())
        assert (curve.diff() <= 0).all() and 100 * curve[0] == pytest.approx(judged["rows"]["Clean"]["accuracy (%)"])
    assert {len(set(judged["correct"][name])) for name in limits} == {2}, "each threshold has images on both sides"


def test_what_was_not_found_is_infinitely_far():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.tensor([1.0, 0.0, 0.0]).repeat(len(x), 1) + 0 * x.flatten(1)[:, :1]
    job = Job(Constant().eval(), torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), default_budget("mnist"))
    kept = run_suite(replace(PAPER.suites["srt-distances-mnist"], columns={"DDNA": ("ddn", {"steps": 3})}), job)
    assert kept["DDNA"] == [None, 0.0] and distances(kept, "DDNA").tolist() == [torch.inf, 0.0]


@pytest.mark.parametrize("damage", [lambda a: a["DDNA"].pop(), lambda a: a["JSMA"].__setitem__(0, -1.0),
                                    lambda a: a["Point-wise"].__setitem__(0, float("nan")), lambda a: a.pop("JSMA")])
def test_distances_know_their_damage(nearest, damage):
    broken = copy.deepcopy(nearest[1])
    damage(broken)
    with pytest.raises((ValueError, KeyError)):
        check_answer("srt-distances-mnist", broken)


# Comparisons

def test_a_lead_that_grows():
    right = dict(a=50, b=60, c=70, d=48, e=54, f=58)
    assert one(room._widening, right, *"abcdef").value == 1
    assert one(room._widening, right, *"cbafed").value == -1
    assert one(room._widening, {"a": 50, "d": 48}, *"abcdef").holds is None  # one pair is no line


def test_second():
    right = dict(a=50, b=60, c=70, d=40)
    assert round(one(room._second, right, *"abcd").value) == -10 and round(one(room._second, right, *"bacd").value) == 10
    assert one(room._second, right, "a", "b", "x").holds is None


def told(claim, given, n=40_000):
    "What a claim finds about accuracies invented for recipes, columns and suites."
    by_run = {}
    for (name, column, suite), value in given.items():
        by_run.setdefault(name, {}).setdefault(suite, {})[column] = {"accuracy (%)": value}
    runs = [run(name, **{s.replace("-", "_"): {"n": n, "rows": rows} for s, rows in suites.items()}) for name, suites in by_run.items()]
    return [f for f in evidence(*runs).findings(next(c for c in CLAIMS if c.id == claim)) if f.value == f.value]


def test_weights_are_compared_pair_by_pair():
    "Every two weights within a point of each other, to either side."
    def at(*values):
        given = {(f"spatial-srt-{w}", "Clean", "srt-mnist"): v for w, v in zip(LAMBDAS["spatial"], values)}
        return [f for f in told("SC5", given=given) if "standard" not in f.what]
    assert len(at(90.0, 90.1, 90.2, 90.0)) == 6 and all(f.holds for f in at(90.0, 90.1, 90.2, 90.0))
    up, down = at(90.0, 90.0, 90.0, 93.0), at(93.0, 90.0, 90.0, 90.0)
    assert [f.holds for f in up].count(False) == [f.holds for f in down].count(False) == 3


def test_momentum_is_compared_with_pgd_from_the_same_start():
    given = {("long-uat", "MI-FGSM", "srt-mnist"): 44.0, ("long-uat", "PGD, long", "srt-mnist"): 20.0}
    assert told("SC10", given=given) == []  # other starts decide nothing
    [same] = told("SC10", given=given | {("long-uat", "PGD, from the image", "srt-starts-mnist"): 43.5})
    assert same.holds and round(same.value, 1) == 0.5
    [other] = told("SC10", given=given | {("long-uat", "PGD, from the image", "srt-starts-mnist"): 40.0})
    assert other.holds is False
    name, options = PAPER.suites["srt-starts-cifar10"].columns["PGD, from the image"]
    assert (name, options.pop("random_start")) == ("pgd", False) and options == PAPER.suites["srt-cifar10"].columns["PGD, long"][1]


def test_every_column_of_table_4_counts_where_it_was_measured():
    "SC9: five columns are asked of everybody, those without a budget where all five networks have them."
    columns = {check.at[0][1] for check in CLAIMS[8].checks}
    assert {SYNONYMS.get(f"4:{metric}", metric) for metric in published("srt", 4)["metric"]} == columns and len(columns) == 8
    assert not [f for f in NOTHING.findings(CLAIMS[8]) if "DDNA" in f.what]
    names = ("srt", "at-equal", "trades-equal", "uat", "rst")
    given = {(f"long-{name}", "DDNA", "srt-norms-mnist"): v for name, v in zip(names, (60.0, 50.0, 70.0, 40.0, 30.0))}
    [second] = told("SC9", given)
    assert second.holds and "DDNA" in second.what
    third = given | {("long-uat", "DDNA", "srt-norms-mnist"): 80.0}
    assert [f.holds for f in told("SC9", third)] == [False]
    del given["long-rst", "DDNA", "srt-norms-mnist"]
    assert told("SC9", given) == []


def test_numbers_of_images_are_compared_at_equal_updates():
    lines = [check.at for check in CLAIMS[13].checks if not check.options.get("if_measured")]
    own = [check.at for check in CLAIMS[13].checks if check.options.get("if_measured")]
    for at in lines:
        followed = {PAPER.updates.get(f"srt/{w[0]}", (f"srt/{w[0]}", 1.0))[0] for w in at}
        lengths = {RECIPES[name].epochs or RECIPES[name].iterations for name in followed}
        assert len(lengths) == 1 and (len(followed) == 1 or RECIPES[f"srt/{at[0][0]}"].iterations)
    assert len(lines) == 4 and len(own) == 2 and not any("equal" in w[0] for at in own for w in at)


@pytest.mark.parametrize("name", ["mnist-long-srt", "mnist-spatial-srt-0.2", "cifar10-long-fast-srt"])
def test_arithmetic_of_passes_is_what_a_network_counts(name):
    "Table 7: forward and backward passes of an update, counted, against the formula behind SC17."
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.seen = nn.Parameter(torch.ones(10, 4)), torch.zeros(3)

        def forward(self, x):
            self.seen[0] += len(x)
            logits = x.flatten(1)[:, :4] @ self.weight.T
            if logits.requires_grad:
                logits.register_hook(lambda g: self.seen.__setitem__(2 if self.training else 1, self.seen[2 if self.training else 1] + len(g)))
            return logits
    r = RECIPES[f"srt/{name}"]
    labelled, unlabelled = (shares(128, 10_000, 50_000) if "mnist" in name else shares(128, 10_000, 40_000))
    channels, net = (1 if "mnist" in name else 3), Counting()
    g = torch.Generator().manual_seed(0)
    x, u = (torch.rand(n, channels, 16, 16, generator=g) for n in (labelled, unlabelled))
    bound = bind(r)
    bound.objective(net, Batch(x, torch.zeros(labelled, dtype=torch.long), g, u=u), **bound.attacks).backward()
    forward, for_images, for_weights = net.seen.tolist()
    passes = (forward + for_images + 2 * for_weights) / 128  # a backward pass for weights and activations counts twice
    assert abs(passes * (r.epochs or r.iterations) / room._passes(r) - 1) < 0.005  # 25 of 128 images are not quite a fifth


def test_the_speed_says_what_is_arithmetic():
    claim = CLAIMS[16]
    assert "by the arithmetic of its passes" in claim.statement
    findings = [f.what for f in NOTHING.findings(claim) if "passes" in f.what]
    assert len(findings) == 2 and all("passes by arithmetic" in what for what in findings)


def test_grids_contain_their_parts():
    bits = {"Clean": "1111", "GridAdv": "0100", "GridAdv.T": "0110", "GridAdv.R": "0101"}
    rows = {k: {"accuracy (%)": 100 * v.count("1") / 4} for k, v in bits.items()}
    def found(**changed):
        e = evidence(run("long-srt", srt_mnist={"n": 4, "rows": rows, "correct": bits | changed}))
        return list(room._inclusions(e, Check("", (("srt/mnist-long-srt", "GridAdv"),), "mnist", at_most=0.0)))[0]
    assert found().holds and found(**{"GridAdv.T": "1010"}).holds is False


def test_speed_by_count_and_by_clock():
    check = Check("", (("mnist-long-srt",), ("mnist-long-fast-srt",)), "mnist", at_least=5.0)
    slow, fast = (run(name, log=[{"seconds": s}, {"seconds": s}]) for name, s in (("long-srt", 50.0), ("long-fast-srt", 5.0)))
    passes, seconds = room._faster(evidence(slow, fast), check)
    assert seconds.value == 10 and passes.holds
    r = RECIPES["srt/mnist-long-srt"]
    assert room._passes(r) == 120 * (1 + 2 * 40 + 3 * (1 + 1 / 6))
    assert room._passes(replace(r, epochs=60, milestones=())) == room._passes(r) / 2


# The list

def test_every_claim_has_its_number_and_its_checks():
    assert [claim.id for claim in CLAIMS] == [f"SC{k}" for k in range(1, 23)]
    assert all(claim.checks for claim in CLAIMS) and papers()["srt"] is PAPER


def test_comparisons_and_suites_from_other_modules_are_found():
    kinds = {check.kind for claim in CLAIMS for check in claim.checks if ":" in check.kind}
    assert len(kinds) == 5 and all(callable(resolve_name(kind)) for kind in kinds)
    assert all(resolve_name(PAPER.suites[f"srt-surface-{data}"].kind) is SURFACE for data in ("mnist", "cifar10"))


def test_every_place_names_a_recipe_and_a_column():
    for claim in CLAIMS:
        for check in claim.checks:
            for where in check.at:
                assert where[0] == "*" or f"srt/{where[0]}" in PAPER.recipes, (claim.id, where)
                if where[2:]:
                    columns = PAPER.suites[where[2]].columns
                    assert where[1] in columns or "surface" in where[2], (claim.id, where)
                elif where[1:]:
                    assert where[1] in PAPER.columns, (claim.id, where)


def test_srt_and_rt_meet_at_every_weight_reduction_and_length():
    pairs = {(check.at[0][0], check.at[1][0]) for check in CLAIMS[1].checks}
    assert len(pairs) == 2 * (2 * len(LAMBDAS["spatial"]) + 4 * len(LAMBDAS["pixel"]))
    for srt, rt in pairs:
        one, other = (RECIPES[f"srt/{name}"] for name in (srt, rt))
        assert one.objective_options["weight"] == other.objective_options["weight"] and one.attacks == other.attacks
        assert other.objective_options["reduction"] == "separate", "RT's other reduction is half of it, test_semi_supervised.py"
        assert one.unlabelled > 0 == other.unlabelled


def test_a_claim_can_fail_and_can_hold():
    def told(srt, rt):
        rows = {"n": 1000, "rows": {"GridAdv": {"accuracy (%)": srt}}}, {"n": 1000, "rows": {"GridAdv": {"accuracy (%)": rt}}}
        e = evidence(*(run(f"spatial-{kind}-0.2", "cifar10", srt_cifar10=a) for kind, a in zip(("srt", "rt"), rows)))
        return [f.holds for f in e.findings(CLAIMS[2])]
    assert told(60.0, 30.0) == [None, True, None, None] and told(40.0, 39.0) == [None, False, None, None]
