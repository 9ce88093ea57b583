"Suites: the same questions for every network, with answers that add up."
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from jat_nb.attacks import fgsm
from jat_nb.data import default_budget, load
from jat_nb.evaluation import evaluate
from jat_nb.models import pretrained
from jat_nb.randomness import image_generators
from jat_nb.suites import SUITES, Job, bits, run_suite, with_bits


@pytest.fixture(scope="module")
def job():
    test = load("digits", "test").subset(12)
    return Job(pretrained("digits-joint"), test.x, test.labels, default_budget("digits"), steps=2, batch_size=8,
               sources={"natural-s0": pretrained("digits-natural")})


@pytest.mark.parametrize("name", ["jat", "stronger", "transfer", "claims"])
def test_answers_are_json_and_repeatable(job, name):
    answer = run_suite(name, job)
    assert json.loads(json.dumps(answer)) == answer == run_suite(name, job)


def test_masking_and_autoattack_answer(job):
    few = replace(job, x=job.x[:4], y=job.y[:4], steps=8)
    answer = run_suite("masking", few)
    assert json.loads(json.dumps(answer)) == answer and len(answer["rows"]) == 6
    assert set(SUITES) == {"jat", "autoattack", "stronger", "curves", "surface", "transfer", "masking", "claims"}
    answer = run_suite("autoattack", replace(job, x=job.x[:2], y=(job.y[:2] + 1) % 10))  # wrong already: nothing to attack
    assert answer["correct"] == {"Clean": "00", "AutoAttack": "00"}


def test_columns_and_their_bits(job):
    answer = run_suite("jat", job)
    assert list(answer["correct"]) == ["Clean", "FGSM", "PGD2", "PGD10", "Spatial", "Joint", "Joint PS"]
    for name, row in answer["correct"].items():
        assert len(row) == 12 and abs(100 * row.count("1") / 12 - answer["rows"][name]["accuracy (%)"]) < 1e-9
    single = evaluate(job.model, job.x, job.y, {"FGSM": partial(fgsm, eps=job.budget.eps_pixel)}).correct[0]
    assert bits(single) == answer["correct"]["FGSM"]


def test_curves_start_clean_and_share_their_points(job):
    answer = run_suite("curves", job)
    clean = (job.model(job.x).argmax(1) == job.y).double().mean().item()
    assert answer["pixel"]["accuracy"][0] == answer["flow"]["accuracy"][0] == clean
    assert_close(answer["pixel"]["budgets"][4], job.budget.eps_pixel)
    assert_close(answer["flow"]["budgets"][3], job.budget.eps_flow)
    assert all(len(c["correct"]) == 11 and len(c["correct"][0]) == 12 for c in (answer["pixel"], answer["flow"]))
    assert answer["flow_steps"]["2"] == answer["flow"]


def test_raw_accuracy_counts_images_that_are_wrong_without_attack(job):
    raw = run_suite("claims", job)["raw"]["FGSM"]
    x_adv = fgsm(job.model, job.x, job.y, eps=job.budget.eps_pixel, generator=image_generators(0, range(12)))
    assert raw == bits(job.model(x_adv).argmax(1) == job.y)


def test_rewarping_blurs(job):
    found = run_suite("claims", job)["rewarp"]
    energy = {k: sum(v) for k, v in found["energy"].items()}
    assert energy["rewarped"] < energy["accumulated"] and found["longest_px"] <= job.budget.eps_flow * (1 + 1e-6)


def test_surface_corner_and_bits(job):
    answer = run_suite("surface", job)
    assert len(answer["accuracy"]) == 5 and len(answer["accuracy"][0]) == 5
    assert answer["accuracy"][0][0] == (job.model(job.x).argmax(1) == job.y).double().mean().item()
    assert with_bits(evaluate(job.model, job.x, job.y, {"a": lambda m, x, y, **_: x}))["correct"]["a"] == \
        bits(job.model(job.x).argmax(1) == job.y)


def test_refusals(job):
    with pytest.raises(ValueError, match="choose one of"): run_suite("none", job)
    with pytest.raises(ValueError, match="give it sources"): run_suite("transfer", replace(job, sources={}))
