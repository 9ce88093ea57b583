"Probes for the log: what they write down, and that nothing else depends on them."
import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from jat_nb.attacks import pgd
from jat_nb.catalogue import adapt
from jat_nb.checkpoints import RESUME, claim, overfitting_gap, probe_curve, run_identity
from jat_nb.data import ImageSet
from jat_nb.recipes import Recipe, bind
from jat_nb.records import read_jsonl
from jat_nb.training import fit
from jat_nb.weights import read_tensors

WEAK, STRONG = ["pgd", {"steps": 1, "eps": 0.05}], ["pgd", {"steps": 5, "eps": 0.2, "step": 0.1}]
PLAIN = Recipe(objective="adversarial", attacks={"attack": [WEAK]}, epochs=3, batch_size=16, augment=(), probe="pgd",
               probe_options={"steps": 1}, probe_images=10)
PROBED = replace(PLAIN, probes={"strong": STRONG, "flow": ["ggsm", {"steps": 2}]})


def images(n=40):
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    x = torch.randint(0, 100, (n, 1, 8, 8), generator=g) + 50 * labels.view(-1, 1, 1, 1)
    return ImageSet("toy", x.to(torch.uint8), labels, ("a", "b", "c"))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(256, 3))


def run(recipe, **options):
    model = net()
    torch.manual_seed(7)
    rows = fit(model, images(), recipe, validation=images(20), **options)
    return model, rows, torch.rand(1)


def test_nothing_but_the_log_depends_on_probes():
    a, plain, after_plain = run(PLAIN)
    b, probed, after_probed = run(PROBED)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert torch.equal(after_plain, after_probed)
    without = ("seconds", "probes")
    assert [{k: v for k, v in r.items() if k not in without} for r in probed] == [{k: v for k, v in r.items() if k not in without} for r in plain]
    assert not any("probes" in row for row in plain) and all(set(row["probes"]) == {"strong", "flow"} for row in probed)
    assert all(0 <= v <= 1 for row in probed for v in row["probes"].values())


def test_a_probe_is_the_attack_on_the_first_images_held_out():
    few = images(20).subset(10)
    fixed = replace(PROBED, probes={"strong": ["pgd", {**STRONG[1], "random_start": False}]})
    model, rows, _ = run(fixed)
    found = pgd(model, few.x, few.labels, **fixed.probes["strong"][1])
    assert rows[-1]["probes"]["strong"] == (model(found).argmax(1) == few.labels).double().mean().item()


def test_probes_survive_a_kill_and_reach_the_files(tmp_path):
    _, whole, _ = run(PROBED)
    done = []
    while len(done) < 3:
        done = fit(net(), images(), PROBED, validation=images(20), out=tmp_path / "run", seconds=0)
    assert [row["probes"] for row in read_jsonl(tmp_path / "run" / "log.jsonl")] == [row["probes"] for row in whole]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]["probes"] == PROBED.probes


def test_probes_are_part_of_a_run_and_older_records_have_none(tmp_path):
    model, data = net(), images()
    identity = run_identity(PLAIN, model, data)
    older = json.loads(json.dumps(identity))
    del older["recipe"]["probes"]
    folder = claim(tmp_path / "old", older)
    claim(folder, identity)  # an older record, taken up by this version
    with pytest.raises(ValueError, match="probes was {}, is {'strong'"): claim(folder, run_identity(PROBED, model, data))
    fit(model, data, PROBED, validation=images(20), out=tmp_path / "new")
    assert "probes" in read_tensors(tmp_path / "new" / RESUME)[1]["recipe"]
    with pytest.raises(ValueError, match="probes was {'strong'"): fit(net(), data, PLAIN, validation=images(20), out=tmp_path / "new")


def test_an_older_recipe_has_no_probes():
    written = json.loads(json.dumps(asdict(PLAIN)))
    del written["probes"]
    assert Recipe.from_dict(written) == PLAIN and bind(PLAIN).probes == {}


@pytest.mark.parametrize("given, message", [
    ("pgd", "to be .attack, options."), (["pgd"], "attack, options"), ([["pgd", {}]], "attack, options"), (["pdg", {}], "unknown probe 'p': 'pdg'"),
    (["pgd", {"step": -1.0}], "step"), (["pgd", {"norm": "l3"}], "norm"), (["pgd", {"target": 1}], "takes eps"),
])
def test_probes_that_cannot_be_carried_out_are_refused(given, message):
    with pytest.raises(ValueError, match=message): replace(PLAIN, probes={"p": given})


def test_probes_follow_the_data_and_the_tier():
    published = replace(PLAIN, attacks={"attack": [["pgd", {}]]}, augment=("crop_flip",),
                        probes={"pgd": ["pgd", {"eps": 8 / 255, "step": 2 / 255, "steps": 50}]})
    home, small = adapt(published), adapt(published, "mnist", "smoke")
    assert home.probes == published.probes
    attack, options = small.probes["pgd"]
    assert attack == "pgd" and options["steps"] == 5 and options["eps"] > 0.2
    kept = adapt(replace(published, essential=("probes",)), "mnist", "smoke")
    assert kept.probes["pgd"][1]["steps"] == 50


def test_the_gap_of_robust_overfitting():
    rows = [{"epoch": e, "val_robust": v, "probes": {"pgd": p}} for e, (v, p) in enumerate([(0.2, 0.5), (0.4, 0.7), (0.3, 0.6)], 1)]
    assert probe_curve(rows, "pgd") == [0.5, 0.7, 0.6] and overfitting_gap(rows[:2], "pgd") == 0
    assert overfitting_gap(rows) == pytest.approx(0.1) and overfitting_gap(rows, "pgd") == pytest.approx(0.1)
    with pytest.raises(ValueError, match="epoch 1 was not probed with 'jsa'"): overfitting_gap(rows, "jsa")
