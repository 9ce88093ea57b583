"Runs that `fit` made in Python go through the commands: own objective, own attack, own pictures of many sizes."
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_training import NATURAL, images
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor

from jat_nb.ascent import logits_of
from jat_nb.checkpoints import shortfall
from jat_nb.cli import jat_attack, jat_eval, jat_report, jat_train
from jat_nb.data import load
from jat_nb.judging import judge, unfinished
from jat_nb.losses import cross_entropy
from jat_nb.models import create
from jat_nb.recipes import Recipe
from jat_nb.records import Record
from jat_nb.results import read_runs
from jat_nb.training import fit
from jat_nb.weights import load_weights, read_tensors, write_tensors

ONE = replace(NATURAL, epochs=1, milestones=())
RECIPE = Recipe(epochs=1, batch_size=8, augment=(), lr=0.01)


def half(model, batch, attack):
    "Every other image attacked."
    x = batch.x.clone()
    x[::2] = attack(model, x[::2], batch.y[::2])
    return cross_entropy(logits_of(model, x), batch.y).mean()


def fog(model, x, y):  # no keyword at all: `half` hands over none
    return x + 0.3 * (1 - x)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "A folder of two classes in pictures of many sizes, and a run on it that was made in Python."
    root, rng = tmp_path_factory.mktemp("python"), np.random.default_rng(0)
    for split, n in (("train", 12), ("test", 4)):
        for k, name in enumerate(("lily", "rose")):
            (root / "set" / split / name).mkdir(parents=True)
            for i in range(n):
                shape = (*rng.integers(20, 40, 2), 3)
                Image.fromarray(rng.integers(0, 120, shape, dtype=np.uint8) + np.uint8(130 * k)).save(root / "set" / split / name / f"{i}.png")
    train = load(f"folder:{root / 'set'}", size=(20, 16))
    fit(create("test_resnet", num_classes=2), train, RECIPE, objective=half, attacks={"attack": fog}, out=root / "runs" / "mine")
    return root


def test_an_own_objective_and_attack_go_from_training_to_the_page(root, tmp_path, capsys):
    run = root / "runs" / "mine"
    assert jat_eval(f"{run} --suite jat --n 8 --steps 1 --threads 1 --per-class".split()) == 0
    network, test = load_weights(run / "last.safetensors"), load(f"folder:{root / 'set'}", "test", size=(20, 16))
    right = (network(test.subset(8).x).argmax(1) == test.subset(8).labels).tolist()
    assert Record.load(run / "eval-jat.json").metrics["correct"]["Clean"] == "".join("01"[r] for r in right)
    assert jat_attack(f"{run} --images {root}/set/test --steps 1 --out {tmp_path}/pics --threads 1".split()) == 0
    assert "8 pictures, labelled by their folders" in capsys.readouterr().out
    assert Image.open(next((tmp_path / "pics").glob("*-adv.png"))).size == (16, 20)
    assert jat_report([str(root / "runs"), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    [found] = read_runs(root / "runs")
    assert found.usable and found.name == "own/mine" and "own/mine" in page and "Set aside" not in page


def test_the_record_says_what_was_trained_on_what(root):
    facts = json.loads((root / "runs" / "mine" / "run.json").read_text())
    data = f"folder:{root / 'set'}"
    assert facts["about"] == {"name": "own/mine", "tier": "paper", "seed": 0, "model": "test_resnet", "data": data, "resized": [20, 16],
                              "variant": "folder, 20 x 16 px", "classes": ["lily", "rose"], "shape": [3, 20, 16]}
    assert (facts["recipe"]["data"], facts["recipe"]["model"]) == (data, "test_resnet")
    assert facts["own"] == {"objective": "test_own_runs:half", "attacks['attack']": "test_own_runs:fog"}


def test_what_a_caller_says_is_left_as_it_is(tmp_path):
    said = {"name": "jat/natural", "tier": "cpu", "data": "digits", "variant": "upscaled"}
    fit(create("wrn_10_1_cifar", in_chans=1, num_classes=3, norm="group"), images(), ONE, out=tmp_path / "a", about=said)
    facts = json.loads((tmp_path / "a" / "run.json").read_text())
    assert facts["about"] == said | {"seed": 0, "model": "wrn_10_1_cifar"}
    assert (facts["recipe"]["data"], facts["recipe"]["model_options"]) == (images().name, {"norm": "group"})
    assert jat_train(f"--recipe jat/natural --data digits --tier smoke --threads 1 --images 16 --set epochs=1 --out {tmp_path}/b".split()) == 0
    facts = json.loads((tmp_path / "b" / "run.json").read_text())
    assert set(facts["about"]) == {"name", "tier", "data", "variant", "seed", "model", "changes", "classes", "shape", "images"}
    assert (facts["recipe"]["data"], facts["recipe"]["model"]) == ("digits", facts["about"]["model"])


def test_a_run_whose_record_repeats_the_defaults_of_a_recipe_goes_on(tmp_path):
    "As this package wrote them before: data and network of the recipe, whatever was trained on what."
    data, model = images(), lambda: create("wrn_10_1_cifar", in_chans=1, num_classes=3)
    fit(model(), data, NATURAL, out=tmp_path, seconds=0)
    old = {"data": "cifar10", "model": "wrn_28_10_cifar", "model_options": {}}
    facts = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(facts | {"recipe": facts["recipe"] | old, "about": {}}))
    tensors, state = read_tensors(tmp_path / "resume.safetensors")
    write_tensors(tmp_path / "resume.safetensors", tensors, state | {"recipe": state["recipe"] | old})
    assert len(fit(model(), data, NATURAL, out=tmp_path)) == NATURAL.epochs
    with pytest.raises(ValueError, match="train was"): fit(model(), replace(data, name="others"), NATURAL, out=tmp_path)
    with pytest.raises(ValueError, match="model was"): fit(create("wrn_10_2_cifar", in_chans=1, num_classes=3), data, NATURAL, out=tmp_path)


def test_a_run_on_a_stream_is_judged_by_its_weights(root, tmp_path, capsys):
    pictures = ImageFolder(root / "set" / "train", Compose([Resize(16), CenterCrop(16), ToTensor()]))
    for name in ("one", "two"):
        fit(create("test_resnet", num_classes=2), DataLoader(pictures, 8), RECIPE, out=tmp_path / name)
    facts = json.loads((tmp_path / "one" / "run.json").read_text())
    assert "data" not in facts["about"] and facts["recipe"]["data"] == "stream"
    for command, words in ((jat_eval, ""), (jat_attack, f"--images {root}/set/test --out {tmp_path}/pics")):
        assert command(f"{tmp_path}/one {words}".split()) == 2
        assert f"jat_eval --weights {tmp_path}/one/last.safetensors --data NAME --out FOLDER" in capsys.readouterr().err
    for name in ("one", "two"):
        words = f"--weights {tmp_path}/{name}/last.safetensors --data folder:{root}/set --size 16 --out {tmp_path}/judged/{name}"
        assert jat_eval(f"{words} --suite jat --n 8 --steps 1 --threads 1".split()) == 0
    assert [(run.name, run.usable) for run in read_runs(tmp_path / "judged")] == [("own/one", True), ("own/two", True)]


def test_images_that_no_name_finds_again_are_named(tmp_path):
    fit(create("wrn_10_1_cifar", in_chans=1, num_classes=3), images(), ONE, out=tmp_path / "toy")
    with pytest.raises(ValueError, match=r"no data set is named .*: .*jat_eval --weights .*last.safetensors --data NAME"):
        judge(tmp_path / "toy", "jat", n=4, steps=1)


def test_a_run_that_was_stopped_early_is_whole(tmp_path):
    fit(create("wrn_10_1_cifar", in_chans=1, num_classes=3), images(), NATURAL, out=tmp_path, on_epoch=lambda row, network: True)
    assert unfinished(tmp_path) == "" and shortfall({"epochs": 3}, [{"epoch": 1}]) == "1 of 3 epochs"


def test_steps_that_a_suite_does_not_read_are_refused(root, tmp_path, capsys):
    run = shutil.copytree(root / "runs" / "mine", tmp_path / "mine", ignore=shutil.ignore_patterns("eval-*"))
    for suite in ("autoattack", "srt-once-cifar10", "pareto-cifar10"):
        assert jat_eval(f"{run} --suite {suite} --n 2 --steps 3 --threads 1".split()) == 2
        assert f"the suite '{suite}' sets the steps of its attacks itself" in capsys.readouterr().err
        with pytest.raises(ValueError, match="steps=3 would change nothing: leave it out"): judge(run, suite, n=2, steps=3)
        assert not list(run.glob("eval-*"))
    assert jat_eval(f"{run} --suite autoattack --n 2 --steps 20 --threads 1".split()) == 0, "what a report repeats"
    assert judge(run, "autoattack", n=2)[1] is False


def test_another_question_needs_again(root, tmp_path, capsys):
    run = shutil.copytree(root / "runs" / "mine", tmp_path / "mine", ignore=shutil.ignore_patterns("eval-*"))
    words = f"{run} --suite jat --threads 1".split()
    assert jat_eval([*words, "--n", "4", "--steps", "2"]) == 0
    before = (run / "eval-jat.json").read_bytes()
    for more, said in (("--n 2 --steps 1", "n was 4, is 2; steps was 2, is 1"), ("--n 8 --steps 1", "n was 4, is 8; steps was 2, is 1"),
                       ("--n 4 --steps 2 --seed 3", "seed was 0, is 3"), ("--n 4 --steps 2 --eps-pixel 2", "budget was"),
                       ("--n 4 --steps 2 --fast", "fast was False, is True")):
        capsys.readouterr()
        assert jat_eval([*words, *more.split()]) == 2
        told = capsys.readouterr().err
        assert f"({said}" in told and "--again" in told and (run / "eval-jat.json").read_bytes() == before
    assert jat_eval([*words, *"--n 2 --steps 2".split()]) == 0 and (run / "eval-jat.json").read_bytes() == before
    assert jat_eval([*words, *"--n 6 --steps 2".split()]) == 0 and Record.load(run / "eval-jat.json").metrics["n"] == 6
    assert jat_eval([*words, *"--n 2 --steps 1 --again".split()]) == 0 and Record.load(run / "eval-jat.json").config["steps"] == 1


def test_the_normalisation_that_is_taken_is_said(root, tmp_path, capsys):
    torch.save(create("test_resnet", num_classes=2).model.state_dict(), tmp_path / "mine.pth")
    own = f"--model test_resnet --data folder:{root}/set --size 32"
    train = f"--recipe jat/natural {own} --init {tmp_path}/mine.pth --tier smoke --threads 1 --set epochs=1 batch_size=8 lr=0.001 amp=false"
    judged = f"--weights {tmp_path}/mine.pth {own} --suite jat --n 4 --steps 1 --threads 1"
    attack = f"--weights {tmp_path}/mine.pth {own} --images {root}/set/test --steps 1 --threads 1"
    for i, (command, words) in enumerate(((jat_train, train), (jat_eval, judged), (jat_attack, attack))):
        assert command(f"{words} --out {tmp_path}/{i}".split()) == 0
        assert "mean 0.5 0.5 0.5 and std 0.5 0.5 0.5" in capsys.readouterr().out
        assert command(f"{words} --mean 0.4 0.4 0.4 --std 0.3 0.3 0.3 --out {tmp_path}/{i}0".split()) == 0
        assert "normalised" not in capsys.readouterr().out
    words = f"--weights {root}/runs/mine/last.safetensors --data folder:{root}/set --size 16 --suite jat --n 4 --steps 1"
    assert jat_eval(f"{words} --out {tmp_path}/ours --threads 1".split()) == 0 and "normalised" not in capsys.readouterr().out


@pytest.mark.parametrize("command", [jat_eval, jat_attack, "weights", "save"])
def test_a_place_that_cannot_be_written_is_refused_first(root, tmp_path, monkeypatch, capsys, command):
    import jat_nb.judging as judging
    asked = []
    for module, name in ((judging, "load_weights"), (judging, "open_weights"), (judging, "load")):
        monkeypatch.setattr(module, name, lambda *a, **o: asked.append(name) or 1 / 0)
    (tmp_path / "file").write_text("")
    run, last, out = root / "runs" / "mine", root / "runs" / "mine" / "last.safetensors", tmp_path / "file" / "out"
    if command is jat_eval:  # the answer goes into the run's folder
        def refuse(folder): raise ValueError(f"cannot write in {folder} (planted): choose another folder")
        import jat_nb.cli as cli
        monkeypatch.setattr(cli, "check_writable", refuse), monkeypatch.setattr(judging, "check_writable", refuse)
        status = jat_eval([str(run), "--suite", "jat"])
    elif command is jat_attack: status = jat_attack(f"{run} --images {root}/set/test --out {out}".split())
    elif command == "save": status = jat_attack(f"{run} --images {root}/set/test --out {tmp_path}/o --save {out}/a.safetensors".split())
    else: status = jat_eval(f"--weights {last} --data folder:{root}/set --size 16 --out {out}".split())
    assert status == 2 and "cannot write in" in capsys.readouterr().err and not asked
