"Suites: the same questions for every network, with answers that add up, whatever the number of processes."
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from jat_nb.attacks import double_pass, fgsm, ggsm, pgd
from jat_nb.data import default_budget, load
from jat_nb.evaluation import clean, evaluate, ggsm_at, pgd_at
from jat_nb.differences import bits, class_accuracies, with_bits
from jat_nb.losses import margin_loss
from jat_nb.randomness import image_generators
from jat_nb.suites import SUITES, Job, Suite, attacks_from, check_answer, quantity, reads_steps, run_suite, suites
from jat_nb.weights import pretrained

JAT = ("jat", "stronger", "claims")  # what the paper in chapter 54 adds


@pytest.fixture(scope="module")
def job():
    test = load("digits", "test").subset(12)
    return Job(pretrained("digits-joint"), test.x, test.labels, default_budget("digits"), steps=2, batch_size=8,
               sources={"natural-s0": pretrained("digits-natural")})


def test_a_suite_tells_whether_it_reads_the_steps():
    "Exactly where other steps give another question: among its columns, beside it, or in its kind."
    expected = {"autoattack": False, "curves": True, "surface": True, "transfer": True, "masking": True, "jat": True, "claims": True,
                "ijsat": False, "ijsat-corruptions": False, "pareto-mnist": False, "srt-mnist": False, "ijsat-mixing": True, "ijsat-levels": True}
    assert {name: reads_steps(name) for name in expected} == expected
    assert not reads_steps(Suite({"PGD": ("pgd", {"steps": 20})})) and reads_steps(Suite({"worst": [("clean", {}), ("pgd", {"steps": "5 steps"})]}))
    assert reads_steps(Suite({"Clean": ("clean", {})}, also={"raw": Suite({"PGD": ("pgd", {"steps": "steps"})}, kind="raw")}))


@pytest.mark.parametrize("name", ["jat", "stronger", "transfer", "claims"])
def test_answers_are_json_and_repeatable(job, name):
    answer = run_suite(name, job)
    assert json.loads(json.dumps(answer)) == answer == run_suite(name, job)


def test_masking_and_autoattack_answer(job):
    few = replace(job, x=job.x[:4], y=job.y[:4], steps=8)
    answer = run_suite("masking", few)
    assert json.loads(json.dumps(answer)) == answer and len(answer["rows"]) == 6
    assert set(suites()) >= {"autoattack", "curves", "surface", "transfer", "masking", *JAT}
    assert not set(SUITES) & set(JAT)
    answer = run_suite("autoattack", replace(job, x=job.x[:2], y=(job.y[:2] + 1) % 10))  # wrong already: nothing to attack
    assert answer["correct"] == {"Clean": "00", "AutoAttack": "00"}


def test_a_column_names_its_loss(job):
    column = ("pgd", {"eps": "eps_pixel", "steps": "steps", "loss": "margin"})
    by_name = run_suite(Suite({"PGD": column}), job)["correct"]["PGD"]
    asked = {"PGD": partial(pgd, eps=job.budget.eps_pixel, steps=job.steps, loss=margin_loss)}
    assert by_name == bits(evaluate(job.model, job.x, job.y, asked).correct[0])
    with pytest.raises(ValueError, match="unknown loss 'hinge': choose one of cross_entropy, margin, soft_margin, dlr"):
        run_suite(Suite({"PGD": (column[0], column[1] | {"loss": "hinge"})}), job)


def test_columns_and_their_bits(job):
    answer = run_suite("jat", job)
    assert list(answer["correct"]) == ["Clean", "FGSM", "PGD2", "PGD10", "Spatial", "Joint", "Joint PS"]
    for name, row in answer["correct"].items():
        assert len(row) == 12 and abs(100 * row.count("1") / 12 - answer["rows"][name]["accuracy (%)"]) < 1e-9
    single = evaluate(job.model, job.x, job.y, {"FGSM": partial(fgsm, eps=job.budget.eps_pixel)}).correct[0]
    assert bits(single) == answer["correct"]["FGSM"]


def test_data_stand_for_the_attacks_that_were_functions_before(job):
    "Every option to the last bit: committed records were made with these numbers."
    b, steps, k = job.budget, job.steps, 1.25
    joint = dict(eps_pixel=b.eps_pixel, eps_flow=b.eps_flow, step_pixel=b.eps_pixel / 4, step_flow=b.eps_flow / 2, steps=steps)
    known = suites()
    made = attacks_from(known["jat"].columns, job.quantities)
    assert made["PGD2"].keywords == pgd_at(b.eps_pixel, steps).keywords
    assert made["PGD10"].keywords == pgd_at(b.eps_pixel, 5 * steps).keywords
    assert made["Spatial"].keywords == ggsm_at(b.eps_flow, steps).keywords
    assert made["Joint"].keywords == joint and made["Joint"].func is double_pass
    assert made["Joint PS"].keywords == joint | {"order": "pixel-spatial"}
    larger = attacks_from(known["claims"].columns, job.quantities)
    assert larger["PGD2 x 1.25"].keywords == pgd_at(k * b.eps_pixel, steps).keywords
    assert larger["Spatial x 1.25"].keywords == ggsm_at(k * b.eps_flow, steps).keywords
    assert larger["Joint, flow x 1.25"].keywords == joint | {"eps_flow": k * b.eps_flow, "step_flow": k * b.eps_flow / 2}
    strong = attacks_from(known["stronger"].columns, job.quantities)
    assert list(strong) == [f"{name}{what}" for name in ("Spatial", "Joint") for what in ("", ", cross-entropy", ", margin")]
    assert strong["Joint, margin"].keywords["steps"] == 5 * steps and strong["Joint, margin"].keywords["restarts"] == 2


@pytest.mark.parametrize("value, meant", [("steps", 7), ("0.5 steps", 3), ("0.01 steps", 1), ("eps", 0.25), ("3 eps", 0.75),
                                          ("pixel-spatial", "pixel-spatial"), ("2 other", "2 other"), (None, None), (0.3, 0.3)])
def test_quantities(value, meant):
    assert quantity(value, {"steps": 7, "eps": 0.25}) == meant


def test_a_list_of_attacks_is_the_worst_of_them(job):
    pgd, flow = ("pgd", {"eps": "eps_pixel", "steps": 3}), ("ggsm", {"eps": "eps_flow", "steps": 3})
    answer = run_suite(Suite({"one": pgd, "two": flow, "both": [pgd, flow]}), job)["correct"]
    assert all(b <= a for a, b in zip(answer["one"], answer["both"])) and answer["both"].count("1") <= answer["two"].count("1")


@pytest.mark.parametrize("name", ["jat", "curves", "surface", "transfer", "claims"])
def test_a_fast_job_answers_in_the_same_form(job, name):
    few = replace(job, x=job.x[:6], y=job.y[:6])
    plain, fast = run_suite(name, few), run_suite(name, replace(few, fast=True))
    check_answer(name, fast)
    assert fast.keys() == plain.keys()
    if name == "jat":
        assert fast["correct"]["Clean"] == plain["correct"]["Clean"]  # the verdict is the original's
        assert sum(a != b for k in plain["correct"] for a, b in zip(plain["correct"][k], fast["correct"][k])) <= 3


def test_a_fast_job_tells_every_evaluation(job):
    assert replace(job, fast=True).options["fast"] is True and job.options["fast"] is False


def test_only_the_first_images_where_a_suite_says_so(job):
    answer = run_suite(Suite({"Clean": ("clean", {})}, options={"n": 5}), job)
    assert answer["n"] == 5 and answer["correct"]["Clean"] == bits(job.model(job.x).argmax(1) == job.y)[:5]


def test_curves_start_clean_and_share_their_points(job):
    answer = run_suite("curves", job)
    right = (job.model(job.x).argmax(1) == job.y).double().mean().item()
    assert answer["pixel"]["accuracy"][0] == answer["flow"]["accuracy"][0] == right
    assert_close(answer["pixel"]["budgets"][4], job.budget.eps_pixel)
    assert_close(answer["flow"]["budgets"][3], job.budget.eps_flow)
    assert all(len(c["correct"]) == 11 and len(c["correct"][0]) == 12 for c in (answer["pixel"], answer["flow"]))
    assert answer["flow_steps"]["2"] == answer["flow"] and list(answer["flow_steps"]) == ["1", "2"]
    long = evaluate(job.model, job.x, job.y, {"a": partial(ggsm, eps=0.5, step=0.5, steps=1)}).correct[0]
    assert answer["flow_steps"]["1"]["correct"][3] == bits(long)  # one step is as long as the budget


def test_raw_accuracy_counts_images_that_are_wrong_without_attack(job):
    raw = run_suite("claims", job)["raw"]["FGSM"]
    x_adv = fgsm(job.model, job.x, job.y, eps=job.budget.eps_pixel, generator=image_generators(0, range(12)))
    assert raw == bits(job.model(x_adv).argmax(1) == job.y)


def test_rewarping_blurs(job):
    found = run_suite("claims", job)["rewarp"]
    energy = {k: sum(v) for k, v in found["energy"].items()}
    assert energy["rewarped"] < energy["accumulated"] and found["longest_px"] <= job.budget.eps_flow * (1 + 1e-6)
    assert found["correct"]["clean"] == bits(job.model(job.x).argmax(1) == job.y)


def test_surface_corner_and_bits(job):
    answer = run_suite("surface", job)
    assert len(answer["accuracy"]) == 5 and len(answer["accuracy"][0]) == 5
    assert answer["accuracy"][0][0] == (job.model(job.x).argmax(1) == job.y).double().mean().item()
    assert with_bits(evaluate(job.model, job.x, job.y, {"a": clean}))["correct"]["a"] == \
        bits(job.model(job.x).argmax(1) == job.y)


def test_refusals(job):
    with pytest.raises(ValueError, match="choose one of"): run_suite("none", job)
    with pytest.raises(ValueError, match="give it sources"): run_suite("transfer", replace(job, sources={}))
    with pytest.raises(ValueError, match="unknown attack 'mystery'"): run_suite(Suite({"a": ("mystery", {})}), job)


def test_verdicts_on_different_images_are_no_accuracies_of_classes():
    labels = torch.tensor([0, 1, 1])
    assert class_accuracies({"a": "10", "b": "11"}, labels, "xy") == {"x": {"n": 1, "a": 100, "b": 100}, "y": {"n": 1, "a": 0, "b": 100}}
    for verdicts in ({"a": "10", "b": "1"}, {"a": "1011"}):
        with pytest.raises(ValueError, match="verdicts on the same images, at most 3, got"): class_accuracies(verdicts, labels, "xy")


def test_answers_know_their_damage(job):
    for name in ("jat", "transfer", "surface", "curves", "claims"):
        answer = json.loads(json.dumps(run_suite(name, replace(job, x=job.x[:4], y=job.y[:4]))))
        check_answer(name, answer)
        key = {"jat": "rows", "claims": "rewarp", "curves": "flow"}.get(name, next(iter(answer)))
        with pytest.raises((KeyError, ValueError, TypeError)):
            check_answer(name, {k: v for k, v in answer.items() if k not in (key, "accuracy")})
    raw = run_suite("claims", replace(job, x=job.x[:4], y=job.y[:4]))
    with pytest.raises(ValueError, match="0 and 1"): check_answer("claims", raw | {"raw": {"FGSM": "01x1"}})
    with pytest.raises(ValueError, match="disagree"):
        check_answer("claims", raw | {"correct": raw["correct"] | {"Joint": "10101"}})


SHARED = """
import json, sys
from jat_nb.data import default_budget, load
from jat_nb.weights import pretrained
from jat_nb.processes import processes
from jat_nb.suites import Job, run_suite, suites

test, rank = load("digits", "test").subset(5), processes().rank
found = {}
ALIKE = ("srt-compound-cifar10", "srt-compound-mnist", "srt-mnist", "srt-strong-mnist", "srt-surface-mnist",
         "srt-norms-cifar10", "srt-norms-mnist", "srt-distances-cifar10", "srt-distances-mnist", "srt-once-mnist", "srt-starts-mnist", "srt-auto-mnist", "srt-auto-cifar10",
         "pareto-mnist", "pareto-caltech256", "pareto-strong-mnist", "pareto-strong-caltech256")  # attacks asked elsewhere
ALIKE += tuple(n for n in suites() if n.startswith("ijsat"))  # they need a flow: test_ijsat_paper
for name in (n for n in suites() if n not in ALIKE):
    small = name == "autoattack" or name.startswith("srt")  # grids are long
    n, steps = (4, 8) if name == "masking" else (2, 2) if small else (5, 2)
    network = "digits-natural" if name == "autoattack" else "digits-joint"  # the natural one is broken at once
    job = Job(pretrained(network), test.x[:n], test.labels[:n], default_budget("digits"), steps=steps, batch_size=3,
              sources={"natural-s0": pretrained("digits-natural")})
    found[name] = run_suite(name, job)
with open(f"{sys.argv[1]}.{rank}", "w") as file: json.dump(found, file)
"""


def together(tmp_path, count):
    "The answers of all suites in `count` processes."
    out = tmp_path / f"of{count}"
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable] if count == 1 else \
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", "29671"]
    script = tmp_path / "suites.py"
    script.write_text(SHARED)
    done = subprocess.run([*launch, str(script), str(out)], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((tmp_path / f"of{count}.{rank}").read_text()) for rank in range(count)]


def test_two_processes_answer_every_suite_as_one(tmp_path):
    [alone], (first, second) = together(tmp_path, 1), together(tmp_path, 2)
    left = {n for n in set(suites()) - set(alone) if not n.startswith("ijsat")}
    assert left == {n for n in suites() if n.startswith("srt") and n not in ("srt-cifar10", "srt-strong-cifar10", "srt-surface-cifar10", "srt-once-cifar10", "srt-starts-cifar10")
                    or n.startswith("pareto") and n.endswith(("mnist", "caltech256"))}
    assert first == second
    for name in alone:
        assert first[name].keys() == alone[name].keys(), name
        same(first[name], alone[name], name)


def same(a, b, where):
    "Equal, numbers to the last digits that another batch size may change."
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        searched = where.startswith("srt")  # how many passes a search takes depends on who shares them
        for key in a:
            if not (searched and "forward" in key): same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)): same(x, y, f"{where}/{i}")
    elif isinstance(a, float): assert a == pytest.approx(b, rel=1e-5, abs=1e-9), where
    else: assert a == b, where
