"The Pareto paper's claims: theorems that notice a wrong formula, comparisons on invented evidence, and the list itself."
import math
from dataclasses import replace
from pkgutil import resolve_name

import pytest
import torch

from jat_nb.catalogue import papers
from jat_nb.claims import Check, Evidence, compare, judge_claims
from jat_nb.differences import Share, mean_score
from jat_nb.papers import pareto_claims as room, pareto_scores as scores
from jat_nb.papers.pareto_claims import CLAIMS, PAPER
from jat_nb.records import Record
from jat_nb.results import Run

NOTHING = Evidence((), "cpu", PAPER)


def errors():
    return {f.what.split(",")[0]: f.holds for f in room._exact(NOTHING, CLAIMS[0].checks[0])}


def run(name, seed=0, log=(), **answers):
    about = {"name": f"pareto/{name}", "data": "mnist", "tier": "cpu", "seed": seed}
    records = {s.replace("_", "-"): Record("jat_eval", {"suite": s}, data="mnist", metrics=a) for s, a in answers.items()}
    return Run(f"{name}-s{seed}", about, {}, {}, list(log), records)


def evidence(*runs):
    return Evidence(tuple(runs), "cpu", PAPER)


class Scores:
    "Shares of 100 images, by recipe."

    def __init__(self, **percent):
        self.percent = percent

    def share(self, where, data=""):
        if where[0] not in self.percent:
            return None
        bits = (torch.arange(100) < self.percent[where[0]]).double()[None]
        return mean_score([Share((float(bits.mean()),), 100, bits, (where[0],))])


# Theorems

def test_theorems_hold():
    assert errors() == dict.fromkeys(errors(), True) and len(errors()) == 6


@pytest.mark.parametrize("broken, noticed", [
    ("disagreement", {"disagreement"}), ("soft_margin", {"Proposition 1"}), ("solve_weights", {"requirement", "balance"})])
def test_theorems_notice_a_wrong_formula(monkeypatch, broken, noticed):
    wrong = {"disagreement": lambda second: 6 * torch.diag(torch.diag(torch.from_numpy(second))).numpy() - 2 * second,
             "soft_margin": lambda logits, y: logits.logsumexp(1) - logits.gather(1, y[:, None])[:, 0],
             "solve_weights": lambda mean, second, r, solve=room.solve_weights: solve(mean, second, 0.9 * r)}
    monkeypatch.setattr(room, broken, wrong[broken])
    assert noticed <= {name for name, holds in errors().items() if not holds}


# Comparisons

def test_pairs_of_images():
    answer = {"grain": [0.4, 0.5, 0.7]}
    e = evidence(run("mnist-natural", pareto_saliency=answer), run("mnist-pgd", pareto_saliency={"grain": [0.3, 0.2, 0.6]}))
    claim = next(c for c in CLAIMS if c.id == "PC14")
    [found] = e.findings(claim)
    assert found.value == pytest.approx(10) and found.holds is not False
    assert math.isnan(evidence(run("mnist-natural", pareto_saliency=answer)).findings(claim)[0].value)


def test_only_fooled_images_count():
    fields = {"rt": [0.1, 0.1], "smooth": {tau: [0.05, 0.3] for tau in ("0", "0.01", "0.05", "0.2", "1")}}
    hits = {"0": "11", "0.01": "01", "0.05": "10", "0.2": "00", "1": "01"}
    e = evidence(run("mnist-natural", pareto_displacement={"frequency": fields, "fooled": hits}))
    found = e.findings(next(c for c in CLAIMS if c.id == "PC20"))
    assert [round(f.value, 6) for f in found if not math.isnan(f.value)] == [7.5, 20, -5, 20]
    assert math.isnan(found[3].value)


def test_middle_lead_distance_and_front():
    at = lambda *names: tuple((name, "Universal") for name in names)
    e = Scores(a=10, b=30, c=20, d=50)
    [found] = scores._interior(e, Check("", at("a", "b", "c"), options={"what": ""}))
    assert found.value == pytest.approx(10)
    [found] = scores._interior(e, Check("", at("a", "c", "b"), options={"what": ""}))
    assert found.value == pytest.approx(-10)
    [found] = scores._leads(e, Check("", at("d", "a", "b", "c"), options={"what": ""}))
    assert found.value == pytest.approx(30)
    learnt = Scores(a=20, b=40, c=30, d=60)
    [found] = scores._approaches(learnt, Check("", at("a", "d", "b", "c", "c", "c"), options={"what": ""}))
    assert found.value == -1
    [found] = scores._approaches(e, Check("", at("a", "d", "b", "c", "c", "c"), options={"what": ""}))  # a: 10 %, a guess
    assert math.isnan(found.value) and "too few pairs" in found.what
    [found] = scores._approaches(e, Check("", at("a", "absent"), options={"what": ""}))
    assert math.isnan(found.value)


def test_logs():
    def log(natural, clipped, mu=(0.1, 0.5, 1.0, 2.0), alpha=(0.4, 0.3, 0.2, 0.1), solver="CLARABEL"):
        step = {"mean": list(mu), "alpha": list(alpha), "r": 0.55, "solver": solver}
        said = {"steps": 10, "mean": {"alpha": [natural, 1 - natural, 0, 0], "clipped": clipped}, "trace": [step]}
        return [{"loss": 1.0, "seconds": 8.0, "objective": said}]
    runs = [run(f"mnist-relative-{s}", log=log(w, 0.0)) for s, w in ((-0.6, 0.9), (0.0, 0.5), (0.6, 0.1))]
    weight, bounds = (list(compare(evidence(*runs), check)) for check in next(c for c in CLAIMS if c.id == "PC16").checks)
    assert weight[0].value == -1 and weight[0].holds
    assert [f.holds for f in bounds] == [True] * 3  # 0.4 in [0, 0.725]
    outside = run("mnist-relative-0.9", log=log(0.1, 0.0, alpha=(0.8, 0.1, 0.1, 0.0)))
    assert [f.holds for f in compare(evidence(outside), next(c for c in CLAIMS if c.id == "PC16").checks[1])] == [False]
    first = run("mnist-relative-0.9", log=log(0.1, 0.0, alpha=(0.8, 0.1, 0.1, 0.0), solver="warm-up"))
    assert not list(compare(evidence(first), next(c for c in CLAIMS if c.id == "PC16").checks[1]))
    swept = [run(f"mnist-pareto-{r}", log=log(0.5, share)) for r, share in ((0.2, 0.0), (0.8, 0.4), (2.2, 0.9))]
    [found] = evidence(*swept).findings(next(c for c in CLAIMS if c.id == "PC17"))
    assert found.value == 1 and found.holds and "0, 40, 90" in found.what
    [found] = evidence(*swept[:2]).findings(next(c for c in CLAIMS if c.id == "PC17"))
    assert math.isnan(found.value)


def test_cost_as_published_and_as_recorded():
    row = {"loss": 1.0, "objective": {"steps": 1, "mean": {"alpha": [1, 0, 0, 0]}}}
    slow = run("mnist-relative-0.6", log=[{**row, "seconds": s} for s in (30.0, 12.0)])
    fast = run("mnist-average", log=[{"loss": 1.0, "seconds": 10.0}])
    passes, seconds = evidence(slow, fast).findings(CLAIMS[-1])
    assert passes.value == pytest.approx((2 * 70 + 12) / (2 * 70 + 9)) and seconds.value == pytest.approx(1.2)


# The list

def test_twenty_one_claims_of_the_registered_paper():
    assert papers()["pareto"] is PAPER
    assert [c.id for c in CLAIMS] == [f"PC{k}" for k in range(1, 22)]
    table = judge_claims([run("mnist-natural")])
    assert list(table["verdict"]) == ["reproduced"] + ["inconclusive"] * 19 + ["inconclusive"]


def test_comparisons_from_other_modules_are_found():
    kinds = {check.kind for claim in CLAIMS for check in claim.checks if ":" in check.kind}
    assert len(kinds) == 9 and all(callable(resolve_name(kind)) for kind in kinds)


def test_every_place_names_a_recipe_and_a_column():
    known = {*PAPER.columns, *PAPER.scores}
    for claim in CLAIMS:
        for check in claim.checks:
            for where in check.at:
                assert where[0] == "*" or f"pareto/{where[0]}" in PAPER.recipes, (claim.id, where)
                if ":" not in check.kind and check.kind not in ("mean", "median", "differ"):
                    assert where[1] in known, (claim.id, where)
                if len(where) > 2:
                    assert where[2] in PAPER.suites, (claim.id, where)


def test_a_remark_names_networks_that_train_on_the_largest_loss():
    said = {"steps": 10, "mean": {"clipped": 0.8}}
    clipped = replace(run("mnist-pareto-2.2", log=[{"loss": 1.0, "objective": said}]))
    from jat_nb.results import remark
    assert "largest robust loss" in remark([clipped], "pareto/mnist-pareto-2.2", data="mnist")
