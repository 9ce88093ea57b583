"""The demo end to end, as a user runs it, and what it says when it cannot."""
import os
import subprocess
import sys

import pytest

from jat_nb.data import available
from jat_nb.records import Record
from jat_nb.weights import load_weights


def demo(*arguments: object, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "jat_nb.demo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env={**os.environ, **env})


def test_demo_trains_attacks_and_reports(tmp_path):
    out = tmp_path / "demo"
    done = demo("--out", out, "--epochs", 8, "--n-test", 100, "--steps", 5, "--model", "wrn_10_1_cifar")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Natural" in done.stdout and "Joint" in done.stdout and str(out / "report.html") in done.stdout
    assert "batch/s" not in done.stderr and "training:" not in done.stderr  # quiet without a terminal
    record = Record.load(out / "record.json")
    joint, natural = (record.metrics[k]["rows"] for k in ("Joint", "Natural"))
    for attack in ("FGSM", "PGD5", "Spatial", "Joint", "Joint PS", "Union"):
        assert joint[attack]["accuracy (%)"] > natural[attack]["accuracy (%)"], attack
    assert natural["Clean"]["accuracy (%)"] > 80
    report = (out / "report.html").read_text(encoding="utf-8")
    assert report.count("<svg") == 3 and "http" not in report
    assert load_weights(out / "joint" / "last.safetensors").metadata["num_classes"] == 10


@pytest.mark.parametrize("arguments, words", [
    (["--data", "digit"], "digit"),
    (["--model", "wrn_1000"], "wrn_1000"),
    (["--epochs", "0"], "--epochs must be at least 1"),
    (["--n-train", "-5"], "--n-train must be at least 1"),
    (["--data", "svhn"], "JAT_DATA"),
])
def test_bad_input_is_one_line_and_status_2(tmp_path, arguments, words):
    done = demo(*arguments, "--out", tmp_path / "x", JAT_DATA=str(tmp_path))
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    done = demo("--out", tmp_path / "file" / "below")
    assert done.returncode == 2 and "choose another folder" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(not available("cifar10"), reason="CIFAR-10 is not at hand")
def test_demo_on_cifar10(tmp_path):
    done = demo("--data", "cifar10", "--n-train", 300, "--n-test", 20, "--epochs", 1, "--steps", 2,
                "--model", "wrn_10_1_cifar", "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "report.html").exists()
