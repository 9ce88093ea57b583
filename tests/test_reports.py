"""Results, reports and claims: planted run folders go in, the known answer must come out."""
import html
import json
import re
import shlex
from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch

from conftest import ROOT
from jat_nb.catalogue import adapt
from jat_nb.claims import Evidence, judge_claims
from jat_nb.cli import jat_report, jat_train
from jat_nb.differences import Finding, Share, difference, verdict
from jat_nb.papers.jat import CLAIMS, PAPER, RECIPES, ROWS
from jat_nb.plots import attack_bars, budget_curves, training_curve
from jat_nb.records import Record, append_jsonl, write_json
from jat_nb.reports import html_report
from jat_nb.results import Run, published, read_runs, survivors
from jat_nb.tables import overview, paper_table, recipe_names, side_by_side
from jat_nb.weights import load_weights, pretrained, save_weights

N, BUDGETS = 500, [round(0.1 * k, 1) for k in range(11)]
SEVEN = [row.recipe.split("/")[1] for row in ROWS if row.table == 1]
GRID = {(grey, px): "one-step-joint" if (grey, px) == (8, 0.3) else f"budget-{grey}-{px}"
        for grey in (2, 4, 6, 8) for px in (0.1, 0.2, 0.3)}


def bits(percent: float, n: int = N) -> str:
    "The first images survive: of two accuracies the smaller is a subset of the larger."
    return "1" * round(n * percent / 100) + "0" * (n - round(n * percent / 100))


def table(percent: dict[str, float], n: int = N, paired: bool = True) -> dict:
    rows = {"n": n, "seed": 0, "rows": {k: {"accuracy (%)": v} for k, v in percent.items()}}
    return rows | ({"correct": {k: bits(v, n) for k, v in percent.items()}} if paired else {})


def curve(percent: list[float], n: int = N) -> dict:
    return {"budgets": BUDGETS, "steps": 20, "accuracy": [v / 100 for v in percent], "low": percent, "high": percent,
            "n": n, "correct": [bits(v, n) for v in percent]}


def plant(root, name, suites, *, seed=0, data="cifar10", tier="cpu", epochs=None, folder=None):
    "A run folder as fit and jat_eval leave it."
    run = root / (folder or f"{name}-s{seed}")
    plan = replace(adapt(RECIPES[f"jat/{name}"], data, tier), seed=seed)
    about = {"name": f"jat/{name}", "tier": tier, "data": data, "variant": "official", "model": "wrn_10_1_cifar", "seed": seed}
    machine = {"versions": {"torch": "2.6"}, "device": "a processor", "threads": 1, "commit": "0" * 40}
    write_json(run / "run.json", {"recipe": asdict(plan), "model": {"name": "wrn_10_1_cifar"}, "about": about,
                                  "train": {"name": data, "images": 100}, "validation": None, "environment": machine})
    for epoch in range(plan.epochs if epochs is None else epochs):
        append_jsonl(run / "log.jsonl", {"epoch": epoch + 1, "loss": 2.0, "lr": 0.1, "iterations": 9, "seconds": 1.0,
                                         "val_clean": 0.5, "val_robust": 0.2, "collapsed": epoch == 3})
    for suite, metrics in suites.items():
        config = {"suite": suite, "weights": "last", "n": N, "budget": {"eps_pixel": 8 / 255, "eps_flow": 0.3}, "steps": 20,
                  "amp": False, "sources": [], "run": {}}
        Record("jat_eval", config, tier, data, "official", 0, 1.0, 2, 3, metrics, versions={"torch": "2.6"},
               device="a processor", threads=1).save(run / f"eval-{suite}.json")
    return run


COLUMNS = {"Clean": 70, "FGSM": 40, "PGD20": 30, "PGD100": 30, "Spatial": 30, "Joint": 20, "Joint PS": 20}


def network(**columns):
    return {"jat": table(COLUMNS | columns)}


# -- published numbers -------------------------------------------------------------------------------------------------

def test_all_published_numbers_are_there():
    counts = {"JAT": 7, "IJSAT": 7, "SRT": 9, "Pareto": 2}
    frames = [published(paper, k) for paper, last in counts.items() for k in range(1, last + 1)]
    assert len(frames) == 25 and sum(map(len, frames)) == 955
    columns = ["paper", "table", "dataset", "model_or_method", "setting", "metric", "value"]
    assert all(list(frame.columns) == columns and not frame.isna().any(axis=None) for frame in frames)
    assert [frame["value"].dtype.kind == "f" for frame in frames].count(False) == 1


def test_published_values_survive_the_round_trip(tmp_path):
    frame = published("JAT", 4)
    frame.to_csv(tmp_path / "table.csv", index=False)
    pd.testing.assert_frame_equal(frame, pd.read_csv(tmp_path / "table.csv", dtype={"table": str}))
    assert 61.53 in set(frame["value"])


def test_an_unknown_table_is_refused_by_name():
    with pytest.raises(ValueError, match="no table 3 of 'Pareto'"):
        published("Pareto", 3)


# -- intervals ---------------------------------------------------------------------------------------------------------

def share(percent, n=N, shift=0):
    row = torch.tensor([[float(c) for c in bits(percent, n)]], dtype=torch.float64).roll(shift, dims=1)
    return Share((float(row.mean()),), n, row)


@pytest.mark.parametrize("a, b", [(50, 40), (0, 0), (100, 0), (100, 100), (3, 2)])
def test_a_difference_is_antisymmetric_and_holds_its_estimate(a, b):
    there, back = difference(share(a), share(b)), difference(share(b), share(a))
    assert there == pytest.approx((-back[0], -back[2], -back[1]), abs=1e-9)
    assert -1 <= there[1] <= there[0] <= there[2] <= 1 and there[1] < there[2]


def test_pairing_narrows_nested_verdicts_and_counts_alone_do_not():
    paired, apart = difference(share(50), share(46)), difference(Share((0.5,), N), Share((0.46,), N))
    assert paired[0] == pytest.approx(apart[0]) and paired[2] - paired[1] < 0.5 * (apart[2] - apart[1])


def test_pairing_uses_the_first_images_of_the_longer_evaluation():
    long, short = share(50, 1000), share(90, 100)
    assert difference(long, short)[0] == pytest.approx(1.0 - 0.9)  # all of the first 100 survive in `long`


def test_seeds_widen_and_seeds_of_one_network_cancel():
    rows = torch.tensor([[float(c) for c in bits(p)] for p in (40, 60)], dtype=torch.float64)
    both = Share((0.4, 0.6), N, rows, ("a", "b"))
    lower = Share((0.3, 0.5), N, rows.roll(-50, dims=1) * rows, ("a", "b"))
    wide, same_runs = both.interval, difference(both, Share(lower.seeds, N, lower.bits, ("a", "b")))
    other_runs = difference(both, Share(lower.seeds, N, lower.bits, ("c", "d")))
    assert wide[1] - wide[0] > 0.2 > share(50).interval[1] - share(50).interval[0]
    assert same_runs[2] - same_runs[1] < 0.2 < other_runs[2] - other_runs[1]


# -- reading -----------------------------------------------------------------------------------------------------------

def test_runs_are_read_sorted_with_everything(tmp_path):
    plant(tmp_path / "b", "natural", network())
    plant(tmp_path / "a", "madry", network(Joint=5.0))
    runs = read_runs(tmp_path)
    assert [run.folder for run in runs] == ["a/madry-s0", "b/natural-s0"]
    assert all(run.usable and not run.problems for run in runs)
    assert runs[0].share("Joint").value == 0.05 and runs[0].share("AutoAttack", "autoattack") is None
    assert runs[0].share("Union").value == 0.05
    assert recipe_names(runs) == ["jat/natural", "jat/madry"]


def test_nothing_to_read_is_said_plainly(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="no run.json in or below"):
            read_runs(folder)


@pytest.mark.parametrize("file, text, usable, words", [
    ("run.json", "{", False, "run.json is damaged"),
    ("run.json", "[1, 2]", False, "run.json is damaged"),
    ("run.json", '{"about": {"name": "jat/madry"}}', False, "about lacks data, seed, tier"),
    ("log.jsonl", None, False, "log.jsonl is missing"),
    ("log.jsonl", '{"epoch": 1, "loss": 2.0}\n', False, "1 of 8 epochs"),
    ("log.jsonl", "no json\n", False, "log.jsonl is damaged"),
    ("eval-jat.json", "", True, "eval-jat.json is damaged"),
    ("eval-jat.json", "{}", True, "eval-jat.json is damaged"),
    ("eval-curves.json", "[]", True, "eval-curves.json is damaged"),
])
def test_damage_is_reported_and_not_fatal(tmp_path, file, text, usable, words):
    run = plant(tmp_path, "madry", network())
    (run / file).unlink(missing_ok=True) if text is None else (run / file).write_text(text)
    plant(tmp_path, "natural", network())
    spoilt = next(r for r in read_runs(tmp_path) if r.folder == "madry-s0")
    assert spoilt.usable is usable and words in "; ".join(spoilt.problems)
    assert len(paper_table("jat", 1, read_runs(tmp_path)).dropna(subset=["ours"]))
    assert html_report(read_runs(tmp_path), tmp_path / "page.html").exists()


def test_wrong_verdicts_in_a_record_are_damage(tmp_path):
    run = plant(tmp_path, "madry", network())
    record = Record.load(run / "eval-jat.json")
    record.metrics["rows"]["Joint"] = {"accuracy": 3}
    record.metrics["correct"].pop("Joint")
    record.save(run / "eval-jat.json")
    assert "eval-jat.json is damaged (KeyError: 'accuracy (%)')" in read_runs(tmp_path)[0].problems


def spoil(path, change):
    record = Record.load(path)
    change(record)
    record.save(path)


@pytest.mark.parametrize("change, words", [
    (lambda r: r.config.update(suite="curves"), "judges another network or suite"),
    (lambda r: r.config.update(run={"about": {"name": "jat/natural"}, "recipe": {}}), "judges another network or suite"),
    (lambda r: r.config.update(epoch=3), "judges epoch 3, not 8"),
    (lambda r: r.metrics["correct"].update(Joint="1" * N), "verdicts and accuracy disagree"),
    (lambda r: r.metrics["correct"].update(Joint="1"), "verdicts and accuracy disagree")])
def test_a_record_must_judge_its_own_network(tmp_path, change, words):
    run = plant(tmp_path, "madry", network())
    spoil(run / "eval-jat.json", change)
    found = read_runs(tmp_path)[0]
    assert found.usable and not found.evaluations and words in found.problems[0]


def test_only_equals_are_averaged_as_seeds(tmp_path):
    for seed in range(4):
        run = plant(tmp_path, "madry", network(), seed=seed)
        facts = json.loads((run / "run.json").read_text())
        facts["recipe"]["lr"] += seed == 1
        facts["about"]["variant"] = "jpeg" if seed == 2 else "official"
        write_json(run / "run.json", facts)
    spoil(tmp_path / "madry-s3" / "eval-jat.json", lambda r: r.config.update(steps=2))
    runs = read_runs(tmp_path)
    assert [r.usable for r in runs] == [True, False, False, True]
    assert "not as madry-s0: lr" in runs[1].problems and "not as madry-s0: variant" in runs[2].problems
    assert "set aside: other steps" in runs[3].problems[0] and len(survivors(runs, "jat/madry", "Joint").seeds) == 1


def test_a_function_that_stood_in_for_the_recipe_is_named_and_no_seed_of_it(tmp_path):
    for seed in range(2):
        run = plant(tmp_path, "madry", network(), seed=seed)
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"own": {"objective": "mine:hinge"}}))
    first, second = read_runs(tmp_path)
    assert first.usable and not second.usable
    assert second.problems == ("not as madry-s0: own",)
    page = html_report([first, second], tmp_path / "page.html").read_text()
    assert "objective &quot;mine:hinge&quot;" in page


def test_records_with_other_steps_fill_no_cell_of_the_paper(tmp_path):
    spoil(plant(tmp_path, "madry", network()) / "eval-jat.json", lambda r: r.config.update(steps=2))
    runs = read_runs(tmp_path)
    assert survivors(runs, "jat/madry", "Joint").n == N and paper_table("jat", 1, runs)["ours"].isna().all()


def test_a_run_that_was_stopped_in_its_first_epoch_is_not_finished(tmp_path):
    run = plant(tmp_path, "madry", network(), epochs=0)
    (run / "log.jsonl").write_text("")
    assert not read_runs(tmp_path)[0].usable


def changed_recipe(run, **changes):
    facts = json.loads((run / "run.json").read_text())
    facts["recipe"] |= changes
    write_json(run / "run.json", facts)


@pytest.mark.parametrize("iterations, usable, problems", [(72, True, ()), (73, False, ("72 of 73 iterations",))])
def test_a_recipe_by_iterations_is_finished_by_its_iterations(tmp_path, iterations, usable, problems):
    changed_recipe(plant(tmp_path, "madry", network()), epochs=None, iterations=iterations)  # 8 rows of 9
    [run] = read_runs(tmp_path)
    assert (run.usable, run.problems) == (usable, problems)


@pytest.mark.parametrize("changes", [{"schedule": "zigzag"}, {"lr": "high"}, {"invented": 1}, {"attacks": 7}])
def test_a_recipe_that_cannot_be_read_costs_its_run_only(tmp_path, changes):
    changed_recipe(plant(tmp_path, "madry", network()), **changes)
    plant(tmp_path, "natural", network())
    spoilt, good = read_runs(tmp_path)
    assert not spoilt.usable and good.usable and "run.json is damaged" in spoilt.problems[0]
    page = html_report([spoilt, good], tmp_path / "page.html").read_text()
    assert "no command: run.json is damaged" in page and "not one of this package" not in page


def test_an_unfinished_or_repeated_run_fills_no_cell(tmp_path):
    plant(tmp_path, "madry", network(Joint=5.0))
    plant(tmp_path, "madry", network(Joint=50.0), folder="z-again")
    plant(tmp_path, "natural", network(), epochs=2)
    runs = read_runs(tmp_path)
    assert survivors(runs, "jat/madry", "Joint").value == 0.05 and survivors(runs, "jat/natural", "Joint") is None
    assert runs[-1].problems == ("repeats madry-s0",)


# -- tables ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", range(1, 8))
def test_every_printed_number_is_in_its_table(number):
    long, printed = paper_table("jat", number, []), published("JAT", number)
    assert sorted(long["paper"].dropna()) == sorted(printed["value"]) and long["ours"].isna().all()


def test_ours_is_the_mean_of_the_seeds_with_its_gap(tmp_path):
    for seed, joint in enumerate((20.0, 30.0)):
        plant(tmp_path, "one-step-joint", network(Joint=joint) | {"autoattack": table({"Clean": 70, "AutoAttack": 10}, 100)},
              seed=seed)
    cell = paper_table("jat", 1, read_runs(tmp_path)).set_index(["row", "column"]).loc[("one-step-Joint", "Joint")]
    assert (cell.ours, cell.seeds, cell.n, cell.tier) == (25.0, 2, N, "cpu") and cell.low < 20 < 30 < cell.high
    assert cell.gap == pytest.approx(25.0 - 53.1)
    folded = side_by_side(paper_table("jat", 1, read_runs(tmp_path)))
    assert folded.loc[("one-step-Joint", "cpu, gap"), "Joint"] == "-28.1"
    assert folded.loc[("one-step-Joint", "cpu"), "AutoAttack"] == "10.0"
    assert folded.loc[("one-step-Joint", "cpu, images"), "AutoAttack"] == "100"
    assert folded.loc[("one-step-Joint", "cpu, gap"), "AutoAttack"] == "-"
    assert ("Natural", "cpu") not in folded.index and folded.loc[("Natural", "paper"), "Clean"] == "95.6"


def test_tables_of_several_tiers_and_of_transfer(tmp_path):
    plant(tmp_path / "cpu", "natural", network())
    plant(tmp_path / "gpu", "natural", network(Clean=90), tier="gpu")
    sources = {"natural-s0": table({"PGD20": 60}), "one-step-joint-s1": table({"PGD20": 50})}
    plant(tmp_path / "cpu", "one-step-joint", {"transfer": {"sources": sources}})
    runs = read_runs(tmp_path)
    clean = paper_table("jat", 1, runs).query("row == 'Natural' and column == 'Clean'")
    assert dict(zip(clean["tier"], clean["ours"])) == {"cpu": 70.0, "gpu": 90.0}
    black = paper_table("jat", 5, runs).query("column == 'PGD20'").set_index("row")["ours"]
    assert black.tolist() == [60.0, 50.0] and black.index[0].endswith("Undefended")
    assert list(overview(runs, tier="gpu").index) == ["jat/natural"]


def test_every_row_of_the_paper_has_a_recipe_and_a_printed_line():
    for number in range(1, 8):
        labels = {row.label for row in ROWS if row.table == number}
        assert set(paper_table("jat", number, [])["row"]) == labels


# -- verdicts ----------------------------------------------------------------------------------------------------------

def good(tmp_path, **changes):
    "Runs that satisfy all twenty claims; `changes` maps (recipe, suite) to new metrics."
    flow = lambda top: curve([max(top - 6 * k, 0) for k in range(11)])
    steps = {str(m): curve([max(80 - (6 + i) * k, 0) for k in range(11)]) for i, m in enumerate((1, 5, 10, 20))}
    extra = table({"Random flow": 60, "Spatial": 30, "PGD20": 30, "Joint": 20, "Spatial x 1.25": 28, "PGD20 x 1.25": 28,
                   "Joint, pixel x 1.25": 18, "Joint, flow x 1.25": 18})
    extra |= {"similarity": {"SSIM": [0.97 + 0.01 * (i % 2) for i in range(N)], "linf": [0.1] * N},
              "rewarp": {"steps": 10, "eps_flow": 0.3, "longest_px": 0.3, "correct": {"accumulated": bits(40), "rewarped": bits(40)},
                         "energy": {"clean": [1.0] * N, "accumulated": [0.9 + 0.01 * (i % 2) for i in range(N)],
                                    "rewarped": [0.5] * N}},
              "raw": {"FGSM": bits(80)}}
    one_step = dict(Clean=75, PGD20=60, PGD100=45, Spatial=60, Joint=50, **{"Joint PS": 49})
    networks = {
        "natural": dict(Clean=90, FGSM=10, PGD20=0, PGD100=0, Spatial=1, Joint=0),
        "madry": dict(Clean=60, PGD20=50, Spatial=30, Joint=10), "multi-step-spatial": dict(Clean=70, PGD20=20, Spatial=60, Joint=10),
        "multi-step-joint": dict(Clean=50, PGD20=50, Spatial=50, Joint=30),
        "one-step-pixel": dict(Clean=80, PGD20=55, Spatial=40, Joint=30), "one-step-spatial": dict(Clean=85, PGD20=35, Spatial=55, Joint=30),
        "one-step-joint": one_step | {"FGSM": 70}, "joint-ps": one_step | {"Joint": 48, "Joint PS": 52},
        "one-pass": dict(PGD20=30, Spatial=30, Joint=20), "cascade": dict(PGD20=45, Spatial=45, Joint=30)}
    for (grey, px), name in GRID.items():
        if grey < 8:
            level = 90 - 4 * grey - 40 * px
            networks[name] = dict(PGD20=level, PGD100=level - 0.4, Spatial=60, Joint=48)
        elif name != "one-step-joint":
            networks[name] = dict(PGD20=64 - 20 * px, PGD100=49 - 20 * px, Spatial=60, Joint=40)
    for name, columns in networks.items():
        suites = network(**columns) | {"curves": {"pixel": flow(70), "flow": flow(80), "flow_steps": steps}, "claims": extra}
        if name == "one-step-joint":
            suites["transfer"] = {"sources": {"natural-s0": table({"PGD20": 74, "Spatial": 74, "Joint": 74}),
                                              "one-step-joint-s1": table({"PGD20": 68, "Spatial": 68, "Joint": 60})}}
        suites |= {suite: metrics for (recipe, suite), metrics in changes.get("changes", {}).items() if recipe == name}
        plant(tmp_path, name, suites)
    for data in ("cifar100", "svhn"):
        for name, columns in {"natural": dict(Clean=90, FGSM=10, PGD20=0, Spatial=0, Joint=0),
                              "madry": dict(Clean=50, FGSM=30, PGD20=20, Spatial=20, Joint=5),
                              "one-step-pixel": dict(Clean=80, FGSM=50, PGD20=30, Spatial=30, Joint=10),
                              "one-step-joint": dict(Clean=65, FGSM=60, PGD20=50, Spatial=50, Joint=40)}.items():
            plant(tmp_path / data, name, network(**columns), data=data)
    return read_runs(tmp_path)


@pytest.fixture(scope="module")
def all_good(tmp_path_factory):
    return good(tmp_path_factory.mktemp("good"))


def judged(runs, id):
    claim = next(claim for claim in CLAIMS if claim.id == id)
    return verdict(Evidence(tuple(runs), "cpu", PAPER).findings(claim))


def altered(runs, name, suite, change, data="cifar10"):
    "The same runs with the metrics of one suite of one recipe changed."
    def new(run):
        if (run.name, run.about["data"]) != (f"jat/{name}", data) or suite not in run.evaluations: return run
        record = run.evaluations[suite]
        return replace(run, evaluations=run.evaluations | {suite: replace(record, metrics=change(json.loads(json.dumps(record.metrics))))})
    return [new(run) for run in runs]


def columns(**percent):
    "Change columns of a suite to these accuracies."
    def change(metrics):
        for name, value in percent.items():
            metrics["rows"][name], metrics["correct"][name] = {"accuracy (%)": value}, bits(value)
        return metrics
    return change


def rising(metrics):
    metrics["flow"]["correct"][5] = bits(80)
    return metrics


def more_steps_help_the_defender(metrics):
    metrics["flow_steps"]["20"]["correct"][3] = bits(90)
    return metrics


def source(key, **percent):
    def change(metrics):
        metrics["sources"][key] = table(percent)
        return metrics
    return change


def inside(key, **values):
    def change(metrics):
        metrics[key] |= values
        return metrics
    return change


LARGER = {"Joint, flow x 1.25": 1}
FAILING = {
    "JC1": ("madry", "jat", columns(Joint=40)), "JC2": ("natural", "curves", rising),
    "JC3": ("madry", "curves", more_steps_help_the_defender), "JC4": ("natural", "claims", columns(**{"Random flow": 31})),
    "JC5": ("natural", "jat", columns(Spatial=20)), "JC6": ("madry", "jat", columns(Spatial=70)),
    "JC7": ("madry", "jat", columns(PGD20=15, Joint=5)), "JC8": ("one-step-spatial", "jat", columns(PGD20=1, Joint=0)),
    "JC9": ("multi-step-joint", "jat", columns(Joint=60)), "JC10": ("madry", "jat", columns(Clean=90)),
    "JC11": ("one-pass", "jat", columns(Joint=40)), "JC12": ("one-pass", "claims", inside("raw", FGSM=bits(40))),
    "JC13": ("joint-ps", "jat", columns(Clean=60)), "JC14": ("budget-8-0.1", "jat", columns(PGD20=95)),
    "JC15": ("budget-2-0.1", "jat", columns(PGD100=60)),
    "JC16": ("one-step-joint", "transfer", source("natural-s0", PGD20=30, Spatial=30, Joint=30)),
    "JC17": ("madry", "jat", columns(Joint=80)), "JC18": ("one-step-joint", "claims", columns(**LARGER)),
    "JC19": ("natural", "claims", inside("similarity", SSIM=[0.5, 0.6] * 50)),
    "JC20": ("natural", "claims", inside("rewarp", longest_px=3.0)),
}


@pytest.mark.parametrize("id", FAILING)
def test_every_claim_can_be_reproduced(all_good, id):
    assert judged(all_good, id)[0] == "reproduced", judged(all_good, id)


@pytest.mark.parametrize("id", FAILING)
def test_every_claim_can_fail(all_good, id):
    name, suite, change = FAILING[id]
    runs = altered(all_good, name, suite, change, "svhn" if id == "JC17" else "cifar10")
    result, reason = judged(runs, id)
    assert result == "not reproduced" and "fail" in reason, (result, reason)


@pytest.mark.parametrize("id", FAILING)
def test_every_claim_stays_open_without_its_numbers(all_good, id):
    name, suite, _ = FAILING[id]
    data = "svhn" if id == "JC17" else "cifar10"
    runs = [replace(run, evaluations={k: v for k, v in run.evaluations.items() if k != suite})
            if (run.name, run.about["data"]) == (f"jat/{name}", data) else run for run in all_good]
    result, reason = judged(runs, id)
    assert result == "inconclusive" and "not measured" in reason, (result, reason)


@pytest.mark.parametrize("id, name, change", [
    ("JC6", "madry", columns(Spatial=60)), ("JC10", "madry", columns(Clean=80)), ("JC9", "multi-step-joint", columns(Joint=50)),
    ("JC13", "joint-ps", columns(Clean=77)), ("JC5", "natural", columns(Spatial=10))])
def test_a_tie_is_inconclusive(all_good, id, name, change):
    result, reason = judged(altered(all_good, name, "jat", change), id)
    assert result == "inconclusive" and "covers both" in reason


def test_a_hole_in_the_grid_can_refute_but_not_confirm(all_good):
    holes = [run for run in all_good if run.name not in ("jat/budget-4-0.2", "jat/budget-6-0.1")]
    assert judged(holes, "JC14")[0] == judged(holes, "JC15")[0] == "inconclusive"
    assert judged(altered(holes, *FAILING["JC14"]), "JC14")[0] == "not reproduced"


def test_all_verdicts_in_one_frame(all_good):
    frame = judge_claims(all_good)
    assert frame["id"].tolist() == [f"JC{k}" for k in range(1, 21)]
    assert set(frame["verdict"]) == {"reproduced"} and set(frame["tier"]) == {"cpu"}
    assert judge_claims([]).empty
    assert set(judge_claims([run for run in all_good if run.name == "jat/joint-ps"])["verdict"]) == {"inconclusive"}


def test_masking_rows_serve_where_raw_verdicts_are_missing(all_good):
    checks = {"n": N, "seed": 0, "failed": [], "rows": [{"check": "more effort", "demand": "", "held": True, "seen": {"clean": 0.7, "FGSM": 0.9}}]}
    runs = [replace(run, evaluations={"masking": Record("jat_eval", metrics=checks, tier="cpu")}) if run.name == "jat/one-pass"
            else run for run in all_good]
    assert judged(runs, "JC12")[0] == "reproduced"


def test_finding_without_a_number_never_counts():
    assert verdict([Finding("a", 1, 0.5, 2, at_least=0), Finding("b", at_least=0)])[0] == "inconclusive"


# -- the page ----------------------------------------------------------------------------------------------------------

def test_the_page_holds_everything_and_no_address(all_good, tmp_path):
    page = html_report(all_good, tmp_path / "report.html", judge_claims(all_good)).read_text(encoding="utf-8")
    assert not re.search(r"(https?:)?//[a-z]|url\((?!#)|<script|<link|src=|@import", page)
    assert page.count("<svg") >= len(all_good) and "prefers-color-scheme:dark" in page and "width=device-width" in page
    assert "20 reproduced" in page and "jat_train --recipe jat/madry --data cifar10 --tier cpu --seed 0" in page
    assert "<h3>Table 4</h3>" in page and "53.1" in page
    assert "var(--grey)" not in re.sub(r"stroke: var\(--grey\)", "", page)  # no number was mistaken for a colour


def test_commands_name_the_networks_that_a_run_stands_on(tmp_path):
    runs = [run for run in read_runs(ROOT / "nbs/results/ijsat_cpu") if run.name in ("ijsat/at-jsa", "ijsat/at-16")]
    page = html_report(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    lines = re.findall(r"jat_(?:train|eval) [^<\n]*", page)
    for run in runs:
        [train] = [line for line in lines if f"--recipe {run.name} " in line and f"--out runs/{run.folder}" in line]
        assert ("--needs flow=FOLDER" in train) == (run.name == "ijsat/at-jsa")
        for suite, record in run.evaluations.items():
            [line] = [line for line in lines if f"jat_eval runs/{run.folder} " in line and f"--suite {suite} " in line]
            assert ("--needs flow=FOLDER" in line) == bool(record.config.get("needs"))
    assert page.count("--needs") > 3


@pytest.mark.parametrize("named", [True, False], ids=["names its network", "state_dict"])
def test_the_command_of_a_run_that_began_with_a_file_trains_it_again(named, tmp_path):
    network = pretrained("digits-joint")
    if named: file, form = save_weights(network, tmp_path / "theirs.safetensors"), ""
    else:
        file, form = tmp_path / "theirs.pth", f"--model {network.metadata['name']} --mean 0.25 --std 0.4"
        torch.save(network.model.state_dict(), file)
    words = f"--recipe jat/natural --data digits --tier smoke --images 32 --init {file} {form} --set epochs=1 batch_size=16 amp=false"
    assert jat_train(f"{words} --out {tmp_path}/runs/on".split()) == 0
    assert jat_report([f"{tmp_path}/runs", "--out", str(tmp_path / "page.html")]) == 0
    page = html.unescape((tmp_path / "page.html").read_text(encoding="utf-8"))
    told = re.search(r"jat_train (--recipe [^<\n]*)", page)[1]  # as a reader copies it
    assert ("--model" in told) != named
    assert jat_train(shlex.split(told.replace("FILE", str(file)).replace("runs/on", f"{tmp_path}/again"))) == 0
    first, again = (load_weights(tmp_path / place / "last.safetensors") for place in ("runs/on", "again"))
    torch.testing.assert_close(dict(first.state_dict()), dict(again.state_dict()))


def test_only_a_recipe_that_nobody_knows_is_called_so(tmp_path):
    run = plant(tmp_path, "natural", network())
    facts = json.loads((run / "run.json").read_text())
    for name, seen in (("jat/natural", "jat_train --recipe jat/natural"), ("mine/natural", "not one of this package")):
        write_json(run / "run.json", facts | {"about": facts["about"] | {"name": name}})
        assert seen in html_report(read_runs(tmp_path), tmp_path / "page.html").read_text()


def test_names_are_shown_and_not_obeyed(tmp_path):
    run = plant(tmp_path, "natural", network())
    facts = json.loads((run / "run.json").read_text())
    facts["about"]["name"] = "<b>bold</b><script>x</script>"
    write_json(run / "run.json", facts)
    page = html_report(read_runs(tmp_path), tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in page and "<b>bold" not in page and "&lt;/b&gt;" not in page.split("<h2")[0]


def test_masking_answers_and_autoattack_stand_in(tmp_path):
    rows = [{"check": c, "demand": "d", "seen": {"x": 0.5}, "held": held} for c, held in zip("abcdef", (True, False, True, None, None, True))]
    plant(tmp_path, "one-step-joint", network() | {"masking": {"n": N, "seed": 0, "failed": ["b"], "rows": rows},
                                                  "autoattack": table({"Clean": 70, "AutoAttack": 10}, 100)})
    page = html_report(read_runs(tmp_path), tmp_path / "r.html").read_text(encoding="utf-8")
    answers = re.findall(r"<td><span class=(\w+)>", page)
    assert answers == ["good", "bad", "good", "open", "bad", "good"]  # PGD100 keeps 100 % of the first 100, AutoAttack 10 %


def test_figures_draw_what_is_there(all_good, tmp_path):
    bars = attack_bars(all_good, ("PGD20", "PGD100"))
    assert len(bars.axes[0].patches) == 2 * len(recipe_names(all_good))
    lines = budget_curves(all_good, "flow", ["jat/natural", "jat/madry"]).axes[0].lines
    assert [line.get_label() for line in lines[:2]] == ["natural", "madry"]
    assert lines[0].get_ydata()[3] == pytest.approx(62.0) and lines[0].get_xdata()[3] == pytest.approx(0.3)
    collapse = training_curve(all_good[0]).axes[0].lines[2]
    assert collapse.get_label() == "collapsed" and list(collapse.get_xdata()) == [4]
    assert not attack_bars(all_good, ("PGD7",)).axes[0].patches
    assert isinstance(all_good[0], Run)


def test_a_flow_shows_its_bits():
    "A flow has no accuracy: one line, bits of the images held out."
    [run] = [run for run in read_runs(ROOT / "nbs/results/ijsat_cpu") if run.name == "ijsat/glow" and run.group[1] == "cifar10"]
    [line] = (axes := training_curve(run).axes[0]).lines
    assert "bits" in axes.get_ylabel() and list(line.get_ydata()) == [row["val_bits_per_dim"] for row in run.log]
    assert line.get_ydata()[-1] < line.get_ydata()[0] < 8
