"Attacks that stand on a trained network: recipes name it, bind hands it over, suites and jobs bring it."
from functools import partial

import pytest
import torch
from torch import nn

from jat_nb.attacks import ATTACKS
from jat_nb.batches import Batch
from jat_nb.catalogue import _REGISTERED, Paper, adapt
from jat_nb.data import Budget
from jat_nb.glow import Glow
from jat_nb.joint_space import jsa, om_pgd
from jat_nb.objectives import networks, standing_on
from jat_nb.recipes import Recipe, bind
from jat_nb.suites import Job, Suite, attack_from, check_answer, networks_of, run_suite

JSA = {"attack": [["jsa", {"steps": 2, "eta": 0.05}]]}
LATENT = dict(objective="adversarial", attacks=JSA, needs={"flow": "x/glow"}, probe="pgd", epochs=2)


@pytest.fixture
def flow():
    glow = Glow((1, 8, 8), levels=2, steps=1, width=8)
    glow.initialise(torch.rand(16, 1, 8, 8))
    return glow.eval()


@pytest.fixture
def case():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), torch.rand(6, 1, 8, 8), torch.arange(6) % 4


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_bind_hands_the_flow_to_the_attack(flow, case):
    model, x, y = case
    bound = bind(Recipe(**LATENT), {"flow": flow})
    ours = bound.attacks["attack"](model, x, y, target=None, generator=seeded())
    assert torch.equal(ours, jsa(model, x, y, flow=flow, steps=2, eta=0.05, generator=seeded()))
    loss = bound.objective(model, Batch(x, y, seeded()), **bound.attacks)
    assert loss.isfinite() and all(p.grad is None for p in flow.parameters())


def test_a_flow_serves_objective_probe_and_a_chain_at_once(flow, case):
    model, x, y = case
    links = {"attack": [["om_pgd", {"steps": 1}], ["pgd", {"steps": 1}]]}
    r = Recipe(**LATENT | {"attacks": links, "probe": "om_pgd", "probe_options": {"steps": 1}})
    bound = bind(r, {"flow": flow})
    assert torch.equal(bound.probe(model, x, y, generator=seeded()), om_pgd(model, x, y, flow=flow, steps=1, generator=seeded()))
    assert (bound.attacks["attack"](model, x, y, generator=seeded()) != x).any()


@pytest.mark.parametrize("change, message", [
    (dict(needs={}), r"stand on the networks \['flow'\]"), (dict(needs={"flow": "x/glow", "teacher": "x/y"}), "stand on the networks"),
    (dict(attacks={"attack": [["pgd", {}]]}), "stand on the networks"),
    (dict(attacks={"attack": [["jsa", {"flow": 1}]]}), "takes eps_pixel"), (dict(needs={"flow": 3}), "expected needs")])
def test_what_a_recipe_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**LATENT | change)


def test_a_missing_network_is_named_with_its_command(case):
    with pytest.raises(ValueError, match="jat_train --recipe x/glow --out FOLDER and pass --needs flow=FOLDER"):
        bind(Recipe(**LATENT))
    with pytest.raises(ValueError, match="'jsa' stands on a trained network 'flow'.*--needs flow=FOLDER"):
        attack_from(("jsa", {}), {})


def test_a_tier_takes_fewer_steps_that_get_as_far():
    links = {"attack": [["jsa", {"steps": 20, "step_pixel": 0.001, "step_latent": 0.0005, "eps_pixel": 0.02, "eta": 0.02}]]}
    _REGISTERED["tiny"] = Paper("tiny", "Tiny", {"tiny/one": Recipe(**LATENT | {"attacks": links, "data": "digits"})})
    try:
        [[_, options]] = adapt(_REGISTERED["tiny"].recipes["tiny/one"], tier="cpu").attacks["attack"]
    finally:
        del _REGISTERED["tiny"]
    assert options["steps"] == 7
    assert options["step_pixel"] == pytest.approx(0.02 / 7) and options["step_latent"] == pytest.approx(0.01 / 7)


def test_suites_bring_the_flow(flow, case):
    model, x, y = case
    suite = Suite({"Clean": ("clean", {}), "JSA": ("jsa", {"eta": 0.1, "eps_pixel": "eps_pixel", "steps": "steps"}),
                   "either": [("pgd", {"steps": 1}), ("om_pgd", {"steps": 1})]})
    assert networks_of(suite) == ("flow",) and networks_of(Suite(also={"more": suite})) == ("flow",)
    job = Job(model, x, y, Budget(0.1, 0.3), steps=2)
    with pytest.raises(ValueError, match="none was given"):
        run_suite(suite, job)
    answer = run_suite(suite, Job(model, x, y, Budget(0.1, 0.3), steps=2, networks={"flow": flow}))
    check_answer(suite, answer)
    assert set(answer["correct"]) == {"Clean", "JSA", "either"}


def test_what_stands_on_nothing_is_handed_back_as_it_is():
    assert standing_on(ATTACKS["pgd"], {"flow": nn.Identity()}) is ATTACKS["pgd"]
    assert networks(ATTACKS["pgd"]) == () and networks(partial(jsa, steps=3)) == ("flow",)
    with pytest.raises(ValueError, match="flow=network"):
        standing_on(jsa, {"glow": nn.Identity()})
