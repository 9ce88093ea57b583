"Papers as rooms: the one that lives here says what it said before, another moves in without a change elsewhere."
import ast
import importlib.util
import json
import math
import re
import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
from conftest import ROOT

from jat_nb import catalogue
from jat_nb.catalogue import papers, register, setting
from jat_nb.claims import Evidence, findings_table, judge_claims
from jat_nb.data import default_budget, load
from jat_nb.records import Record
from jat_nb.reports import html_report, masking_checks
from jat_nb.results import read_runs, survivors
from jat_nb.suites import Job, Suite, run_suite, suites
from jat_nb.tables import overview, paper_table, recipe_names
from jat_nb.training import fit
from jat_nb.weights import load_weights

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


# -- another paper moves in ---------------------------------------------------------------------------------------------

TINY = '''
"Everything of a paper that does not exist."
from pathlib import Path

from jat_nb.catalogue import Paper, Row
from jat_nb.claims import Check, Claim
from jat_nb.recipes import Recipe
from jat_nb.suites import Suite

PLAIN = Recipe(objective="natural", data="digits", epochs=3, augment=())
ROBUST = Recipe(objective="adversarial", attacks={"attack": [["pgd", {"eps": 0.1, "step": 0.05, "steps": 2}]]},
                data="digits", epochs=3, augment=())
NOISY = Suite({"Clean": ("clean", {}), "PGD{steps}": ("pgd", {"eps": "eps_pixel", "step": "0.5 eps_pixel", "steps": "steps"}),
               "Noise": ("random_pixels", {"eps": "eps_pixel"})})
PAPER = Paper("tiny", "A Tiny Paper", {"tiny/natural": PLAIN, "tiny/robust": ROBUST},
              rows=(Row(1, "Plain", "tiny/natural", "digits"), Row(1, "Robust", "tiny/robust", "digits")),
              columns={"Clean": "noisy", "PGD20": "noisy", "Noise": "noisy"}, suites={"noisy": NOISY},
              claims=(Claim("T1", "Noise does less than an attack", (
                  Check("gap", (("*", "Noise"), ("*", "PGD20")), at_least=-1),), "Table 1"),),
              synonyms={"PGD-20": "PGD20"}, tables=str(Path(__file__).parent))
'''
PRINTED = """paper,table,dataset,model_or_method,setting,metric,value
Tiny,1,digits,Plain,,Clean,99.0
Tiny,1,digits,Plain,,PGD-20,1.0
Tiny,1,digits,Plain,,Noise,98.0
Tiny,1,digits,Robust,,PGD-20,60.0
"""


def trained(name, out):
    "A run as jat_train and jat_eval leave it, at the smallest size."
    s = setting(name, tier="smoke")
    about = {"name": name, "tier": "smoke", "data": s.recipe.data, "variant": s.train.variant, "seed": 0,
             "model": s.recipe.model}
    fit(s.model, s.train, s.recipe, validation=s.validation, out=out, about=about)
    test = load(s.recipe.data, "test").subset(10)
    job = Job(load_weights(out / "last.safetensors"), test.x, test.labels, default_budget(s.recipe.data), steps=20)
    config = {"suite": "noisy", "n": 10, "steps": 20, "budget": asdict(job.budget)}
    Record("jat_eval", config, "smoke", s.recipe.data, metrics=run_suite("noisy", job)).save(out / "eval-noisy.json")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "Its module and its table in a folder of their own, and runs of two papers in another."
    room, runs = tmp_path_factory.mktemp("room"), tmp_path_factory.mktemp("runs")
    (room / "tiny.py").write_text(TINY)
    (room / "tiny_table1.csv").write_text(PRINTED)
    spec = importlib.util.spec_from_file_location("tiny", room / "tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    register(module.PAPER)
    try:
        for name in ("natural", "robust"): trained(f"tiny/{name}", runs / "tiny" / f"{name}-s0")
        shutil.copytree(ROOT / "nbs" / "results" / "jat_cpu" / "natural-s0", runs / "jat" / "natural-s0")
        yield read_runs(runs)
    finally: catalogue._REGISTERED.pop("tiny")


def test_runs_of_two_papers_do_not_mix(tiny):
    assert [(run.name, run.usable) for run in tiny] == [
        ("jat/natural", True), ("tiny/natural", True), ("tiny/robust", True)]
    assert recipe_names(tiny, data="digits", tier="smoke") == ["tiny/natural", "tiny/robust"]
    assert recipe_names(tiny, paper="tiny") == [] and recipe_names(tiny) == ["jat/natural"]
    assert survivors(tiny, "jat/natural", "PGD20").n == 1000
    assert survivors(tiny, "tiny/natural", "PGD20", data="digits", tier="smoke").n == 10
    assert survivors(tiny, "tiny/natural", "PGD20") is None
    seen = overview(tiny, data="digits", tier="smoke", paper="tiny")
    assert list(seen.columns) == ["Clean", "PGD20", "Noise", "Union"] and list(seen.index) == ["tiny/natural", "tiny/robust"]


def test_the_other_paper_has_its_table(tiny):
    table = paper_table("tiny", 1, tiny).set_index(["row", "column"])
    assert table.loc[("Plain", "PGD20"), "paper"] == 1.0 and math.isnan(table.loc[("Robust", "Noise"), "paper"])
    assert table["ours"].notna().all() and set(table["n"]) == {10}
    assert paper_table("jat", 1, tiny).dropna(subset=["ours"])["row"].unique().tolist() == ["Natural"]


def test_the_other_paper_has_its_verdict_and_its_number(tiny):
    frame = judge_claims(tiny)
    assert frame["paper"].value_counts().to_dict() == {"jat": 20, "tiny": 1}
    assert frame[frame["paper"] == "tiny"][["id", "tier", "printed"]].values.tolist() == [["T1", "smoke", "Table 1"]]
    found = findings_table(tiny)
    mine = found[found["paper"] == "tiny"]
    assert len(mine) == 2 and mine["printed"].tolist()[0] == 97.0 and math.isnan(mine["printed"].tolist()[1])
    jat = found[found["paper"] == "jat"].dropna(subset=["ours"])
    assert not jat["what"].str.contains("robust").any()


def test_a_report_has_a_section_for_each(tiny, tmp_path):
    page = html_report(tiny, tmp_path / "page.html", judge_claims(tiny)).read_text(encoding="utf-8")
    heads = re.findall(r"<h2 id='?([^'>]+)'?>([^<]+)</h2>", page)
    assert [head for head, _ in heads] == ["jat-cpu-cifar10", "jat-tables", "jat-claims",
                                           "tiny-smoke-digits", "tiny-tables", "tiny-claims", "again"]
    titles = dict(heads)
    assert titles["tiny-claims"] == "A Tiny Paper: claims" and titles["jat-tables"].startswith(papers()["jat"].title)
    parts = dict(zip((head for head, _ in heads), re.split(r"<h2 [^>]*>", page)[1:]))
    assert "T1" in parts["tiny-claims"] and "JC1" not in parts["tiny-claims"] and "T1<" not in parts["jat-claims"]
    assert "robust" in parts["tiny-smoke-digits"] and "robust, seed" not in parts["jat-cpu-cifar10"]
    assert "jat_train --recipe tiny/robust --data digits --tier smoke --seed 0" in page


def test_two_papers_cannot_share_a_key_or_the_name_of_a_suite(tiny):
    with pytest.raises(ValueError, match="choose another key"): register(papers()["tiny"])
    clash = replace(papers()["tiny"], key="clash", recipes={}, rows=(), suites={"jat": Suite()})
    register(clash)
    try:
        with pytest.raises(ValueError, match="two suites are named 'jat'"): suites()
    finally: catalogue._REGISTERED.pop("clash")


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
    named, method, example = [], ("objectives", "semi_supervised", "timing"), "demo"  # an objective bears the method's name
    for key, paper in papers().items():
        for path in (path for path in modules if path.stem != example):
            own = paper.recipes if path.stem in method else (key, *paper.recipes)
            named += [f"{path.name}:{line}: {text[:60]!r}" for line, text in strings(path)
                      if re.search(rf"(^|[^\w-]){key}/[a-z]", text) or text in own]
    assert not named, "\n".join(named)
