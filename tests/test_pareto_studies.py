"Saliency, landscapes and displacement fields as suites: each kind answers, adds up, and notices damage."
import copy
import json
from dataclasses import replace

import pytest
import torch
from patients import quadrants
from torch import nn
from torch.testing import assert_close

from jat_nb.attacks import ATTACKS, ascend
from jat_nb.data import default_budget
from jat_nb.explain import curvature, saliency, skewness, smooth_grad, to_grey
from jat_nb.losses import cross_entropy
from jat_nb.papers.pareto_studies import TAUS, centres, displacements, geometry, stored_maps
from jat_nb.randomness import image_generators
from jat_nb.suites import Job, Suite, check_answer, run_suite
from jat_nb.threats import Affine, Flow, apply_chain

HERE = "jat_nb.papers.pareto_studies:"
SUITES = {
    "saliency": Suite(kind=HERE + "SALIENCY", options={"n": 6, "copies": 5, "shown": 3}),
    "landscape": Suite(kind=HERE + "LANDSCAPE", options={"n": 4, "points": 5}),
    "displacement": Suite(kind=HERE + "DISPLACEMENT", options={"n": 5, "smooth_steps": 15})}
PRICES = ["0", "0.01", "0.05", "0.2", "1"]


@pytest.fixture(scope="module")
def job():
    model, x, y = quadrants()
    torch.manual_seed(3)
    other = nn.Sequential(nn.Flatten(), nn.Linear(144, 4))
    return Job(model, x, y, default_budget("mnist"), sources={"natural-s0": other}, data="mnist", batch_size=7)


@pytest.fixture(scope="module")
def answers(job):
    return {name: run_suite(suite, job) for name, suite in SUITES.items()}


@pytest.mark.parametrize("name", SUITES)
def test_answers_are_json_whole_and_repeatable(job, answers, name):
    answer = answers[name]
    check_answer(SUITES[name], answer)
    assert json.loads(json.dumps(answer)) == answer
    again = run_suite(SUITES[name], replace(job, batch_size=50))
    torch.testing.assert_close(json_numbers(again), json_numbers(answer), rtol=1e-3, atol=1e-3)


def json_numbers(answer):
    "Every number of an answer, in order."
    if isinstance(answer, dict): return [v for part in answer.values() for v in json_numbers(part)]
    if isinstance(answer, list): return [v for part in answer for v in json_numbers(part)]
    return [] if isinstance(answer, str) else [float(answer)]


@pytest.mark.parametrize("name", SUITES)
def test_the_model_is_left_as_it_was(job, name):
    model = copy.deepcopy(job.model).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run_suite(SUITES[name], replace(job, model=model, sources={"itself": model}))
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_maps_are_compared_under_the_same_noise(job, answers):
    answer, [other] = answers["saliency"], job.sources.values()
    x, y = job.x[:6], job.y[:6]
    maps = [saliency(smooth_grad(m, x, y, n=5, generator=image_generators(0, range(6)))) for m in (job.model, other)]
    assert_close(answer["sources"]["natural-s0"]["skewness"], skewness(*maps).tolist(), rtol=1e-4, atol=1e-4)
    assert_close(stored_maps(answer), to_grey(maps[0])[:3, 0], atol=0.5 / 255 + 1e-4, rtol=0)
    itself = run_suite(SUITES["saliency"], replace(job, sources={"itself": job.model}))
    assert itself["sources"]["itself"]["skewness"] == [0.0] * 6 and itself["grain"] == answer["grain"]


def test_skewness_turns_its_sign_when_networks_change_places(job, answers):
    [other] = job.sources.values()
    turned = run_suite(SUITES["saliency"], replace(job, model=other, sources={"first": job.model}))
    assert_close(turned["sources"]["first"]["skewness"], [-v for v in answers["saliency"]["sources"]["natural-s0"]["skewness"]])


def test_maps_need_no_source(job):
    alone = run_suite(SUITES["saliency"], replace(job, sources={}))
    assert alone["sources"] == {} and len(alone["grain"]) == alone["n"] == 6


def test_an_image_answers_alike_among_fewer(job, answers):
    few = {"saliency": 2, "displacement": 2}
    for name, n in few.items():
        suite = replace(SUITES[name], options={**SUITES[name].options, "n": n})
        fewer = run_suite(suite, job)
        key = {"saliency": "grain", "displacement": "longest_px"}[name]
        one, many = (a[key] if name == "saliency" else a[key]["integrated"] for a in (fewer, answers[name]))
        assert_close(one, many[:n], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("data, channels, side, eps, step, steps", [
    ("mnist", 1, 28, 4.2, 0.14, 20), ("cifar10", 3, 32, 4.8, 0.016, 15), ("caltech256", 3, 224, 33.6, 0.00112, 15),
    ("digits", 1, 32, 4.8, 0.16, 20), ("", 3, 64, 9.6, 0.032, 15)])
def test_lengths_are_in_pixels_of_the_image_at_hand(data, channels, side, eps, step, steps):
    threats, found = geometry(torch.zeros(1, channels, side, side), data)
    [flow], [rt] = threats["flow"], threats["rt"]
    assert_close([flow.eps_flow, flow.step_flow], [eps, step])
    assert found == steps and flow.norm == "linf" and flow.padding == rt.padding == "zeros"
    assert rt.eps_affine == (0.3 if channels == 1 else 1.0)


def test_the_suite_attacks_as_the_attacks_by_name_do(job):
    x, y, (threats, steps) = job.x[:3], job.y[:3], geometry(job.x, "mnist")
    flow, rt = threats["integrated"]
    by_name = ATTACKS["integrated"](job.model, x, y, eps_flow=flow.eps_flow, step_flow=flow.step_flow, eps_affine=rt.eps_affine,
                                    step_affine=rt.step_affine, steps=steps)
    ours = ascend(job.model, x, y, threats["integrated"], steps=steps, schedule="simultaneous", random_start=False)
    assert torch.equal(by_name, ours)


def test_centres_have_the_deviations_they_say(job):
    x = torch.rand(40, 1, 28, 28)
    model, y, own = nn.Sequential(nn.Flatten(), nn.Linear(784, 4)), torch.zeros(40, dtype=torch.int64), image_generators(0, range(40))
    around = centres(model, x, y, [Flow(100.0, 0.5, "linf", padding="zeros"), Affine(100.0, 0.1)], 4, own)
    for place, shares in {"far": 0.5 * 4, "near": 0.1}.items():
        for p, step in zip(around[place], (0.5, 0.1)):
            assert abs(float(p.std()) / (shares * step) - 1) < 0.2
    assert all(p.flatten(1).norm(dim=1).min() > 0 for params in around.values() for p in params)


def test_the_middle_of_a_surface_is_the_loss_of_the_images(job, answers):
    x, y, (threats, steps) = job.x[:4], job.y[:4], geometry(job.x, "mnist")
    for attack in ("integrated", "rt"):
        around = centres(job.model, x, y, threats[attack], steps, image_generators(0, range(4)))
        for place, params in around.items():
            loss = cross_entropy(job.model(apply_chain(threats[attack], x, params)), y).mean().item()
            assert abs(answers["landscape"]["surfaces"][attack][place][2][2] - loss) < 1e-3
        assert around["end"][-1].abs().max() <= 0.3 * (1 + 1e-6)
        ends = answers["landscape"]["surfaces"][attack]
        assert ends["end"][2][2] > ends["near"][2][2]


def test_a_peak_in_the_middle_is_one_of_the_peaks(answers):
    answer = answers["landscape"]
    for attack in ("integrated", "rt"):
        for place in ("far", "near", "end"):
            peaks, middle = answer["maxima"][attack][place], answer["peak"][attack][place]
            assert all(a >= b for a, b in zip(peaks, middle)) and len(peaks) == 4
            told = torch.tensor(answer["curvature"][attack][place], dtype=torch.float64)
            assert_close(curvature(torch.tensor(answer["surfaces"][attack][place])), told, atol=1e-2, rtol=0)


def test_fields_add_up(job):
    x, y = job.x[:3], job.y[:3]
    flow, rt = geometry(x, "mnist")[0]["integrated"]
    found = ascend(job.model, x, y, [flow, rt], steps=4, schedule="simultaneous", random_start=False, return_info=True)
    field = displacements(found)
    assert_close(field, found.params[0] + rt.displacement(x, found.params[1]))
    assert_close(field.norm(dim=1).amax(dim=(1, 2)), found.displacement_px)
    warped = Flow(99.0, padding="zeros").apply(x, field)
    assert_close(warped.clamp(0, 1), found.x_adv)


def test_displacements_know_the_budget_and_the_verdicts(job, answers):
    answer = answers["displacement"]
    assert [f"{tau:g}" for tau in TAUS] == PRICES == list(answer["success"]) == list(answer["frequency"]["smooth"])
    flow, steps = geometry(job.x, "mnist")[0]["flow"][0], 20
    reach = min(flow.eps_flow, steps * flow.step_flow) * 2**0.5
    assert max(answer["longest_px"]["flow"]) <= reach * (1 + 1e-5)
    right = (job.model(job.x[:5]).argmax(1) == job.y[:5]).tolist()
    assert [c == "1" for c in answer["right"]] == right
    for fooled in answer["fooled"].values():
        assert all(r >= f for r, f in zip(answer["right"], fooled))
    still = [i for i, one in enumerate(right) if not one]
    assert all(answer["flow_loss"][tau][i] == 0 for tau in PRICES for i in still)  # wrong already: nothing moves


def test_a_flow_is_local_and_an_affine_map_is_not(answers):
    frequency = answers["displacement"]["frequency"]
    assert all(a > b for a, b in zip(frequency["flow"], frequency["rt"]))


@pytest.mark.filterwarnings("ignore:the model's answers look like probabilities")
def test_a_network_that_sees_nothing_has_an_answer(job):
    class Blind(nn.Module):
        def forward(self, x): return 0 * x.flatten(1)[:, :4] + torch.tensor([0.0, 1.0, 0.0, 0.0])
    blind = replace(job, model=Blind(), y=torch.full_like(job.y, 0), sources={})  # always wrong
    for name, suite in SUITES.items():
        answer = run_suite(suite, blind)
        check_answer(suite, answer)
    assert set(answer["right"]) == {"0"} and set(answer["success"].values()) == {0.0}


def damaged(answer, path, value):
    answer = copy.deepcopy(answer)
    place = answer
    for key in path[:-1]: place = place[key]
    place[path[-1]] = value(place[path[-1]])
    return answer


CUT, NAN, FAR = (lambda v: v[1:]), (lambda v: [float("nan")] * len(v)), (lambda v: [1e9] * len(v))


@pytest.mark.parametrize("name, path, value, message", [
    ("saliency", ["grain"], CUT, "expected 6 numbers"), ("saliency", ["grain"], FAR, "from 0 to 1"),
    ("saliency", ["sources", "natural-s0", "skewness"], NAN, "skewness against natural-s0"),
    ("saliency", ["shown", "maps", 0], lambda v: v[2:], "maps of 12 x 12"),
    ("saliency", ["shown", "maps", 0], lambda v: "zz" + v[2:], "hexadecimal"),
    ("landscape", ["points"], lambda v: v + 1, "5|6 x 6"), ("landscape", ["surfaces", "rt", "end", 2], FAR, "disagree"),
    ("landscape", ["surfaces", "rt", "far", 0], NAN, "surface of 5 x 5"), ("landscape", ["curvature", "integrated", "near"], FAR, "disagree"),
    ("landscape", ["maxima", "rt", "near"], CUT, "expected 4 numbers"), ("landscape", ["maxima", "rt", "near"], FAR, "from 0 to 9"),
    ("landscape", ["peak", "integrated", "end"], FAR, "from 0 to 1"),
    ("displacement", ["right"], CUT, "5 verdicts"), ("displacement", ["fooled", "1"], lambda v: "2" * len(v), "5 verdicts"),
    ("displacement", ["frequency", "rt"], FAR, "frequency of rt"), ("displacement", ["frequency", "smooth", "0.2"], CUT, "frequency of 0.2"),
    ("displacement", ["longest_px", "flow"], NAN, "longest_px of flow"), ("displacement", ["flow_loss", "1"], CUT, "flow loss at 1"),
    ("displacement", ["success", "0"], lambda v: v + 0.3, "success at 0")])
def test_damage_is_noticed(answers, name, path, value, message):
    with pytest.raises(ValueError, match=message):
        check_answer(SUITES[name], damaged(answers[name], path, value))


@pytest.mark.parametrize("name, key", [
    ("saliency", "grain"), ("saliency", "sources"), ("saliency", "shown"), ("landscape", "peak"), ("landscape", "curvature"),
    ("displacement", "fooled"), ("displacement", "frequency"), ("displacement", "success")])
def test_a_missing_part_is_noticed(answers, name, key):
    with pytest.raises(KeyError, match=key):
        check_answer(SUITES[name], {k: v for k, v in answers[name].items() if k != key})
