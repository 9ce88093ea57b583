"Papers as rooms: the one that lives here says what it said before, another moves in without a change elsewhere."
import ast
import json
import math
import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from jat_nb import catalogue
from jat_nb.catalogue import Paper, Row, papers, register, setting
from jat_nb.claims import Check, Claim, Evidence, findings_table, judge_claims
from jat_nb.data import default_budget, load
from jat_nb.models import load_weights
from jat_nb.recipes import Recipe
from jat_nb.records import Record
from jat_nb.reports import html_report, masking_checks
from jat_nb.results import overview, paper_table, read_runs, recipe_names, survivors
from jat_nb.suites import Job, Suite, run_suite, suites
from jat_nb.training import fit

BEFORE = json.loads((ROOT / "tests" / "data" / "jat_before.json").read_text(encoding="utf-8"))
NAMES = {"a": "more effort", "b": "unbounded", "c": "noise", "d": "transfer", "e": "autoattack", "f": "linearity"}


# -- the committed records say what they said under 0.2 -----------------------------------------------------------------

@pytest.fixture(scope="module", params=sorted(BEFORE))
def committed(request):
    runs = read_runs(ROOT / "nbs" / "results" / request.param)
    return SimpleNamespace(runs=runs, before=BEFORE[request.param])


def plain(number):
    return None if not math.isfinite(number) else round(number, 9)


def test_the_same_runs_are_usable_with_the_same_problems(committed):
    assert {run.folder: run.usable for run in committed.runs} == committed.before["usable"]
    assert {run.folder: list(run.problems) for run in committed.runs} == committed.before["problems"]


@pytest.mark.parametrize("number", range(1, 8))
def test_tables_are_as_before(committed, number):
    now = json.loads(paper_table("jat", number, committed.runs).to_json(orient="values", double_precision=10))
    assert now == committed.before["tables"][str(number)]


def test_overviews_are_as_before(committed):
    for data, before in committed.before["overview"].items():
        now = json.loads(overview(committed.runs, data=data).to_json(orient="index"))
        assert {name.removeprefix("jat/"): row for name, row in now.items()} == before
        assert list(now) == [f"jat/{name}" for name in before]


def test_findings_are_as_before(committed):
    "Value, interval, bounds and state of every comparison; only their order may differ."
    evidence = Evidence(tuple(committed.runs), "cpu", papers()["jat"])
    for claim in papers()["jat"].claims:
        now = [[f.what, plain(f.value), plain(f.low), plain(f.high), plain(f.at_least), plain(f.at_most), f.holds]
               for f in evidence.findings(claim)]
        key = lambda row: json.dumps(row)
        assert sorted(now, key=key) == sorted(committed.before["findings"][claim.id], key=key), claim.id
    assert [claim.id for claim in papers()["jat"].claims] == list(committed.before["findings"])


def test_verdicts_are_as_before(committed):
    now = judge_claims(committed.runs)
    assert set(now["paper"]) == {"jat"}
    assert now[["id", "tier", "verdict"]].values.tolist() == [row[:3] for row in committed.before["claims"]]


def test_masking_checks_are_as_before_by_name(committed):
    for run in committed.runs:
        before = {NAMES[letter]: row for letter, row in committed.before["masking"][run.folder].items()}
        now = masking_checks(run)
        assert list(now) == list(before)
        for name, row in now.items():
            assert (row["held"], row["seen"]) == (before[name]["held"], before[name]["seen"]), (run.folder, name)


def test_the_paper_number_stands_beside_ours(committed):
    frame = findings_table(committed.runs).set_index("what")
    assert len(frame) == sum(map(len, committed.before["findings"].values()))
    six = frame[frame["id"] == "JC6"]
    assert six["printed"].round(1).tolist() == [25.2, 12.0]  # 70.8 - 45.6 and 65.7 - 53.7
    level = frame[frame["id"] == "JC5"]["printed"]
    assert level.tolist()[:3] == [0.0, 0.1, 0.0]
    black = frame[frame["id"] == "JC16"]["printed"].round(1).tolist()
    assert black[:3] == [26.7, 18.4, 8.3]  # 90.7 - 64.0, 82.4 - 64.0, 90.7 - 82.4
    assert frame[frame["id"] == "JC20"]["printed"].isna().all()


# -- no wall but the paper's own bears its name -------------------------------------------------------------------------

def strings(path):
    "Strings of a module with their lines; docstrings, which may name a source, are left out."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, documented) and n.body
            and isinstance(n.body[0], ast.Expr)}
    return [(n.lineno, n.value) for n in ast.walk(tree)
            if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs]


def test_no_module_outside_its_room_names_a_paper():
    "No key, recipe or column suite of a paper is written in the code of another module."
    modules = [p for p in sorted((ROOT / "jat_nb").glob("*.py")) if p.stem != "_modidx"]
    assert len(modules) > 20
    named = []
    for key, paper in papers().items():
        for path in modules:
            named += [f"{path.name}:{line}: {text[:60]!r}" for line, text in strings(path)
                      if re.search(rf"(^|[^\w-]){key}/[a-z]", text) or text in (key, *paper.recipes)]
    assert not named, "\n".join(named)
