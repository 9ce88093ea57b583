"The four commands, one after the other, and everything they refuse."
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from jat_nb.cli import jat_attack, jat_eval, jat_report, jat_train, to_png
from jat_nb.data import load
from jat_nb.models import load_weights, pretrained
from jat_nb.records import Record, read_jsonl

SMOKE = "--data digits --tier smoke --threads 1"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    words = f"--recipe jat/natural jat/one-step-joint {SMOKE} --seed 0 1 --set epochs=1 --out {out}"
    assert jat_train(words.split()) == 0
    return out


def test_one_folder_for_each_recipe_and_seed(runs):
    assert {p.name for p in runs.iterdir()} == {f"{n}-s{s}" for n in ("natural", "one-step-joint") for s in (0, 1)}
    for run in runs.iterdir():
        facts = json.loads((run / "run.json").read_text())
        assert facts["about"]["name"].split("/")[1] == run.name[:-3] and facts["recipe"]["epochs"] == 1
        assert facts["about"]["seed"] == facts["recipe"]["seed"] == int(run.name[-1])
        assert len(read_jsonl(run / "log.jsonl")) == 1 and load_weights(run / "last.safetensors")


def test_training_again_changes_nothing(runs, capsys):
    before = {p: p.read_bytes() for p in runs.rglob("last.safetensors")}
    assert jat_train(f"--recipe jat/natural jat/one-step-joint {SMOKE} --seed 0 1 --set epochs=1 --out {runs}".split()) == 0
    assert before == {p: p.read_bytes() for p in runs.rglob("last.safetensors")}
    assert capsys.readouterr().out.count("1 of 1 epochs") == 4


def test_slices_of_time_end_with_the_same_weights(runs, tmp_path, capsys):
    words = f"--recipe jat/natural {SMOKE} --set epochs=1 --out {tmp_path / 'x'} --time-budget 0.001".split()
    statuses = []
    while not statuses or statuses[-1] == 3 and len(statuses) < 20:
        statuses.append(jat_train(words))
    assert statuses[-1] == 0 and len(statuses) > 2 and "goes on from here" in capsys.readouterr().out
    a, b = (load_weights(p / "last.safetensors").state_dict() for p in (tmp_path / "x", runs / "natural-s0"))
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_judge_attack_report(runs, tmp_path, capsys):
    assert jat_eval(f"{runs} --suite jat --n 24 --steps 2 --threads 1".split()) == 0
    first = Record.load(runs / "natural-s0" / "eval-jat.json")
    assert first.metrics["n"] == 24 and first.forwards > 0 and first.tier == "smoke" and first.data == "digits"
    assert jat_eval(f"{runs} --suite jat --n 24 --steps 2 --threads 1".split()) == 0
    assert capsys.readouterr().out.count("already there") == 4
    assert jat_eval(f"{runs / 'natural-s0'} --suite jat --n 12 --steps 2 --threads 1 --batch-size 5 --again".split()) == 0
    few = Record.load(runs / "natural-s0" / "eval-jat.json").metrics["correct"]
    assert all(bits == first.metrics["correct"][k][:12] for k, bits in few.items())  # fewer images are the first of more
    assert jat_eval(f"{runs / 'one-step-joint-s0'} --suite transfer --source {runs / 'natural-s0'} {runs / 'one-step-joint-s1'} "
                    "--n 12 --steps 2 --threads 1".split()) == 0
    sources = Record.load(runs / "one-step-joint-s0" / "eval-transfer.json").metrics["sources"]
    assert set(sources) == {"natural-s0", "one-step-joint-s1"}
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
    run = runs / "one-step-joint-s0"
    for source, known in (("natural-s0", False), ("one-step-joint-s1", True)):
        assert jat_eval(f"{run} --suite masking --source {runs / source} --n 4 --steps 8 --threads 1".split()) == 0
        held = {row["check"]: row["held"] for row in Record.load(run / "eval-masking.json").metrics["rows"]}
        assert (held["d"] is not None) == known


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
    from jat_nb.data import read_picture
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
        assert jat_attack(f"{runs / 'one-step-joint-s0'} --images {tmp_path / 'in'} --attack {attack} --steps 3 --out {out} --threads 1".split()) == 0
        facts, model = json.loads((out / "attack.json").read_text()), load_weights(runs / "one-step-joint-s0" / "last.safetensors")
        assert len(facts["images"]) == 5 and len(list(out.glob("*-flow.png"))) == (0 if attack in ("pgd", "fgsm") else 5)
        for row in facts["images"]:
            pixels = torch.from_numpy(np.array(Image.open(out / row["png"]))).float()[None, None] / 255
            seen = str(int(model(pixels).argmax(1)))
            assert seen == row["after"] and row["adversarial_as_png"] == (seen != row["label"]) and row["within_budget_before_rounding"]
            if attack in ("pgd", "fgsm"):
                assert row["largest_change_255"] <= 25.5 + 1
    before = (tmp_path / "pgd" / "attack.json").read_text()
    assert jat_attack(f"{runs / 'one-step-joint-s0'} --images {tmp_path / 'in'} --attack pgd --eps-pixel 0 --steps 1 --out {tmp_path / 'pgd'}".split()) == 0
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
    (jat_report, "{empty} --out {empty}", "takes the file to write"),
    (jat_attack, "{x} --images {x} --out {x}", "run.json"), (jat_report, "{x}", ""),
])
def test_refusals_are_one_line_and_status_2(tmp_path, capsys, command, words, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "run.json").write_text("{}")
    places = {k: tmp_path / k for k in ("x", "file", "empty")}
    status = command(words.format(**places).split())
    said = capsys.readouterr()
    assert status == 2 and said.err.count("\n") == 1 and message in said.err and command.__name__ in said.err


@pytest.mark.parametrize("command", [jat_train, jat_eval, jat_attack, jat_report])
def test_help_names_every_option_and_bad_options_end_with_2(capsys, command):
    with pytest.raises(SystemExit) as stop: command(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.count("--") >= 2 and "None" not in text and "inf" not in text
    with pytest.raises(SystemExit) as stop: command(["--nonsense"])
    assert stop.value.code == 2


def test_every_row_is_listed(capsys):
    assert jat_train(["--list"]) == 0
    text = capsys.readouterr().out
    assert "table 1 'one-step-Joint'" in text and "table 7 'Bilateral'" in text and len(text.splitlines()) == 24


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
    run = runs / "natural-s1"
    assert jat_eval(f"{run} --suite masking --n 4 --steps 8 --threads 1".split()) == 0
    assert "failed checks:" in capsys.readouterr().out
    assert len(Record.load(run / "eval-masking.json").metrics["rows"]) == 6
