"Every command that is shown anywhere is read by its own parser; those in blocks are run, at the smallest size, in order."
import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from conftest import NOTEBOOKS, ROOT, cells
from PIL import Image
from torch import nn
from torch.distributed.run import get_args_parser

from jat_nb import bench_report, cli, demo
from jat_nb.attacks import ATTACKS
from jat_nb.catalogue import recipes
from jat_nb.data import DATASETS, load
from jat_nb.models import _check_name, create
from jat_nb.shell import _changes
from jat_nb.suites import reads_steps, suites

PROGRAMS = ("jat_train", "jat_eval", "jat_attack", "jat_report")
OURS = {**{name: getattr(cli, name) for name in PROGRAMS}, "jat_nb": cli.main, "jat_nb.demo": demo._parse,
        "jat_nb.bench": bench_report.main}  # by program, or module after python -m
SMALL = {  # what is added to a command: a later option wins
    "jat_train": "--tier smoke --set epochs=1 batch_size=64 --threads 1",
    "jat_eval": "--n 4 --steps 1 --threads 1 --device cpu", "jat_attack": "--steps 1 --threads 1", "jat_report": ""}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```\s*$", re.S | re.M)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
OPTION = re.compile(r"(?:jat_\w+ )?(--[a-z][a-z-]*)")  # as it is spoken of, with its program or without
COMMAND = re.compile(r"(?:\S*/)?(?:jat_(?:train|eval|attack|report)|python|make|torchrun|accelerate|pip|pytest|nbdev_\w+) .")


def markdown(path: Path) -> str:
    if path.suffix == ".md": return path.read_text(encoding="utf-8")
    return "\n".join(cell["source"] for cell in cells(path) if cell["cell_type"] == "markdown")


PAGES = {path.stem: markdown(path) for path in (*NOTEBOOKS, ROOT / "README.md", ROOT / "CONTRIBUTING.md")}


def lines(label: str, block: str) -> list[str]:
    "Lines of a fence that are commands: all of a shell's, of others those after a prompt."
    rows = block.replace("\\\n", " ").splitlines()
    prompted = [row.strip()[2:] for row in rows if row.strip().startswith("$ ")]
    return prompted or (rows if label in ("sh", "bash", "shell") else [])


def fenced(text: str) -> list[list[str]]:
    "Words of every command in the blocks of a page; loops are taken apart."
    found = []
    for line in (line for label, block in FENCE.findall(text) if label != "python" for line in lines(label, block)):
        for part in re.split(r"; (?=do|\[|done)", line):
            words = shlex.split(re.sub(r"^(while|do|until) ", "", part.strip()), comments=True)
            found += [words] if words and words[0] not in ("done", "[", ":", "do") else []
    return found


def inline(text: str) -> list[list[str]]:
    "Words of every command with arguments that stands in a sentence."
    codes = INLINE.findall(FENCE.sub("", text))
    return [shlex.split(code) for code in codes if COMMAND.match(code) and not OPTION.fullmatch(code)]


def program(words: list[str]) -> str:
    return Path(words[0]).name


EVERY = {stem: found for stem, text in PAGES.items() if (found := fenced(text))}  # commands that are run
SHOWN = {stem: found for stem, text in PAGES.items() if (found := [*fenced(text), *inline(text)])}


def small(words: list[str]) -> list[str]:
    name, own = program(words), any(word.startswith("folder:") for word in words)
    short = SMALL[name]
    if any(word in suites() and not reads_steps(word) for word in words):
        short = short.replace("--steps 1", "")
    return [*words[1:], *short.split(), *(["--data", "digits"] if name == "jat_train" and not own else [])]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    "A place with the pictures and the weights that the pages speak of."
    scans = load("digits", "test").images[:8]
    for place in ("holiday", *(f"pictures/{split}/{name}" for split in ("train", "test") for name in ("dahlia", "palace"))):
        (tmp_path / place).mkdir(parents=True)
        for i, scan in enumerate(scans):
            Image.fromarray(scan[0].numpy()).convert("RGB").save(tmp_path / place / f"{i}.png")
    torch.save(create("resnet18", num_classes=2).model.state_dict(), tmp_path / "mine.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Read(Exception):
    "A parser, and what it made of a command line."


def given(words: list[str], monkeypatch) -> tuple[ArgumentParser, object]:
    "A command line of this package as its own parser reads it; placeholders in capitals are filled in."
    real = ArgumentParser.parse_args

    def parse_args(parser, *args): raise Read(parser, real(parser, *args))
    name, rest = (words[2], words[3:]) if words[1:2] == ["-m"] else (program(words), words[1:])
    with monkeypatch.context() as patched, pytest.raises(Read) as read:
        patched.setattr(ArgumentParser, "parse_args", parse_args)
        OURS[name](["1" if re.fullmatch("[A-Z]+", word) else word for word in rest])
    return read.value.args


SETTINGS = ConfigParser()
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
REQUIRED = {key: re.findall(r"^[\w-]+", value.replace(" ", "\n"), re.M) for key, value in SETTINGS["DEFAULT"].items()
            if key.endswith("requirements")}  # names of libraries, by key
NAMES = {"recipe": recipes(), "suite": suites(), "attack": ATTACKS, "only": bench_report.MEASUREMENTS}


def check(words: list[str], monkeypatch) -> None:
    "Options, names and files of a command exist, and nothing that it needs is left out."
    name = program(words)
    if name in ("torchrun", "accelerate"):
        parser = get_args_parser() if name == "torchrun" else launch_command_parser()
        if len(rest := words[1 + (name == "accelerate"):]) > 1:
            script = parser.parse_args(rest)
            check([script.training_script, *script.training_script_args], monkeypatch)
    elif name in PROGRAMS or words[1] == "-m" and words[2].startswith("jat_nb"):
        known = vars(given(words, monkeypatch)[1])
        for option, names in NAMES.items():
            value = known.get(option) or []
            unknown = {*(value if isinstance(value, list) else [value])} - {*names, "1"}
            assert not unknown, (words, unknown)
        assert (data := known.get("data") or "1") in ("1", *DATASETS) or data.startswith("folder:"), words
        if known.get("model"): _check_name(known["model"])
        _changes(known.get("set_") or [])
        if name == "jat_train": assert known["list_"] or known["recipe"] and known["out"], words
        if name == "jat_eval": assert known["runs"] or known["weights"] not in ("last", "best"), words
    elif name == "pip":
        extras = [extra for word in words for group in re.findall(r"\[(.*)\]", word) for extra in group.split(",")]
        assert "install" in words and all(f"{e.replace('-', '_')}_requirements" in REQUIRED for e in extras), words
        assert not any(word.startswith("jat_nb") for word in words), f"{words}: not on an index, pip needs the clone"
    else:  # make: see below
        assert name == "make" or "pytest" in words or name == "nbdev_test", words
        assert all((ROOT / word).exists() for word in words[1:] if "/" in word), words


def test_pages_show_commands():
    assert {"index", "67_cli", "90_your_own_model", "92_scaling_out"} <= set(EVERY)
    assert {"69_demo", "70_bench", "83_exp_ijsat", "README", "CONTRIBUTING"} <= set(SHOWN)
    assert {name for found in EVERY.values() for name in map(program, found)} >= {*PROGRAMS, "make"}
    assert sum(map(len, SHOWN.values())) > 50


@pytest.mark.parametrize("page", sorted(SHOWN))
def test_every_command_can_be_read(page, monkeypatch):
    for words in SHOWN[page]:
        check(words, monkeypatch)


@pytest.mark.parametrize("text", [
    "```bash\n.venv/bin/jat_train --recipe jat/natural --out x --invented 3\n```\n", "```\n$ jat_eval x --invented\n```\n",
    "so `jat_attack RUN --images FOLDER --out x --attack invented`", "`jat_train --recipe jat/invented --out x`", "`make invented/x`",
    "`jat_train --recipe jat/natural --out x --set invented=1`", "`jat_train --recipe jat/natural --data invented --out x`",
    "`jat_eval RUN --suite invented`", "`jat_train --init mine.pth --model resnet18`", "`python -m jat_nb.demo --invented 3`",
    "`python -m jat_nb.bench --only invented`", "`python -m jat_nb train --invented`", "`pytest tests/test_invented.py`",
    '`pip install "jat_nb[autoattack]"`', '`pip install -e ".[invented]"`', "`torchrun --invented 2 -- jat_train --list`",
    "```sh\ntorchrun --nproc-per-node 2 --no-python -- jat_eval x --invented\n```\n"])
def test_what_is_invented_is_found(text, monkeypatch):
    [words] = [*fenced(text), *inline(text)]
    with pytest.raises((AssertionError, SystemExit, ValueError, pytest.fail.Exception)): check(words, monkeypatch)


def test_messages_name_what_pip_can_install():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "jat_nb").rglob("*.py"))
    named = set(re.findall(r'pip install "?([^\s,;)"]+)', text))
    assert named and named <= {library for libraries in REQUIRED.values() for library in libraries}


def test_every_option_in_a_sentence_exists(monkeypatch):
    parsers = [given(words, monkeypatch)[0] for words in (
        ["jat_train"], ["jat_eval"], ["jat_attack", "--images", "x", "--out", "x"], ["jat_report", "x"],
        ["python", "-m", "jat_nb.demo"], ["python", "-m", "jat_nb.bench"])]
    known = {option for parser in parsers for option in parser._option_string_actions}
    for page in PAGES.keys() - {"66_shell"}:  # speaks of commands that it makes up
        named = {found[1] for code in INLINE.findall(FENCE.sub("", PAGES[page])) if (found := OPTION.match(code))}
        assert named <= known, page


@pytest.mark.parametrize("page", ["index", "README"])
def test_the_code_of_the_home_page_runs(page):
    [block] = [block for label, block in FENCE.findall(PAGES[page]) if label == "python"]
    x, y = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    names = {"my_network": nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), "x": x, "y": y}
    exec(block, names)
    assert names["found"].within.all() and names["found"].x_adv.shape == x.shape


@pytest.mark.parametrize("page", sorted(EVERY.keys() - {"README"}))  # which is index again
def test_commands_of_a_page(page, folder, capsys):
    if page == "91_your_own_threat":  # trains in Python what its commands judge
        made = "--recipe jat/natural --data folder:pictures --size 32 --out runs/half --tier smoke --set epochs=1 batch_size=4"
        assert cli.jat_train(made.split()) == 0
        shutil.copytree("runs/half", "runs/streamed")
    for words in EVERY[page]:
        if program(words) in PROGRAMS:
            status = getattr(cli, program(words))(small(words))
            assert status == 0, (words, capsys.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes the GPUs")
@pytest.mark.parametrize("page", sorted(
    p for p in EVERY if p != "92_scaling_out" and any(program(w) == "torchrun" for w in EVERY[p])))  # 92: test_scaling.py
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
    for words in (w for found in SHOWN.values() for w in found if program(w) == "make"):
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
