"Every command that a page shows is run, at the smallest size, in the order of the page."
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import NOTEBOOKS, ROOT, cells
from PIL import Image

from jat_nb import cli
from jat_nb.data import load

PROGRAMS = ("jat_train", "jat_eval", "jat_attack", "jat_report")
SMALL = {  # what is added to a command: a later option wins
    "jat_train": "--data digits --tier smoke --set epochs=1 batch_size=64 --threads 1",
    "jat_eval": "--n 4 --steps 1 --threads 1 --device cpu", "jat_attack": "--steps 1 --threads 1", "jat_report": ""}
PAGES = {path.stem: path for path in NOTEBOOKS}


def commands(text: str) -> list[list[str]]:
    "Words of every command in the shell blocks of a page; loops are taken apart."
    found = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        for line in re.split(r"\n|; (?=do|\[|done)", block.replace("\\\n", " ")):
            words = shlex.split(re.sub(r"^(while|do|until) ", "", line.strip()), comments=True)
            found += [words] if words and words[0] not in ("done", "[", ":", "do") else []
    return found


def shown(path: Path) -> list[list[str]]:
    return commands("\n".join(cell["source"] for cell in cells(path) if cell["cell_type"] == "markdown"))


def program(words: list[str]) -> str:
    return Path(words[0]).name


EVERY = {stem: found for stem, path in PAGES.items() if (found := shown(path))}


def small(words: list[str]) -> list[str]:
    name = program(words)
    return [*words[1:], *SMALL[name].split()]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    "A place with the folders of pictures that the pages speak of."
    for pictures in ("holiday", "folder-of-pictures"):
        (tmp_path / pictures).mkdir()
        for i, scan in enumerate(load("digits", "test").images[:2]):
            Image.fromarray(scan[0].numpy()).save(tmp_path / pictures / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_pages_show_commands():
    assert {"index", "67_cli"} <= set(EVERY)
    assert {name for found in EVERY.values() for name in map(program, found)} >= {*PROGRAMS, "make"}


@pytest.mark.parametrize("page", sorted(EVERY))
def test_commands_of_a_page(page, folder, capsys):
    for words in EVERY[page]:
        if program(words) in PROGRAMS:
            status = getattr(cli, program(words))(small(words))
            assert status == 0, (words, capsys.readouterr().err)


@pytest.mark.parametrize("page", sorted(EVERY))
def test_nothing_unknown_is_shown(page):
    "What is neither run above nor by the tests below would go unchecked."
    for words in EVERY[page]:
        assert program(words) in (*PROGRAMS, "make", "torchrun", "accelerate", "pip", "python"), words


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes the GPUs")
@pytest.mark.parametrize("page", sorted(p for p in EVERY if any(program(w) == "torchrun" for w in EVERY[p])))
def test_commands_under_torchrun(page, folder):
    bin = Path(sys.executable).parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": f"{bin}:{os.environ['PATH']}"}
    for words in (w for w in EVERY[page] if program(w) == "torchrun"):
        start = next(i for i, w in enumerate(words) if program([w]) in PROGRAMS)
        few = ["2" if w.isdigit() else w for w in words[:start]]
        command = [*few, words[start], *small(words[start:])]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        said = [line for line in done.stdout.splitlines() if "runs/" in line]
        assert len(said) == 1, done.stdout  # one process speaks for all


def test_make_knows_its_targets():
    for words in (w for found in EVERY.values() for w in found if program(w) == "make"):
        done = subprocess.run([*words, "--dry-run", "--always-make"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, (words, done.stderr)


def recipes_of(target: str) -> list[list[str]]:
    "Commands of the Makefile that run a module of the package."
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if " -m jat_nb." in line or " -m pytest" in line]
    return [shlex.split(line) for line in lines]


def run_recipe(words: list[str], small_words: list[str], folder: Path) -> str:
    "A command of the Makefile with this interpreter, at another size."
    variables = dict(w.split("=") for w in words if re.match(r"[A-Z]+[A-Z_]*=", w))
    after = words[words.index("-m"):]
    env = {**os.environ, **variables, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *after, *small_words], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_make_bench(folder):
    (words,) = recipes_of("bench")
    out = words[words.index("--out") + 1]
    said = run_recipe(words, ["--tier", "smoke", "--only", "modes"], folder)
    assert (folder / out).exists() and "not measured: floor" in said


def test_make_demo(folder):
    (words,) = recipes_of("demo")
    run_recipe(words, ["--help"], folder)  # the run itself: test_demo.py


def test_make_test(folder):
    (words,) = recipes_of("test")
    said = run_recipe(words, ["--collect-only", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "test_imports.py")],
                      folder)
    assert "test_imports.py" in said
