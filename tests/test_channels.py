"Images of two and four channels go the whole way: training, judging, attacking files, reporting."
import json

import numpy as np
import pytest
import torch
from PIL import Image

from jat_nb.data import Budget, ImageSet
from jat_nb.evaluation import clean, evaluate, pgd_at
from jat_nb.judging import open_run
from jat_nb.models import create
from jat_nb.own_pictures import attack_files
from jat_nb.recipes import Recipe
from jat_nb.reports import html_report
from jat_nb.results import read_runs
from jat_nb.training import fit

NAME, CLASSES = "wrn_10_1_cifar", ("dark", "bright")


def images(channels: int) -> ImageSet:
    "Noise of two brightnesses, 80 images."
    pixels = torch.randint(0, 256, (80, channels, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(80) % 2
    pixels[labels == 0] //= 2
    return ImageSet("own", pixels, labels, CLASSES)


@pytest.mark.parametrize("channels", [2, 4])
def test_from_training_to_pictures_and_report(channels, tmp_path):
    train, held_out = images(channels).split(20)
    model = create(NAME, num_classes=2, in_chans=channels, mean=train.mean, std=train.std)
    recipe = Recipe(objective="natural", epochs=1, batch_size=16, lr=0.05, model=NAME, amp=False, probe_options={"steps": 1})
    about = {"name": "own/noise", "tier": "smoke", "data": "own", "variant": "official", "seed": 0, "model": NAME,
             "classes": CLASSES, "shape": [channels, 16, 16]}
    fit(model, train, recipe, validation=held_out, out=tmp_path / "runs" / "a", about=about)
    facts, network = open_run(tmp_path / "runs" / "a", "last", "cpu")
    seen = evaluate(network, held_out.x, held_out.labels, {"Clean": clean, "PGD": pgd_at(8 / 255)})
    assert torch.equal(network(held_out.x), model(held_out.x))
    assert torch.equal(seen.correct[0], network(held_out.x).argmax(1) == held_out.labels)
    assert seen.n == 20 and not (seen.correct[1] & ~seen.correct[0]).any()

    (tmp_path / "pictures").mkdir()
    pixels = held_out.images[0].permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "pictures" / "a.png")
    attack_files(network, facts, tmp_path / "pictures", tmp_path / "out", attack="double_pass", steps=2, budget=Budget(8 / 255, 0.3))
    [row] = json.loads((tmp_path / "out" / "attack.json").read_text())["images"]
    made = np.asarray(Image.open(next((tmp_path / "out").glob("*-adv.png"))))
    assert made.shape == (16, 16, channels) and row["within_budget_before_rounding"]

    [run] = read_runs(tmp_path / "runs")
    assert run.usable and not run.problems
    assert "own/noise" in html_report([run], tmp_path / "page.html").read_text(encoding="utf-8")
