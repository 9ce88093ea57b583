"The four commands, one after the other, and everything they refuse."
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_processes import launch, well
from torch.testing import assert_close

import jat_nb
from jat_nb import cli
from jat_nb.catalogue import papers, recipes, setting
from jat_nb.cli import jat_attack, jat_eval, jat_report, jat_train
from jat_nb.data import load
from jat_nb.judging import judge
from jat_nb.models import create
from jat_nb.own_pictures import to_png
from jat_nb.records import Record, read_jsonl
from jat_nb.results import read_runs
from jat_nb.shell import run_folder
from jat_nb.tables import transfer_key
from jat_nb.weights import load_weights, pretrained, read_tensors, save_weights, start_from, tensor_hash

SMOKE = "--data digits --tier smoke --threads 1"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    words = f"--recipe jat/natural jat/one-step-joint {SMOKE} --seed 0 1 --set epochs=1 --out {out}"
    assert jat_train(words.split()) == 0
    return out


def test_one_folder_for_each_recipe_and_seed(runs):
    assert {p.name for p in runs.iterdir()} == {f"jat-{n}-s{s}" for n in ("natural", "one-step-joint") for s in (0, 1)}
    for run in runs.iterdir():
        facts = json.loads((run / "run.json").read_text())
        assert facts["about"]["name"].replace("/", "-") == run.name[:-3] and facts["recipe"]["epochs"] == 1
        assert facts["about"]["seed"] == facts["recipe"]["seed"] == int(run.name[-1])
        assert len(read_jsonl(run / "log.jsonl")) == 1 and load_weights(run / "last.safetensors")


def test_training_again_changes_nothing(runs, capsys):
    before = {p: p.read_bytes() for p in runs.rglob("last.safetensors")}
    assert jat_train(f"--recipe jat/natural jat/one-step-joint {SMOKE} --seed 0 1 --set epochs=1 --out {runs}".split()) == 0
    assert before == {p: p.read_bytes() for p in runs.rglob("last.safetensors")}
    assert capsys.readouterr().out.count("all of 1 epochs") == 4


def test_fewer_images_are_another_run_and_say_so(tmp_path, capsys):
    words = f"--recipe jat/natural {SMOKE} --set epochs=1 amp=false batch_size=16 --out {tmp_path / 'x'}"
    assert jat_train(f"{words} --images 40".split()) == 0
    facts = json.loads((tmp_path / "x" / "run.json").read_text())
    assert facts["train"]["images"] == facts["about"]["images"] == 40
    assert (facts["recipe"]["amp"], facts["recipe"]["batch_size"]) == (False, 16)
    capsys.readouterr()
    assert jat_train(words.split()) == 2 and "train" in capsys.readouterr().err  # the folder is another run's
    [run] = read_runs(tmp_path)
    assert run.usable and jat_report([str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    assert "--images 40" in (tmp_path / "page.html").read_text()
    assert jat_train(f"{words} --images 9999".split()) == 2 and "1 to 1405 training images, got 9999" in capsys.readouterr().err


def test_options_belong_to_the_network_that_was_named(tmp_path):
    words = f"--recipe jat/natural {SMOKE} --images 32 --model resnet18 --out {tmp_path} --set epochs=1"
    assert jat_train([*words.split(), 'model_options={"output_stride": 16}']) == 2  # known to nobody
    assert jat_train([*words.replace("resnet18", "vit_tiny_patch16_224").split(), 'model_options={"img_size": 32, "patch_size": 8}']) == 0


def test_weights_from_elsewhere_need_no_options_of_the_tier(tmp_path):
    torch.save(create("small_cnn_mnist", in_chans=1).model.state_dict(), tmp_path / "theirs.pth")
    words = f"--recipe pareto/cifar10-natural {SMOKE} --images 16 --set epochs=1 batch_size=8 --model small_cnn_mnist"  # normalises by groups
    assert jat_train(f"{words} --out {tmp_path / 'fresh'}".split()) == 2
    assert jat_train(f"{words} --init {tmp_path / 'theirs.pth'} --out {tmp_path / 'run'}".split()) == 0


def test_an_objective_with_a_form_of_its_own_is_measured_in_it(tmp_path, capsys):
    words = f"--recipe ijsat/small-advprop {SMOKE} --images 32 --set epochs=1 iterations=null batch_size=16"
    assert jat_train(f"{words} --out {tmp_path / 'run'}".split()) == 0
    assert "images/s" in capsys.readouterr().out
    assert jat_eval(f"{tmp_path / 'run'} --suite jat --n 4 --steps 1 --threads 1".split()) == 0


def test_seeds_of_a_recipe_share_their_number_of_images(tmp_path):
    words = f"--recipe jat/natural {SMOKE} --set epochs=1"
    assert jat_train(f"{words} --images 32 --out {tmp_path / 'a'}".split()) == 0
    assert jat_train(f"{words} --images 64 --seed 1 --out {tmp_path / 'b'}".split()) == 0
    first, second = read_runs(tmp_path)
    assert first.usable and second.problems == ("not as a: images",)


def test_a_run_starts_from_the_weights_of_another(runs, tmp_path, capsys):
    old, place = runs / "jat-natural-s0" / "last.safetensors", tmp_path / "on"
    words = f"--recipe jat/natural {SMOKE} --images 32 --set epochs=1 batch_size=32 lr=1e-9 --out {place}"
    assert jat_train(f"{words} --init {old}".split()) == 0
    before, after = load_weights(old), load_weights(place / "last.safetensors")
    for (name, p), q in zip(before.named_parameters(), after.parameters()): assert_close(p, q, rtol=0, atol=1e-5, msg=name)
    facts = json.loads((place / "run.json").read_text())
    assert facts["model"]["start"] == facts["about"]["start"] == after.metadata["start"] == tensor_hash(before.state_dict())
    other = runs / "jat-natural-s1" / "last.safetensors"
    assert jat_train(f"{words} --init {old}".split()) == 0  # nothing left to do
    capsys.readouterr()
    for end in ("", f"--init {other}"):
        assert jat_train(f"{words} {end}".split()) == 2 and "holds another run (model was" in capsys.readouterr().err
    assert jat_train(f"--recipe jat/natural {SMOKE} --images 32 --set epochs=1 --seed 1 --out {tmp_path / 'fresh'}".split()) == 0
    fresh, on = sorted(read_runs(tmp_path), key=lambda run: run.folder)
    assert fresh.usable and "start" in on.problems[0]  # not pooled as a second seed
    assert jat_report([str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    assert "--init FILE" in (tmp_path / "page.html").read_text()


def test_a_new_data_set_gets_a_new_last_layer(runs, tmp_path):
    old = runs / "jat-natural-s0" / "last.safetensors"
    for n in (3, 10):
        model, known = start_from(old, n), load_weights(old).state_dict()
        odd = [k for k, v in model.state_dict().items() if v.shape != known[k].shape or not torch.equal(v, known[k])]
        assert odd == (["model.fc.weight", "model.fc.bias"] if n == 3 else []) and model.training
    colour = save_weights(create("wrn_10_1_cifar"), tmp_path / "colour.safetensors")
    with pytest.raises(ValueError, match="images of 3 channels, digits has 1"):
        setting("jat/natural", data="digits", init=colour)


def test_a_run_of_the_pareto_paper_from_the_command_line(tmp_path, capsys):
    words = f"--recipe pareto/mnist-average {SMOKE} --images 16 --set epochs=1 batch_size=8 amp=false probe_images=4"
    assert jat_train(f"{words} --out {tmp_path / 'run'}".split()) == 0
    assert jat_eval(f"{tmp_path / 'run'} --n 1 --threads 1".split()) == 0
    record = Record.load(tmp_path / "run" / "eval-pareto-mnist.json")  # the suite of its home
    assert list(record.metrics["correct"])[:2] == ["Clean", "PGD10"] and len(record.metrics["displacement"]["RT5"]) == 1
    assert jat_report([str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    assert jat_train(["--list"]) == 0
    said = capsys.readouterr().out
    assert "pgd, 30 steps + ggsm, 20 steps + affine, 20 steps" in said and "table 1 'Ave AT, MNIST'" in said


def test_slices_of_time_end_with_the_same_weights(runs, tmp_path, capsys):
    words = f"--recipe jat/natural {SMOKE} --set epochs=1 --out {tmp_path / 'x'} --time-budget 0.001".split()
    statuses = []
    while not statuses or statuses[-1] == 3 and len(statuses) < 20:
        statuses.append(jat_train(words))
    assert statuses[-1] == 0 and len(statuses) > 2 and "goes on from here" in capsys.readouterr().out
    a, b = (load_weights(p / "last.safetensors").state_dict() for p in (tmp_path / "x", runs / "jat-natural-s0"))
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def judged(run):
    judge(run, "jat", n=11, steps=2, batch_size=4, again=True)


def test_a_record_counts_the_passes_of_all_processes(runs, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(runs / "jat-natural-s0", tmp_path / name)
    judged(tmp_path / "one")
    well(launch(judged, tmp_path / "two"))
    one, two = (Record.load(tmp_path / name / "eval-jat.json") for name in ("one", "two"))
    assert (one.metrics, one.forwards, one.backwards) == (two.metrics, two.forwards, two.backwards)
    assert one.backwards > 0


def test_judge_attack_report(runs, tmp_path, capsys):
    assert jat_eval(f"{runs} --suite jat --n 24 --steps 2 --threads 1".split()) == 0
    first = Record.load(runs / "jat-natural-s0" / "eval-jat.json")
    assert first.metrics["n"] == 24 and first.forwards > 0 and first.tier == "smoke" and first.data == "digits"
    assert jat_eval(f"{runs} --suite jat --n 24 --steps 2 --threads 1".split()) == 0
    assert capsys.readouterr().out.count("already there") == 4
    assert jat_eval(f"{runs / 'jat-natural-s0'} --suite jat --n 12 --steps 2 --threads 1 --batch-size 5 --again".split()) == 0
    few = Record.load(runs / "jat-natural-s0" / "eval-jat.json").metrics["correct"]
    assert all(bits == first.metrics["correct"][k][:12] for k, bits in few.items())  # fewer images are the first of more
    assert jat_eval(f"{runs / 'jat-one-step-joint-s0'} --suite transfer --source {runs / 'jat-natural-s0'} {runs / 'jat-one-step-joint-s1'} "
                    "--n 12 --steps 2 --threads 1".split()) == 0
    sources = Record.load(runs / "jat-one-step-joint-s0" / "eval-transfer.json").metrics["sources"]
    assert set(sources) == {"jat-natural-s0", "jat-one-step-joint-s1"}
    alone = read_runs(runs / "jat-one-step-joint-s0")  # the folder of the source is not among these
    assert transfer_key(alone, "jat/one-step-joint", "jat/natural") == "jat-natural-s0"
    assert jat_report([str(runs), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "one-step-joint" in page and page.count("<table") > 0


def test_options_add_up_and_python_words_are_read(tmp_path):
    assert jat_train(f"--recipe jat/natural {SMOKE} --set epochs=1 --set batch_size=64 amp=False --out {tmp_path}".split()) == 0
    recipe = json.loads((tmp_path / "run.json").read_text())["recipe"]
    assert (recipe["epochs"], recipe["batch_size"], recipe["amp"]) == (1, 64, False)


def test_an_answer_belongs_to_its_weights(tmp_path, capsys):
    judge = f"{tmp_path / 'x'} --n 8 --steps 1 --threads 1".split()
    train = f"--recipe jat/natural {SMOKE} --set epochs=2 --out {tmp_path / 'x'}".split()
    assert jat_train([*train, "--time-budget", "0"]) == 3
    assert jat_eval(judge) == 2 and "0 of 2 epochs" in capsys.readouterr().out
    assert jat_train(train) == 0 and jat_eval(judge) == 0 and jat_eval(judge) == 0
    assert capsys.readouterr().out.count("already there") == 1
    record = Record.load(tmp_path / "x" / "eval-jat.json")
    assert record.config["epoch"] == 2
    shutil.copy(tmp_path / "x" / "eval-jat.json", tmp_path / "eval-jat.json")
    shutil.rmtree(tmp_path / "x")
    assert jat_train([*train, "--seed", "1"]) == 0
    shutil.copy(tmp_path / "eval-jat.json", tmp_path / "x")
    assert jat_eval(judge) == 0 and "already there" not in capsys.readouterr().out
    assert Record.load(tmp_path / "x" / "eval-jat.json").config["sha256"] != record.config["sha256"]


def test_only_a_twin_is_asked_for_siamese_images(runs):
    run = runs / "jat-one-step-joint-s0"
    for source, known in (("jat-natural-s0", False), ("jat-one-step-joint-s1", True)):
        assert jat_eval(f"{run} --suite masking --source {runs / source} --n 4 --steps 8 --threads 1 --again".split()) == 0
        held = {row["check"]: row["held"] for row in Record.load(run / "eval-masking.json").metrics["rows"]}
        assert (held["transfer"] is not None) == known


def test_results_without_a_checkpoint_are_not_overwritten(tmp_path, capsys):
    words = f"--recipe jat/natural {SMOKE} --set epochs=1 --out {tmp_path}".split()
    assert jat_train(words) == 0
    log = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "resume.safetensors").rename(tmp_path / "moved")
    assert jat_train(words) == 2 and "no resume.safetensors" in capsys.readouterr().err
    (tmp_path / "moved").rename(tmp_path / "resume.safetensors")
    (tmp_path / "run.json").unlink()
    assert jat_train([*words, "--seed", "1"]) == 2 and "holds another run" in capsys.readouterr().err
    assert (tmp_path / "log.jsonl").read_text() == log


def test_sixteen_bit_pictures_keep_their_grey(tmp_path):
    from jat_nb.readers import read_picture
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(257 * grey).save(tmp_path / "deep.png")
    assert (read_picture(tmp_path / "deep.png")[..., 0] == grey).all()


def test_attacked_pictures_are_what_was_checked(runs, tmp_path):
    test = load("digits", "test").subset(5)
    for i, (image, label) in enumerate(zip(test.images, test.labels)):
        folder = tmp_path / "in" / str(int(label))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / f"{i}.png")
    for attack in ("double_pass", "pgd", "ggsm", "fgsm", "cascade"):
        out = tmp_path / attack
        assert jat_attack(f"{runs / 'jat-one-step-joint-s0'} --images {tmp_path / 'in'} --attack {attack} --steps 3 --out {out} --threads 1".split()) == 0
        facts, model = json.loads((out / "attack.json").read_text()), load_weights(runs / "jat-one-step-joint-s0" / "last.safetensors")
        assert len(facts["images"]) == 5 and len(list(out.glob("*-flow.png"))) == (0 if attack in ("pgd", "fgsm") else 5)
        for row in facts["images"]:
            pixels = torch.from_numpy(np.array(Image.open(out / row["png"]))).float()[None, None] / 255
            seen = str(int(model(pixels).argmax(1)))
            assert seen == row["after"] and row["adversarial_as_png"] == (seen != row["label"]) and row["within_budget_before_rounding"]
            if attack in ("pgd", "fgsm"):
                assert row["largest_change_255"] <= 25.5 + 1
    before = (tmp_path / "pgd" / "attack.json").read_text()
    assert jat_attack(f"{runs / 'jat-one-step-joint-s0'} --images {tmp_path / 'in'} --attack pgd --eps-pixel 0 --steps 1 --out {tmp_path / 'pgd'}".split()) == 0
    after = json.loads((tmp_path / "pgd" / "attack.json").read_text())
    assert before != json.dumps(after) and all(r["largest_change_255"] == 0 for r in after["images"])


def test_rounding_is_checked_on_what_is_written():
    model, test = pretrained("digits-joint"), load("digits", "test").subset(40)
    x, y = test.x, test.labels
    g = torch.Generator().manual_seed(0)
    x_adv = (x + 0.2 * torch.rand(x.shape, generator=g) - 0.1).clamp(0, 1)
    levels, fools = to_png(model, x, x_adv, y)
    assert levels.dtype == torch.uint8 and torch.equal(fools, model(levels.float() / 255).argmax(1) != y)
    nearest = model((255 * x_adv).round() / 255).argmax(1) != y
    assert (fools | ~nearest).all()  # never worse than plain rounding
    assert ((levels.double() - 255 * x_adv.double()).abs() < 1).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_picture_that_is_answered_with_no_number_fools(value):
    class Fails(torch.nn.Module):
        "Names class 0 everywhere, but has no number for it above mid-grey."

        def forward(self, x):
            bright = x.flatten(1).mean(1) > 0.5
            return torch.stack([torch.where(bright, value, 1.0), torch.zeros(len(x))], dim=1)

    x_adv, y = torch.tensor([0.4, 0.6]).view(2, 1, 1, 1).expand(2, 1, 4, 4), torch.tensor([0, 0])
    assert to_png(Fails(), x_adv - 0.2, x_adv, y)[1].tolist() == [False, True]


@pytest.mark.parametrize("command, words, message", [
    (jat_train, "--recipe jat/joint --out {x}", "unknown recipe 'jat/joint'"),
    (jat_train, "--out {x}", "pass --recipe"), (jat_train, "--recipe jat/natural", "pass --recipe"),
    (jat_train, "--recipe jat/natural --data cifar11 --out {x}", "unknown data set"),
    (jat_train, "--recipe jat/natural --data digits --tier smoke --model wrn --out {x}", "unknown model 'wrn'"),
    (jat_train, "--recipe jat/natural --data digits --set epoch=3 --out {x}", "FIELD=VALUE"),
    (jat_train, "--recipe jat/natural --data digits --set epochs --out {x}", "FIELD=VALUE"),
    (jat_train, "--recipe jat/natural --data digits --tier smoke --set lr=-1 --out {x}", "lr > 0"),
    (jat_train, "--recipe jat/natural --data digits --tier smoke --set lr=fast --out {x}", "lr"),
    (jat_train, "--recipe jat/natural --data digits --tier smoke --out {file}/y", "choose another folder"),
    (jat_eval, "{x}", "no run.json"), (jat_eval, "{empty}", "lacks data"),
    (jat_train, "--recipe jat/natural --data digits --tier smoke --set amp=maybe --out {x}", "expected amp to be bool"),
    (jat_train, "--recipe jat/natural --data digits --tier smoke --set milestones=5 --out {x}", "expected milestones"),
    (jat_train, "--recipe jat/natural --data digits --tier smoke --set attacks=5 --out {x}", "expected attacks"),
    (jat_train, "--recipe jat/natural --data digits --tier smoke --set lr=true --out {x}", "expected lr to be float"),
    (jat_train, "--recipe jat/natural --data digits --tier smoke --model vit_tiny_patch16_224 --out {x}", "doesn't match model"),
    (jat_train, "--recipe jat/natural --data digits --tier smoke --set data=mnist --out {x}", "pass --data VALUE"),
    (jat_train, "--recipe jat/natural --data digits --tier smoke --set model=resnet18 --out {x}", "pass --model VALUE"),
    (jat_train, "--recipe jat/natural --data digits --tier smoke --model small_cnn_mnist --set model_options={{\"norm\":\"group\"}} --out {x}",
     "cannot build small_cnn_mnist"),
    (jat_train, "--recipe jat/natural --data digits --tier smoke --model small_cnn_mnist --set model_options={{\"patch_size\":4}} --out {x}",
     "cannot build small_cnn_mnist"),
    (jat_attack, "{x} --model small_cnn_mnist --images {file} --out {empty}", "--model say what a run knows itself"),
    (jat_report, "{empty} --out {empty}", "takes the file to write"),
    (jat_attack, "{x} --images {x} --out {empty}", "run.json"), (jat_report, "{x}", ""),
    (jat_attack, "{x} --images {file} --out {empty} --save set.pt", "--save FILE.safetensors"),
    (jat_attack, "{empty} --images {file} --out {taken}", "attack.json is a folder, where the answer is to go: remove it"),
    (jat_train, "--recipe jat/natural --data digits --tier smoke --init {empty} --out {x}", "is a folder"),
    (jat_eval, "--weights {empty} --data digits --out {x}", "is a folder"), (jat_eval, "{x} --device warp", "pass --device cpu"),
    (jat_train, "--recipe jat/natural --device cuda:99 --out {x}", "cannot compute on 'cuda:99'"),
])
def test_refusals_are_one_line_and_status_2(tmp_path, capsys, command, words, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "run.json").write_text("{}")
    (tmp_path / "taken" / "attack.json").mkdir(parents=True)
    places = {k: tmp_path / k for k in ("x", "file", "empty", "taken")}
    status = command(words.format(**places).split())
    said = capsys.readouterr()
    assert status == 2 and said.err.count("\n") == 1 and message in said.err and command.__name__ in said.err


@pytest.mark.parametrize("command", [jat_train, jat_eval, jat_attack, jat_report])
def test_help_names_every_option_and_bad_options_end_with_2(capsys, command):
    with pytest.raises(SystemExit) as stop: command(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.count("--") >= 2 and "None" not in text and "inf" not in text
    options = re.findall(r"^  --(?!version|help)[a-z-]+.*(?:\n {10,}.*)*", text, re.MULTILINE)
    assert len(options) == len(set(re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE)) - {"--version", "--help"})
    for option in options:
        assert re.search(r"[a-z]{3,} [a-z]", option), f"no explanation of {option}"
    assert "Processor threads" in text or command is jat_report
    with pytest.raises(SystemExit) as stop: command(["--nonsense"])
    assert stop.value.code == 2


def test_every_row_is_listed(capsys):
    assert jat_train(["--list"]) == 0
    text = capsys.readouterr().out
    assert "table 1 'one-step-Joint'" in text and "table 7 'Bilateral'" in text 
    assert len(text.splitlines()) == len(recipes()) + len(papers())
    assert all(paper.title in text.splitlines() for paper in papers().values())


def test_programs_are_installed():
    assert all(shutil.which(name, path=str(__import__("sys").prefix) + "/bin") for name in
               ("jat_train", "jat_eval", "jat_attack", "jat_report"))


def test_svhn_in_its_own_format(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision import datasets
    g = np.random.default_rng(0)
    for split, n in (("train", 120), ("test", 30)):
        labels = np.arange(n) % 10 + 1  # the files call the digit 0 ten
        savemat(tmp_path / f"{split}_32x32.mat", {"X": g.integers(0, 256, (32, 32, 3, n), dtype=np.uint8), "y": labels[:, None]})
    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)  # not the published files
    monkeypatch.setenv("JAT_DATA", str(tmp_path))
    run = tmp_path / "run"
    assert jat_train(f"--recipe jat/one-step-joint --data svhn --tier smoke --threads 1 --set epochs=1 --out {run}".split()) == 0
    facts = json.loads((run / "run.json").read_text())
    assert facts["recipe"]["lr"] == 0.01 and facts["recipe"]["attacks"]["attack"][0][1]["eps_pixel"] == 8 / 255
    assert jat_eval(f"{run} --suite jat --n 8 --steps 1 --threads 1".split()) == 0
    assert Record.load(run / "eval-jat.json").metrics["n"] == 8


def test_every_suite_ends_in_a_line(runs, capsys):
    run = runs / "jat-natural-s1"
    assert jat_eval(f"{run} --suite masking --n 4 --steps 8 --threads 1".split()) == 0
    assert "failed checks:" in capsys.readouterr().out
    assert len(Record.load(run / "eval-masking.json").metrics["rows"]) == 6


def write_halves(folder, classes, n=24, value=255):
    "Pictures of 16 px whose bright half tells the class: left, right, top or bottom."
    halves = {"bee": np.s_[:, :8], "cat": np.s_[:, 8:], "ant": np.s_[:8], "dog": np.s_[8:]}
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            pixels = rng.integers(0, 60, (16, 16), dtype=np.uint8)
            pixels[halves[name]] = rng.integers(value - 60, value, pixels[halves[name]].shape)
            Image.fromarray(pixels).save(folder / name / f"{i:02d}.png")


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    "A run on a folder of two classes, and the folder."
    root = tmp_path_factory.mktemp("halves")
    write_halves(root / "set" / "train", ("bee", "cat"))
    write_halves(root / "set" / "test", ("bee", "cat"), 8)
    words = f"--recipe jat/natural --data folder:{root / 'set'} --tier smoke --threads 1 --out {root / 'run'}"
    assert jat_train([*words.split(), "--set", "epochs=12", "batch_size=16", "augment=[]", "lr=0.05"]) == 0
    return root


def clean(run):
    return Record.load(run / "eval-jat.json").metrics["rows"]["Clean"]["accuracy (%)"]


def test_a_run_is_judged_by_the_classes_it_was_trained_on(halves, tmp_path, capsys):
    root = shutil.copytree(halves, tmp_path / "copy")
    about = json.loads((root / "run" / "run.json").read_text())
    about["about"]["data"] = f"folder:{root / 'set'}"
    (root / "run" / "run.json").write_text(json.dumps(about))
    judge = f"{root / 'run'} --n 16 --steps 1 --threads 1".split()
    assert jat_eval(judge) == 0 and clean(root / "run") > 80
    write_halves(root / "set" / "train", ("ant",))  # it would come first and renumber the others
    assert jat_eval([*judge, "--again"]) == 0 and clean(root / "run") > 80
    write_halves(root / "set" / "test", ("ant",), 8)
    assert jat_eval([*judge, "--again"]) == 2 and "ant" in capsys.readouterr().err


def test_a_class_that_changed_its_name_is_refused(halves, tmp_path, capsys):
    root = shutil.copytree(halves, tmp_path / "copy")
    about = json.loads((root / "run" / "run.json").read_text())
    about["about"]["data"] = f"folder:{root / 'set'}"
    (root / "run" / "run.json").write_text(json.dumps(about))
    for split in ("train", "test"):  # two classes as before, but the other one comes first now
        (root / "set" / split / "cat").rename(root / "set" / split / "ant")
    assert jat_eval(f"{root / 'run'} --n 16 --steps 1 --threads 1".split()) == 2
    said = capsys.readouterr().err
    assert "ant" in said and "cat" in said and said.count("\n") == 1


def test_changed_test_images_are_judged_anew(halves, tmp_path, capsys):
    root = shutil.copytree(halves, tmp_path / "copy")
    about = json.loads((root / "run" / "run.json").read_text())
    about["about"]["data"] = f"folder:{root / 'set'}"
    (root / "run" / "run.json").write_text(json.dumps(about))
    judge = f"{root / 'run'} --n 16 --steps 1 --threads 1".split()
    assert jat_eval(judge) == 0 and jat_eval([*judge, "--batch-size", "5"]) == 0
    assert capsys.readouterr().out.count("already there") == 1
    before = Record.load(root / "run" / "eval-jat.json").config
    write_halves(root / "set" / "test", ("bee",), 8, value=200)  # the same names, other pixels
    assert jat_eval(judge) == 0 and "already there" not in capsys.readouterr().out
    after = Record.load(root / "run" / "eval-jat.json").config
    assert before["test"]["sha256"] != after["test"]["sha256"] and after["test"]["classes"] == ["bee", "cat"]
    shutil.copy(root / "set" / "test" / "bee" / "00.png", root / "set" / "test" / "cat" / "00.png")  # another label
    assert jat_eval(judge) == 0 and "already there" not in capsys.readouterr().out


def test_a_damaged_answer_is_asked_for_again(halves, tmp_path, capsys):
    root = shutil.copytree(halves / "run", tmp_path / "run")
    judge = f"{root} --n 8 --steps 1 --threads 1".split()
    assert jat_eval(judge) == 0
    (root / "eval-jat.json").write_text((root / "eval-jat.json").read_text()[:-20])
    assert jat_eval(judge) == 0 and "already there" not in capsys.readouterr().out


def test_fast_is_the_default_of_the_cpu_tier(halves, tmp_path):
    root = shutil.copytree(halves / "run", tmp_path / "run")
    facts = json.loads((root / "run.json").read_text())
    judge = f"{root} --n 8 --steps 1 --threads 1".split()
    for tier, words, fast in (("smoke", "", False), ("cpu", "", True), ("cpu", "--no-fast", False), ("smoke", "--fast", True)):
        facts["about"]["tier"] = tier
        (root / "run.json").write_text(json.dumps(facts))
        assert jat_eval([*judge, "--again", *words.split()]) == 0
        config = Record.load(root / "eval-jat.json").config
        assert (config["fast"], config["batch_size"]) == (fast, 250), (tier, words)
        assert jat_report([str(root), "--out", str(tmp_path / "page.html")]) == 0
        shown = re.search(r"--(no-)?fast", (tmp_path / "page.html").read_text())
        assert (shown.group() if shown else "") == words  # the command that repeats it


def test_pictures_in_unknown_folders_are_refused(halves, tmp_path, capsys):
    write_halves(tmp_path / "in", ("bee", "dog"), 2)
    words = f"{halves / 'run'} --images {tmp_path / 'in'} --steps 1 --out {tmp_path / 'out'} --threads 1".split()
    assert jat_attack(words) == 2
    said = capsys.readouterr().err
    assert "dog" in said and "bee, cat" in said and said.count("\n") == 1
    shutil.rmtree(tmp_path / "in" / "dog")
    assert jat_attack([*words, "--attack", "pgd", "--loss", "margin"]) == 0
    facts = json.loads((tmp_path / "out" / "attack.json").read_text())
    assert {row["label"] for row in facts["images"]} == {"bee"} and facts["loss"] == "margin"
    assert {row["label_from"] for row in facts["images"]} == {"folder"}
    assert jat_attack([*words, "--loss", "mean"]) == 2 and "mean" in capsys.readouterr().err


def test_two_papers_never_share_a_folder():
    names = ("jat/natural", "other/natural", "jat/one-step-joint", "srt/rt-0.2")
    assert len({run_folder("out", name, seed) for name in names for seed in (0, 1)}) == 8
    assert run_folder("out", "jat/natural", 1) == Path("out/jat-natural-s1")


def test_called_from_python_with_keywords(tmp_path):
    options = dict(data="digits", tier="smoke", threads=1, set_=["epochs=1"], out=str(tmp_path / "run"))
    assert jat_train(recipe=["jat/natural"], **options) == 0
    assert jat_eval(runs=[str(tmp_path / "run")], n=8, steps=1, threads=1) == 0
    with pytest.raises(ValueError, match="unknown recipe"):
        jat_train(recipe=["jat/joint"], **options)


@pytest.mark.parametrize("command, words, seen", [
    (jat_eval, "{x} --n 0", "n >= 1"), (jat_eval, "{x} --n ten", "'ten'"), (jat_eval, "{x} --suite jat nosuch", "nosuch"),
    (jat_eval, "{x} --weights first", "'first'"), (jat_train, "--recipe jat/natural --seed -1 --out {x}", "seed >= 0"),
    (jat_train, "--recipe jat/natural --time-budget -3 --out {x}", "time_budget >= 0"), (jat_attack, "{x}", "--images"),
    (jat_train, "--recipe jat/natural --threads 0 --out {x}", "threads >= 1"),
])
def test_bad_values_are_one_line(tmp_path, capsys, command, words, seen):
    (tmp_path / "x").mkdir()
    try:
        status = command(words.format(x=tmp_path / "x").split())
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    assert status == 2 and said.err.count("\n") == 1 and seen in said.err


@pytest.mark.parametrize("command", [jat_train, jat_eval, jat_attack, jat_report])
def test_version(capsys, command):
    with pytest.raises(SystemExit) as stop:
        command(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.strip() == f"jat_nb {jat_nb.__version__}"


def test_interruption_ends_with_130(monkeypatch, capsys):
    monkeypatch.setattr(cli, "read_runs", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    assert jat_report(["runs"]) == 130 and "goes on" in capsys.readouterr().err


def test_a_run_that_was_stopped_is_attacked_with_a_word(tmp_path, capsys):
    words = f"--recipe jat/natural {SMOKE} --images 64 --set epochs=30 batch_size=16 --out {tmp_path}/cut"
    assert jat_train([*words.split(), "--time-budget", "1"]) == 3
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "a.png")
    capsys.readouterr()
    assert jat_attack(f"{tmp_path}/cut --images {tmp_path}/a.png --out {tmp_path}/out --steps 1".split()) == 0
    assert re.search(r"cut: not trained to its end, attacked after \d+ of 30 epochs", capsys.readouterr().out)


def test_the_whole_training_is_attacked_without(runs, tmp_path, capsys):
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "a.png")
    assert jat_attack(f"{runs}/jat-natural-s0 --images {tmp_path}/a.png --out {tmp_path}/out --steps 1".split()) == 0
    assert "trained to its end" not in capsys.readouterr().out


@pytest.mark.parametrize("words, mend", [("--suite masking --steps 4", "--steps 8"), ("--suite masking --eps-pixel 0", "--eps-pixel"),
                                         ("--suite transfer", "--source RUN")])
def test_suites_name_options_of_the_shell(runs, capsys, words, mend):
    assert jat_eval(f"{runs}/jat-natural-s0 --n 4 {words}".split()) == 2
    assert mend in capsys.readouterr().err


def test_files_are_named_from_the_folder_of_the_pictures(runs, tmp_path):
    for place in ("0", "1"):
        (tmp_path / "in" / place).mkdir(parents=True)
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "in" / place / "a.png")
    words = f"{runs}/jat-natural-s0 --out {tmp_path}/out --steps 1 --save {tmp_path}/set.safetensors --images"
    for images, names in ((tmp_path / "in", ["0/a.png", "1/a.png"]), (tmp_path / "in" / "1" / "a.png", ["a.png"])):
        assert jat_attack([*words.split(), str(images)]) == 0
        assert [row["file"] for row in json.loads((tmp_path / "out" / "attack.json").read_text())["images"]] == names
        assert read_tensors(tmp_path / "set.safetensors")[1]["files"] == names


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line_of_the_command(tmp_path, capsys):
    state = pretrained("digits-joint").model.state_dict()
    torch.save({"model": state, "ema": state}, tmp_path / "two.pth")
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "a.png")
    name = pretrained("digits-joint").metadata["name"]
    assert jat_attack(f"--weights {tmp_path}/two.pth --model {name} --size 32 --images {tmp_path}/a.png --out {tmp_path}/o --steps 1".split()) == 0
    said = capsys.readouterr().err
    assert said.startswith("jat_attack: warning: ") and said.count("\n") == 1 and "'ema' is not" in said
