"What people bring to the commands: weights, pictures and names of their own; and damage that costs nothing else."
import html
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors import safe_open

import jat_nb
from jat_nb.catalogue import recipes
from jat_nb.cli import jat_attack, jat_eval, jat_report, jat_train
from jat_nb.data import load
from jat_nb.differences import class_accuracies
from jat_nb.models import create
from jat_nb.records import Record
from jat_nb.results import read_runs
from jat_nb.weights import load_weights, pretrained, read_tensors, save_weights

OWN = pretrained("digits-joint")
FORM = f"--model {OWN.metadata['name']} --mean {OWN.metadata['mean'][0]} --std {OWN.metadata['std'][0]}"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "A folder of pictures of many sizes, a run on it, and a state_dict for digits."
    root = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(5)
    for split, n in (("train", 16), ("test", 5)):
        for k, name in enumerate(("reed", "rush")):
            (root / "set" / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 90, (*rng.integers(14, 50, 2), 3), dtype=np.uint8)
                pixels[..., k] += 120
                Image.fromarray(pixels).save(root / "set" / split / name / f"{i}.png")
    torch.save({"state_dict": {f"module.{k}": v for k, v in OWN.model.state_dict().items()}}, root / "theirs.pth")
    words = f"--recipe jat/natural --data folder:{root}/set --size 20 12 --tier smoke --threads 1 --out {root}/runs/folder"
    assert jat_train([*words.split(), "--set", "epochs=2", "batch_size=8"]) == 0
    return root


def test_pictures_of_many_sizes_go_from_training_to_the_page(own, tmp_path, capsys):
    run = own / "runs" / "folder"
    about = json.loads((run / "run.json").read_text())["about"]
    assert (about["shape"], about["resized"]) == ([3, 20, 12], [20, 12])
    assert jat_eval(f"{run} --n 8 --steps 1 --threads 1 --per-class".split()) == 0
    assert re.search(r"^reed +\d", capsys.readouterr().out, re.M)
    assert jat_attack(f"{run} --images {own}/set/test --steps 1 --out {tmp_path}/pics --threads 1".split()) == 0
    assert Image.open(next((tmp_path / "pics").glob("*-adv.png"))).size == (12, 20)
    assert jat_report([str(run), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "--size 20 12" in page and "every class, jat" in page and "rush" in page


def test_the_message_about_sizes_names_an_option_that_exists(own, tmp_path, capsys):
    words = f"--recipe jat/natural --data folder:{own}/set --tier smoke --out {tmp_path}/x".split()
    assert jat_train(words) == 2
    said = capsys.readouterr().err
    assert "--size SIDE" in said and not (tmp_path / "x" / "run.json").exists()
    with pytest.raises(SystemExit): jat_train(["--help"])
    assert {"--size", "--download", "--init"} <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


@pytest.mark.parametrize("module", ["data", "checkpoints", "catalogue", "judging", "cli", "suites", "recipes", "training"])
def test_options_that_messages_name_exist(module, capsys):
    text = (ROOT / "jat_nb" / f"{module}.py").read_text()
    named = {w for w in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)}
    known = set()
    for command in (jat_train, jat_eval, jat_attack, jat_report):
        with pytest.raises(SystemExit): command(["--help"])
        known |= set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    assert named - known <= {"--no-fast", "--show-toplevel", "--nproc-per-node", "--no-python"}


def test_an_empty_folder_name_is_no_folder(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where an empty name would lead
    words = ["--weights", f"{own}/theirs.pth", *FORM.split(), "--data", "digits", "--suite", "jat", "--n", "4", "--out", ""]
    assert jat_eval(words) == 2 and "--out FOLDER" in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_weights_from_elsewhere_are_judged_attacked_and_reported(own, tmp_path, capsys):
    words = f"--weights {own}/theirs.pth {FORM} --data digits --out {tmp_path}/runs/theirs --suite jat --n 20 --steps 1 --threads 1"
    assert jat_eval(words.split()) == 0
    record = Record.load(tmp_path / "runs" / "theirs" / "eval-jat.json")
    test = load("digits", "test").subset(20)
    right = (OWN(test.x).argmax(1) == test.labels).tolist()
    assert record.metrics["correct"]["Clean"] == "".join("01"[r] for r in right)
    assert sum(row["n"] for row in record.metrics["by_class"].values()) == 20
    assert jat_eval(words.split()) == 0 and "already there" in capsys.readouterr().out
    [run] = read_runs(tmp_path / "runs")
    assert run.usable and run.name == "own/theirs" and not run.problems
    assert jat_report([str(tmp_path / "runs"), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "own/theirs" in page and f"jat_eval --weights theirs.pth --model {OWN.metadata['name']}" in page
    told = html.unescape(re.search(r"jat_eval (--weights theirs.pth [^<\n]*)", page)[1])  # the page's own command, given again
    told = told.replace("theirs.pth", f"{own}/theirs.pth").replace("runs/theirs", str(tmp_path / "runs" / "theirs"))
    assert jat_eval(shlex.split(told)) == 0 and "already there" in capsys.readouterr().out
    assert jat_eval(words.replace("/theirs ", "/theirs --again ").replace(f"{FORM}", f"--model {OWN.metadata['name']}").split()) == 2
    assert "holds another run" in capsys.readouterr().err


def test_the_command_of_a_file_that_names_its_network_names_none(own, tmp_path):
    save_weights(OWN, tmp_path / "ours.safetensors")
    words = f"--weights {tmp_path}/ours.safetensors --data digits --out {tmp_path}/run --suite jat --n 4 --steps 1 --threads 1"
    assert jat_eval(words.split()) == 0
    assert jat_report([str(tmp_path / "run"), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "jat_eval --weights ours.safetensors --data digits" in page and "--model" not in page


@pytest.mark.parametrize("words, seen", [
    ("--weights {own}/theirs.pth --data digits --out {x}", "--model NAME"), ("--weights {own}/theirs.pth {form} --data digits", "--out FOLDER"),
    ("--weights {own}/none.pth {form}", "there is no file"), ("--model resnet18 {own}/runs", "pass them with --weights FILE"),
    ("", "pass the folders of runs"), ("--weights {own}/theirs.pth {form} --data folder:{own}/set --size 8 --out {x}", "2 and 3"),
    ("--weights {own}/theirs.pth {form} --data digits --classes 7 --out {x}", "has 10 classes, not 7"),
    ("--weights {own}/theirs.pth {form} --data digits --size 1 2 3 --out {x}", "got 3 numbers"),
    ("--weights {own}/theirs.pth {form} --data digits --out {x} {own}/runs", "and no runs")])
def test_what_is_missing_beside_weights_is_said(own, tmp_path, capsys, words, seen):
    assert jat_eval(words.format(own=own, form=FORM, x=tmp_path / "x").split()) == 2
    said = capsys.readouterr().err
    assert seen in said and said.count("\n") == 1


def scans(folder, n=9, labelled=True):
    test = load("digits", "test").subset(n)
    for i, (image, label) in enumerate(zip(test.images, test.labels)):
        place = folder / (str(int(label)) if labelled else "mixed")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(place / f"{i}.png")


def test_attacked_sets_are_read_in_two_lines(own, tmp_path, capsys):
    scans(tmp_path / "in")
    words = f"--weights {own}/theirs.pth {FORM} --size 32 --images {tmp_path}/in --out {tmp_path}/out --attack pgd --eps-pixel 12"
    assert jat_attack(f"{words} --steps 3 --save {tmp_path}/set.safetensors --threads 1".split()) == 0
    with safe_open(tmp_path / "set.safetensors", "pt") as file: found, facts = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()
    facts, y = json.loads(facts["jat_nb"]), found["labels"]
    assert facts["budget"]["eps_pixel"] == 12 / 255 and facts["attack"] == "pgd" and len(facts["files"]) == 9
    assert (found["adversarial"] - found["clean"]).abs().max() <= 12 / 255 + 1e-6 and found["within_budget"].all()
    before, after = OWN(found["clean"]).argmax(1), OWN(found["adversarial"]).argmax(1)
    assert torch.equal(found["answer_clean"], before) and torch.equal(found["answer_adversarial"], after)
    assert torch.equal(found["fooled"], (before == y) & (after != y))


@pytest.mark.parametrize("labelled", [True, False])
def test_what_was_wrong_before_is_no_success(own, tmp_path, capsys, labelled):
    scans(tmp_path / "in", 12, labelled)
    torch.manual_seed(1)
    torch.save(create("small_cnn_mnist", in_chans=1).model.state_dict(), tmp_path / "raw.pth")  # knows nothing
    words = f"--weights {tmp_path}/raw.pth --model small_cnn_mnist --size 32 --images {tmp_path}/in --out {tmp_path}/out"
    assert jat_attack(f"{words} --eps-pixel 0 --eps-flow 0 --steps 1 --threads 1".split()) == 0  # an attack that does nothing
    said, rows = capsys.readouterr().out, json.loads((tmp_path / "out" / "attack.json").read_text())["images"]
    wrong = sum(row["before"] != row["label"] for row in rows)
    assert f"{wrong} wrong before the attack, 0 fooled" in said and f"{12 - wrong} withstood" in said
    assert (wrong > 4 and "their folders" in said) if labelled else (wrong == 0 and "the network itself" in said)


def test_results_are_kept_apart_from_the_pictures(own, tmp_path, capsys):
    scans(tmp_path / "in", 3)
    for out in ("in", "in/out", "in/8/../new"):
        assert jat_attack(f"{own}/runs/folder --images {tmp_path}/in --out {tmp_path}/{out}".split()) == 2
        assert "choose a folder beside it" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("no picture")
    for images, seen in (("notes.txt", "notes.txt is no picture"), ("nowhere", "no file or folder")):
        assert jat_attack(f"{own}/runs/folder --images {tmp_path}/{images} --out {tmp_path}/out".split()) == 2
        assert seen in capsys.readouterr().err


def test_bad_names_lose_nothing(own, tmp_path):
    scans(tmp_path / "in", 1, labelled=False)
    one = next((tmp_path / "in" / "mixed").iterdir())
    names = ["n" * 230 + ".png", "ü" * 120 + ".png", "50% {x} 'q'.png"]
    for name in names: shutil.copy(one, one.with_name(name))
    shutil.copy(one, os.fsencode(one.parent) + b"/latin-\xfc.png")
    assert jat_attack(f"{own}/runs/folder --images {tmp_path}/in --steps 1 --out {tmp_path}/out --threads 1".split()) == 0
    assert len(list((tmp_path / "out").glob("*-adv.png"))) == 5


def test_a_damaged_run_costs_no_other(own, tmp_path, capsys):
    shutil.copytree(own / "runs" / "folder", tmp_path / "good")
    for name, file, text in (("a", "log.jsonl", '{"epoch": \n'), ("b", "run.json", "[]"), ("c", "run.json", '{"about": 5}'), ("d", "log.jsonl", "7\n")):
        shutil.copytree(own / "runs" / "folder", tmp_path / name)
        (tmp_path / name / file).write_text(text)
    assert jat_eval(f"{tmp_path} --n 4 --steps 1 --threads 1".split()) == 0
    said = capsys.readouterr().out
    assert said.count("passed over") == 4 and (tmp_path / "good" / "eval-jat.json").exists()


@pytest.mark.parametrize("spoil", [
    lambda r: r["config"].pop("n"), lambda r: r.update(config=None), lambda r: r.update(config=[1]), lambda r: r.update(metrics={}),
    lambda r: r["metrics"].update(correct={"Clean": "1"}), lambda r: r.update(tier="none"), lambda r: r["config"].update(n="many")])
def test_a_damaged_record_counts_as_absent(own, tmp_path, capsys, spoil):
    run = shutil.copytree(own / "runs" / "folder", tmp_path / "run", ignore=shutil.ignore_patterns("eval-*"))
    words = f"{run} --n 4 --steps 1 --threads 1".split()
    assert jat_eval(words) == 0
    record = json.loads((run / "eval-jat.json").read_text())
    spoil(record)
    (run / "eval-jat.json").write_text(json.dumps(record))
    assert jat_eval(words) == 0 and "already there" not in capsys.readouterr().out
    (run / "eval-jat.json").unlink(), (run / "eval-jat.json").mkdir()
    assert jat_eval(words) == 2 and "is a folder" in capsys.readouterr().err


def test_budgets_of_ones_own_are_another_question(own, tmp_path, capsys):
    run = shutil.copytree(own / "runs" / "folder", tmp_path / "run", ignore=shutil.ignore_patterns("eval-*"))
    words = f"{run} --n 4 --steps 1 --threads 1".split()
    for more in ([], ["--eps-pixel", "3"], ["--eps-pixel", "3", "--eps-flow", "0.7"]):
        assert not more or jat_eval([*words, *more]) == 2 and "budget was" in capsys.readouterr().err
        assert jat_eval([*words, *more, "--again"]) == 0 and "already there" not in capsys.readouterr().out
    assert Record.load(run / "eval-jat.json").config["budget"] == {"eps_pixel": 3 / 255, "eps_flow": 0.7}
    assert jat_report([str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert "--eps-pixel 3 --eps-flow 0.7" in (tmp_path / "page.html").read_text()


def test_several_runs_are_refused_before_the_first_starts(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "jat-natural-s1").write_text("a file in the place of the second run")
    words = f"--data digits --tier smoke --threads 1 --out {tmp_path}/out".split()
    assert jat_train(["--recipe", "jat/natural", "--seed", "0", "1", *words]) == 2 and "cannot write" in capsys.readouterr().err
    standing = next(name for name, r in recipes().items() if r.needs)
    assert jat_train(["--recipe", "jat/natural", standing, *words]) == 2
    assert "--needs" in capsys.readouterr().err and not list((tmp_path / "out").glob("*/log.jsonl"))


def test_home_and_relative_paths(own, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path)), monkeypatch.chdir(own)
    words = "--recipe jat/natural --data folder:set --size 8 --tier smoke --threads 1 --out=~/run --set epochs=1".split()
    assert jat_train(words) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["about"]["data"] == f"folder:{own}/set"
    monkeypatch.chdir(tmp_path)
    assert jat_eval(["~/run", "--n", "4", "--steps", "1", "--threads", "1"]) == 0
    assert jat_attack([f"--images={own}/set/test", "--out=~/pics", "--save=~/set.safetensors", "--steps=1", "~/run"]) == 0
    assert jat_report(["~/run", "--out=~/page.html"]) == 0 and jat_report(runs="~/run", out="~/other.html") == 0
    assert {"run", "pics", "set.safetensors", "page.html", "other.html"} <= {p.name for p in tmp_path.iterdir()} and not (tmp_path / "~").exists()


def test_columns_of_the_list_never_touch(capsys):
    assert jat_train(["--list"]) == 0
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("  ") and "table " in line:
            assert re.search(r"\s{2,}table \d", line), line


def test_python_is_a_way_in(tmp_path):
    def call(*words):
        done = subprocess.run([sys.executable, "-m", "jat_nb", *words], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        return done.returncode, done.stdout, done.stderr
    assert call("--version")[:2] == (0, f"jat_nb {jat_nb.__version__}\n")
    status, said, _ = call("--help")
    assert status == 0 and all(name in said for name in ("train", "eval", "attack", "report"))
    assert call("report", str(tmp_path))[0] == 2 and call("judge")[0] == 2


def test_accuracies_class_by_class_add_up():
    g = torch.Generator().manual_seed(0)
    labels, right = torch.randint(4, (50,), generator=g), torch.randint(2, (50,), generator=g)
    rows = class_accuracies({"A": "".join(map(str, right.tolist()))}, labels, ("a", "b", "c", "d", "none"))
    for k, name in enumerate("abcd"):
        assert rows[name]["A"] == pytest.approx(100 * right[labels == k].float().mean().item())
    assert rows["none"] == {"n": 0} and sum(row["n"] for row in rows.values()) == 50


def test_a_plain_state_dict_leaves_and_comes_back(own, tmp_path):
    network = load_weights(own / "runs" / "folder" / "last.safetensors")
    torch.save(network.model.state_dict(), tmp_path / "plain.pth")
    twin = create(network.metadata["name"], num_classes=2).model
    twin.load_state_dict(torch.load(tmp_path / "plain.pth", weights_only=True))


def test_ctrl_c_saves_as_the_end_of_the_time_does(tmp_path):
    words = f"--recipe jat/natural --data digits --tier smoke --threads 1 --out {tmp_path}/run --set".split()
    code = ("import signal, sys, jat_nb.training as t\nfrom jat_nb.cli import jat_train\nplain, seen = t.train_step, []\n"
            "def step(*a, **o):\n    seen.append(1)\n    if len(seen) == 10: signal.raise_signal(signal.SIGINT)\n    return plain(*a, **o)\n"
            "t.train_step = step\nsys.exit(jat_train(sys.argv[1:]))")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *words, "epochs=4"], capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 130 and "goes on from here" in done.stderr and "Traceback" not in done.stderr
    assert read_tensors(tmp_path / "run" / "resume.safetensors")[1]["iteration"] == 2  # of the third epoch of four steps
    assert jat_train([*words, "epochs=4"]) == 0
    words[words.index("--out") + 1] = str(tmp_path / "whole")
    assert jat_train([*words, "epochs=4"]) == 0
    a, b = (load_weights(tmp_path / name / "last.safetensors").state_dict() for name in ("run", "whole"))
    assert all(torch.equal(v, b[k]) for k, v in a.items())
